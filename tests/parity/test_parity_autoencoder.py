"""AutoencoderKL against diffusers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.networks import save_params
from diffusion_jax.models import network

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

def random_config(seed):
  """Any small mixture of the options."""
  rng = np.random.default_rng(seed)
  levels = int(rng.integers(1, 4))
  kinds = lambda *names: tuple(str(name) for name in rng.choice(names, levels))
  return dict(
    block_out_channels=tuple(int(c) for c in 4 * rng.integers(1, 4, levels)),
    layers_per_block=int(rng.integers(1, 3)), norm_num_groups=int(rng.choice([1, 2, 4])),
    latent_channels=int(rng.integers(1, 6)), mid_block_add_attention=bool(rng.integers(2)),
    use_quant_conv=bool(rng.integers(2)), use_post_quant_conv=bool(rng.integers(2)),
    down_block_types=kinds('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'),
    up_block_types=kinds('UpDecoderBlock2D', 'AttnUpDecoderBlock2D'),
    scaling_factor=float(rng.uniform(0.1, 1)),
  )


CONFIGS = {
  'two levels': dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4),
  'three levels, one width': dict(
    block_out_channels=(8, 8, 8), layers_per_block=2, norm_num_groups=2, latent_channels=3,
    scaling_factor=0.5, shift_factor=0.1,
  ),
  'no attention': dict(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
    mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    force_upcast=False,
  ),
  'attention at the smallest size': dict(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=48,
    down_block_types=('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'),
    up_block_types=('AttnUpDecoderBlock2D', 'UpDecoderBlock2D'), use_quant_conv=False,
  ),
  **{f'random {seed}': random_config(seed) for seed in range(3)},
}


def reference(config):
  levels = len(config['block_out_channels'])
  plain = dict(down_block_types=('DownEncoderBlock2D',) * levels,
               up_block_types=('UpDecoderBlock2D',) * levels)
  return diffusers.AutoencoderKL(**plain | config)


def nchw(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.fixture
def images():
  return np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_and_gradients(name, images, randomized, ported, quick_jit, assert_same_gradients):
  theirs = randomized(reference(CONFIGS[name]))
  config, graphdef, params = ported('autoencoder', theirs)
  assert config.scaling_factor == CONFIGS[name].get('scaling_factor', 0.18215)
  assert config.shift_factor == CONFIGS[name].get('shift_factor', 0.0)

  posterior = theirs.encode(nchw(images)).latent_dist
  decoded = theirs.decode(posterior.mean).sample
  (decoded.square().mean() + posterior.logvar.mean()).backward()

  def loss(params):
    ours = network.merge(graphdef, params)
    mean, logvar = ours.encode(jnp.asarray(images))
    image = ours.decode(mean)
    return jnp.square(image).mean() + logvar.mean(), (mean, logvar, image)

  # Gradients take long to compile: one network's will do.
  small = name == 'two levels'
  gradients, (mean, logvar, image) = quick_jit(
    jax.grad(loss, has_aux=True) if small else loss
  )(params)
  np.testing.assert_allclose(mean, nhwc(posterior.mean), atol=1e-4)
  np.testing.assert_allclose(logvar, nhwc(posterior.logvar), atol=1e-4)
  np.testing.assert_allclose(image, nhwc(decoded), atol=1e-4)
  if small:
    assert_same_gradients(theirs, gradients)


@pytest.mark.parametrize('name', CONFIGS)
def test_diffusers_opens_what_we_write(name, tmp_path, randomized, ported, assert_same_weights):
  theirs = randomized(reference(CONFIGS[name]))
  config, _, params = ported('autoencoder', theirs)
  save_params(tmp_path / 'ours', config, params)
  back = diffusers.AutoencoderKL.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)
  for key, value in CONFIGS[name].items():
    found = getattr(back.config, key)
    assert (tuple(found) if isinstance(found, list) else found) == value, key


def test_attention_names_of_before_diffusers_0_18(randomized, ported):
  from diffusion_jax.formats.autoencoder import AUTOENCODER
  from diffusion_jax.formats.published import from_published
  theirs = randomized(reference(CONFIGS['two levels']))
  _, _, params = ported('autoencoder', theirs)
  old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
  tensors = {}
  for name, value in theirs.state_dict().items():
    for new_part, old_part in old.items():
      name = name.replace(f'attentions.0.{new_part}.', f'attentions.0.{old_part}.')
    tensors[name] = value.numpy()
  assert any('proj_attn' in name for name in tensors)
  again = from_published({AUTOENCODER.rename(n): t for n, t in tensors.items()}, params, 'old')
  for name, value in params.items():
    np.testing.assert_array_equal(again[name], value)
