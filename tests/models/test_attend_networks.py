"""Networks compute attention as they are told, and tasks as the config says."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import build
from diffusion_jax.config import completed, parse, resolved
from diffusion_jax.errors import UserError
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.lora import LoRAConfig, targets, with_lora
from diffusion_jax.models.mmdit import MMDiT, MMDiTConfig
from diffusion_jax.models.network import Compute, Network
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.vision.classifier import ClassifierConfig
from diffusion_jax.models.vision.dinov2 import DINOv2, DINOv2Config
from diffusion_jax.train.tasks.classifier import ClassifierTask, ClassifierTaskConfig
from diffusion_jax.types import Condition
from tests import tiny

ones = jnp.ones
NETWORKS = {
  UNet: (tiny.UNET, lambda m: m(ones((1, 16, 16, 4)), ones(1), Condition(ones((1, 5, 16))))),
  DiT: (
    DiTConfig(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
              sample_size=8, num_embeds_ada_norm=3),
    lambda m: m(ones((1, 8, 8, 4)), ones(1), Condition(labels=jnp.zeros(1, jnp.int32))),
  ),
  MMDiT: (
    MMDiTConfig(sample_size=4, in_channels=3, out_channels=3, num_layers=1, attention_head_dim=4,
                num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8,
                pooled_projection_dim=5, pos_embed_max_size=4),
    lambda m: m(ones((1, 4, 4, 3)), ones(1), Condition(ones((1, 5, 6)), ones((1, 5)))),
  ),
  AutoencoderKL: (tiny.AUTOENCODER, lambda m: m.encode(ones((1, 32, 32, 3)))),
  CLIP: (tiny.CLIP, lambda m: m.encode_image(ones((1, 32, 32, 3)))),
  DINOv2: (
    DINOv2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28),
    lambda m: m(ones((1, 28, 28, 3))),
  ),
}


@pytest.mark.parametrize('module', NETWORKS)
def test_a_network_computes_attention_as_it_is_told(module):
  config, call = NETWORKS[module]
  text = {}
  for way in ('auto', 'xla', 'chunked'):
    network = Network.of(module, config, attention=way)
    text[way] = str(jax.make_jaxpr(lambda p, n=network: call(n.bind(p)))(network.shapes))
  assert 'scan[' not in text['xla'] and 'scan[' in text['chunked']
  assert text['chunked'] == text['auto']
  network = Network.of(module, config, attention='splash')
  with pytest.raises(UserError, match="attention 'splash' cannot serve here"):
    jax.eval_shape(lambda p: call(network.bind(p)), network.shapes)


def test_adapters_keep_it_and_networks_without_attention_refuse_it():
  network = Network.of(UNet, tiny.UNET, remat='block', attention='xla')
  adapted = with_lora(network, targets(network, LoRAConfig()))
  assert adapted.compute == network.compute == Compute(remat='block', attention='xla')
  for one in (adapted, network.with_remat('none')):
    (transformer,) = one.bind(one.shapes).mid_block.attentions
    assert transformer.transformer_blocks[0].attn2.attention == 'xla'
  small = ClassifierConfig(image_size=32, class_names=('a', 'b'))
  with pytest.raises(UserError, match='Classifier has no attention of that kind; set attention to'):
    ClassifierTask(ClassifierTaskConfig(small), None, attention='xla')
  with pytest.raises(UserError, match="attention is 'flash'; choose one of auto, xla, cudnn, spl"):
    Network.of(UNet, tiny.UNET, attention='flash')


def test_tasks_train_with_what_the_config_says(parts, sources, tmp_path):
  make = lambda values: build.build_task(
    parse({**values, 'attention': 'xla'}), *sources, tmp_path, None
  )
  task = make(tiny.diffusion_config(parts, {'cache': False}))
  said = {role: network.compute.attention for role, network in task.model.networks.items()}
  assert said['denoiser'] == task.learning.denoiser.compute.attention == 'xla'
  assert said['autoencoder'] == 'auto'
  assert make(tiny.autoencoder_config()).autoencoder.compute.attention == 'xla'
  assert make(tiny.clip_config()).clip.compute.attention == 'xla'


def test_a_task_without_attention_refuses_it():
  with pytest.raises(UserError, match=r'config\.attention has no effect on task toy'):
    parse({**tiny.toy_config(), 'attention': 'xla'})


def test_a_resumed_run_may_change_it_and_need_not_know_it(tmp_path):
  directory, values = tmp_path, resolved(parse(tiny.clip_config()))
  directory.write_json('config.json', values)
  directory.check_config({**values, 'attention': 'xla'}, completed)
  directory.write_json('config.json', {k: v for k, v in values.items() if k != 'attention'})
  directory.check_config(values, completed)
