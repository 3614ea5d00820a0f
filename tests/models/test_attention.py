"""Attention by each way against the formula; networks and tasks compute it as they are told.

The kernel for TPUs runs in Pallas' interpreter; cuDNN's cannot run here: what it is compiled to.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import build
from diffusion_jax.config import completed, parse, untyped
from diffusion_jax.errors import UserError
from diffusion_jax.models.attention import (
  WAYS,
  attend,
  attend_by,
  check_attention,
  choose,
  cudnn,
  refusal,
)
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.kernels import _blocks, splash
from diffusion_jax.models.lora import LoRAConfig, targets, with_lora
from diffusion_jax.models.mmdit import MMDiT, MMDiTConfig
from diffusion_jax.models.network import Compute, Network
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.vision.classifier import ClassifierConfig
from diffusion_jax.models.vision.dinov2 import DINOv2, DINOv2Config
from diffusion_jax.parallel.layout import on_each_device
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.train.tasks.classifier import ClassifierTask, ClassifierTaskConfig
from diffusion_jax.train.tasks.toy import ToyTask
from diffusion_jax.types import Condition
from tests import tiny
from tests.models.exact_attention import assert_near, draw, exact, found

HERE = {
  'xla': WAYS['xla'], 'chunked': WAYS['chunked'], 'splash': partial(splash, interpret=True),
  # What cuDNN is given, computed by XLA.
  'cudnn': partial(cudnn, implementation='xla'),
}
here = pytest.mark.parametrize('name', HERE)
MESHES = [MeshConfig(data=2, fsdp=2, spatial=2), MeshConfig(data=4, tensor=2)]


@here
@pytest.mark.parametrize(('n', 'keys', 'd', 'scale'), [
  (96, 77, 40, 1), (100, 100, 64, 1), (77, 128, 72, 1),
  (520, 140, 8, 1),  # Two blocks of queries for TPUs.
  (95, 77, 64, 0.1),  # Logits so small that a key which only fills up would count as much.
])
def test_values_and_gradients_are_those_of_the_formula(name, n, keys, d, scale):
  q, *others = draw(2, n, 2, d, keys)
  args = scale * q, *others
  assert_near(found(*args, HERE[name]), exact(*args))


@here
def test_logits_and_softmax_are_float32_in_bfloat16_too(name):
  rng = np.random.default_rng(0)
  # Large logits that differ little, so that it matters that bfloat16 has steps of 2 beyond 256.
  make = lambda mean, spread: jnp.asarray(
    mean + spread * rng.normal(size=(1, 6, 1, 64)), jnp.bfloat16
  )
  q, k, v = make(6, 1), make(6, 0.05), make(0, 1)
  plain = lambda y: np.asarray(y, np.float64)[0, :, 0]
  logits = plain(q) @ plain(k).T / 8
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  assert np.abs(logits).min() > 256
  y = HERE[name](q, k, v)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    plain(y), weights / weights.sum(-1, keepdims=True) @ plain(v), atol=0.02
  )


@pytest.mark.parametrize('mesh', [*MESHES, MeshConfig(tensor=8)])  # Eight do not divide two heads.
def test_a_kernel_on_eight_devices_gives_the_same(mesh):
  args = draw(4, 64, 2, 8, keys=40)
  each = on_each_device(HERE['splash'], ('queries', 'keys', 'keys'), 'queries', whole=True)
  with jax.set_mesh(make_mesh(mesh)):
    assert_near(found(*args, each), exact(*args))


def lowered(name, platform, n=96, keys=96, mesh=None):
  """What a gradient by that way is to the compiler of that platform."""
  shape = lambda length: jax.ShapeDtypeStruct((8, length, 4, 64), jnp.bfloat16)
  loss = lambda q, k, v: attend_by(name, q, k, v).astype(jnp.float32).sum()
  trace = lambda: jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape(n), shape(keys), shape(keys))
  if mesh is None:
    return trace().lower(lowering_platforms=(platform,)).as_text()
  with jax.set_mesh(make_mesh(mesh)):
    return trace().lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('mesh', [None, *MESHES])
def test_splash_is_three_kernels_to_a_tpu(mesh):
  """One forwards, two backwards; on a mesh, too, where no compiler can split them."""
  calls = [
    line for line in lowered('splash', 'tpu', keys=77, mesh=mesh).splitlines()
    if '@tpu_custom_call' in line
  ]
  assert len(calls) == 3
  # Lengths of 96 and 77 fill a block, heads of 64 channels the lanes.
  assert all('x128x128xbf16' in line and 'x64xbf16' not in line for line in calls)


def test_blocks_for_a_tpu_are_of_whole_lanes_and_fit_into_a_core():
  wanted = {77: (128, 128), 512: (512, 512), 520: (384, 768), 4096: (512, 4096), 4430: (512, 4608)}
  assert {length: _blocks(length) for length in wanted} == wanted


@pytest.mark.parametrize('mesh', [None, *MESHES])
@pytest.mark.parametrize(('n', 'keys'), [(96, 96), (96, 77), (257, 257)])
def test_cudnn_is_two_kernels_to_a_gpu(n, keys, mesh, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

  # Only what reads the version of the library needs it to be there.
  monkeypatch.setattr(jax_cudnn, 'check_cudnn_version', lambda: 91100)
  text = lowered('cudnn', 'cuda', n, keys, mesh)
  for call in ('@__cudnn$fmhaSoftmax(', '@__cudnn$fmhaSoftmaxBackward('):
    assert text.count(call) == 1
  # On a mesh each device has its own: nothing is left that a compiler would have to split.
  assert 'CustomSPMDPartitioning' not in text
  assert ('"PADDING' in text.replace('\\22', '"')) == (keys % 2 == 1)


A100, H100, T4 = ('gpu', (8, 0)), ('gpu', (9, 0)), ('gpu', (7, 5))
AMD, TPU, CPU = ('gpu', None), ('tpu', None), ('cpu', None)
HALF, FULL = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(('chip', 'dtype', 'n', 'keys', 'd', 'wanted'), [
  (CPU, FULL, 4096, 4096, 40, 'chunked'), (CPU, HALF, 64, 77, 64, 'chunked'),
  (A100, HALF, 4096, 4096, 40, 'cudnn'), (H100, jnp.float16, 256, 256, 64, 'cudnn'),
  (A100, HALF, 257, 257, 64, 'cudnn'),
  (A100, HALF, 4096, 77, 40, 'xla'), (H100, HALF, 64, 64, 160, 'xla'),
  (A100, HALF, 256, 256, 160, 'xla'), (H100, HALF, 256, 256, 160, 'cudnn'),
  (H100, HALF, 1024, 1024, 20, 'xla'), (H100, HALF, 4096, 4096, 512, 'xla'),
  (H100, HALF, 16384, 16384, 512, 'chunked'), (H100, HALF, 16384, 77, 512, 'xla'),
  (A100, FULL, 4096, 4096, 64, 'xla'), (A100, FULL, 16384, 16384, 64, 'chunked'),
  (T4, jnp.float16, 4096, 4096, 64, 'xla'), (AMD, HALF, 4096, 4096, 64, 'xla'),
  (TPU, HALF, 4096, 4096, 40, 'splash'), (TPU, FULL, 16384, 16384, 64, 'splash'),
  (TPU, HALF, 1024, 1024, 64, 'xla'), (TPU, HALF, 16384, 77, 64, 'xla'),
  (TPU, HALF, 4096, 4096, 512, 'xla'), (TPU, HALF, 16384, 16384, 512, 'chunked'),
])
def test_what_is_chosen(chip, dtype, n, keys, d, wanted):
  assert choose(*chip, dtype, n, keys, d) == wanted
  assert refusal(wanted, *chip, dtype, d) == ''


@pytest.mark.parametrize(('name', 'chip', 'dtype', 'd', 'words'), [
  ('cudnn', CPU, HALF, None, 'needs an NVIDIA GPU .* here is cpu; set attention to auto'),
  ('cudnn', AMD, HALF, None, 'needs an NVIDIA GPU .* here is gpu; set attention to auto'),
  ('cudnn', T4, HALF, None, 'compute capability 8.0 or more, and here is 7.5'),
  ('cudnn', A100, FULL, None, 'does not compute in float32; set dtype to bfloat16'),
  ('cudnn', A100, HALF, 160, 'a multiple of 8 channels up to 128, not 160; set attention to auto'),
  ('cudnn', H100, HALF, 264, 'a multiple of 8 channels up to 256, not 264; set attention to auto'),
  ('cudnn', H100, HALF, 20, 'a multiple of 8 channels up to 256, not 20; set attention to auto'),
  ('splash', H100, HALF, None, 'needs a TPU, and here is gpu; set attention to auto'),
  ('splash', TPU, HALF, 512, 'heads of up to 256 channels, not 512; set attention to auto'),
])
def test_why_a_way_cannot_serve(name, chip, dtype, d, words):
  assert re.search(words, refusal(name, *chip, dtype, d))
  assert refusal('xla', *chip, dtype, d) == refusal('chunked', *chip, dtype, d) == ''


def test_a_way_that_cannot_serve_is_refused_in_one_sentence():
  q = jnp.zeros((1, 8, 1, 8))
  with pytest.raises(UserError) as caught:
    jax.jit(partial(attend, attention='splash'))(q, q, q)
  assert str(caught.value) == (
    "attention 'splash' cannot serve here: it needs a TPU, and here is cpu; set attention to auto."
  )
  with pytest.raises(UserError, match="attention 'cudnn' cannot serve here"):
    check_attention('cudnn', jnp.bfloat16)
  check_attention('xla', jnp.bfloat16)


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
  for one in (adapted, network.with_compute(remat='none')):
    (transformer,) = one.bind(one.shapes).mid_block.attentions
    assert transformer.transformer_blocks[0].attn2.attention == 'xla'
  small = ClassifierConfig(image_size=32, class_names=('a', 'b'))
  with pytest.raises(UserError, match='Classifier has no attention of that kind; set attention to'):
    ClassifierTask(ClassifierTaskConfig(small), None, attention='xla')
  with pytest.raises(UserError, match="attention is 'flash'; did you mean splash"):
    Network.of(UNet, tiny.UNET, attention='flash')


def test_tasks_train_with_what_the_config_says(parts, sources, tmp_path):
  make = lambda values: build.build_task(
    parse({**values, 'attention': 'xla'}), *sources, tmp_path, None
  )
  task = make(tiny.diffusion_config(parts, {'cache': False}))
  said = {role: network.compute.attention for role, network in task.model.networks.items()}
  assert said['denoiser'] == task.loss_model.denoiser.compute.attention == 'xla'
  assert said['autoencoder'] == 'auto'
  assert make(tiny.autoencoder_config()).autoencoder.compute.attention == 'xla'
  assert make(tiny.clip_config()).clip.compute.attention == 'xla'


def test_a_task_without_attention_refuses_it():
  with pytest.raises(UserError, match=r'config\.attention has no effect on task toy'):
    ToyTask.check(parse({**tiny.toy_config(), 'attention': 'xla'}))


def test_a_resumed_run_may_change_it_and_need_not_know_it(tmp_path):
  directory, values = RunDirectory(tmp_path), untyped(parse(tiny.clip_config()))
  directory.write_json('config.json', values)
  directory.check_config({**values, 'attention': 'xla'}, completed)
  directory.write_json('config.json', {k: v for k, v in values.items() if k != 'attention'})
  directory.check_config(values, completed)
