"""UNet2D against diffusers' UNet2DModel, with random weights; DDPM's own sizes by their counts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.networks import load_params, save_params
from diffusion_jax.formats.tensors import open_tensors, write_tensors
from diffusion_jax.formats.unet import UNET2D, UNETS2D
from diffusion_jax.models import network
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

CONFIGS = {
  'DDPM': dict(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=None,
    down_block_types=('DownBlock2D', 'AttnDownBlock2D'), downsample_padding=0, freq_shift=1,
    up_block_types=('AttnUpBlock2D', 'UpBlock2D'), flip_sin_to_cos=False, norm_eps=1e-6,
  ),
  'classes, heads, variance': dict(
    block_out_channels=(8, 8), layers_per_block=2, norm_num_groups=4, attention_head_dim=4,
    down_block_types=('AttnDownBlock2D', 'DownBlock2D'), num_class_embeds=5, in_channels=2,
    up_block_types=('UpBlock2D', 'AttnUpBlock2D'), out_channels=4, norm_eps=1e-3,
    resnet_time_scale_shift='scale_shift', attn_norm_num_groups=4,
  ),
  'no attention in the middle': dict(
    block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, add_attention=False,
    down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',),
  ),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_gradients_and_files(
  name, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(diffusers.UNet2DModel(sample_size=8, **CONFIGS[name]))
  config, graphdef, params = ported('unet2d', theirs)
  rng = np.random.default_rng(0)
  x, t = rng.normal(size=(2, 4, 8, config.in_channels)).astype(np.float32), np.array([3, 700])
  labels = None if config.num_class_embeds is None else np.array([4, 1])
  given = {} if labels is None else {'class_labels': torch.tensor(labels)}
  wanted = theirs(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), **given).sample
  wanted.square().mean().backward()

  def loss(params):
    y = network.merge(graphdef, params)(x, jnp.asarray(t), Condition(labels=labels))
    return jnp.square(y).mean(), y

  gradients, y = quick_jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(y, wanted.detach().numpy().transpose(0, 2, 3, 1), atol=1e-4)
  assert_same_gradients(theirs, gradients)
  save_params(tmp_path / 'ours', config, params)
  assert_same_weights(theirs, diffusers.UNet2DModel.from_pretrained(tmp_path / 'ours'))
  if name == 'DDPM':  # Files from before diffusers 0.18 have other names in their attention.
    old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    tensors = dict(open_tensors(tmp_path / 'ours' / 'diffusion_pytorch_model.safetensors'))
    for new, before in old.items():
      tensors = {key.replace(f'.{new}.', f'.{before}.'): t for key, t in tensors.items()}
    write_tensors(tmp_path / 'old' / 'diffusion_pytorch_model.safetensors', tensors)
    text = json.loads((tmp_path / 'ours' / 'config.json').read_text())
    (tmp_path / 'old' / 'config.json').write_text(json.dumps(text))
    _, again = load_params('unet2d', tmp_path / 'old')
    jax.tree.map(np.testing.assert_array_equal, again, dict(params))


@pytest.mark.parametrize(('name', 'count'), [
  ('ddpm_cifar10', 35_746_307), ('ddpm_256', 113_673_219),
])
def test_ddpm_at_full_size(name, count):
  """35.7 million and 114 million by the paper (appendix B)."""
  config = UNETS2D[name]
  values = UNET2D.describe(config)
  with torch.device('meta'):
    theirs = diffusers.UNet2DModel.from_config(values)
  shapes = UNET2D.shapes(config)
  assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == count
  assert sum(p.numel() for p in theirs.parameters()) == count
  assert len(shapes) == len(list(theirs.parameters()))
