"""MMDiT against diffusers' SD3Transformer2DModel, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.networks import save_params
from diffusion_jax.models import network
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

SMALLEST = dict(
  sample_size=4, patch_size=2, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=4,
  num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5,
  pos_embed_max_size=6,
)
CONFIGS = {
  'Stable Diffusion 3': SMALLEST,
  'Stable Diffusion 3.5': SMALLEST | dict(
    num_layers=3, qk_norm='rms_norm', dual_attention_layers=(0, 2), out_channels=None,
  ),
}


def random_config(seed):
  rng = np.random.default_rng(seed)
  pick = lambda *values: values[rng.integers(len(values))]
  patch, heads, width, layers = pick(1, 2, 3), pick(1, 3), pick(4, 8), pick(1, 2)
  return dict(
    sample_size=patch * pick(2, 5), patch_size=patch, in_channels=pick(1, 4),
    out_channels=pick(1, 2), num_layers=layers, attention_head_dim=width,
    num_attention_heads=heads, joint_attention_dim=pick(3, 10),
    caption_projection_dim=heads * width, pooled_projection_dim=pick(1, 6),
    pos_embed_max_size=pick(6, 9), qk_norm=pick(None, 'rms_norm'),
    dual_attention_layers=pick((), (layers - 1,)),
  )


def batch(config):
  """Oblong latents of 3 x 6 patches with a text of 5 tokens."""
  rng = np.random.default_rng(0)
  p, draw = config['patch_size'], lambda *shape: rng.normal(size=shape).astype(np.float32)
  return dict(
    x=draw(2, 3 * p, 6 * p, config['in_channels']), t=np.array([3.5, 999.0], np.float32),
    text=draw(2, 5, config['joint_attention_dim']), pooled=draw(2, config['pooled_projection_dim']),
  )


def ours(x, t, text, pooled):
  return x, t, Condition(text, pooled)


def theirs_of(model, x, t, text, pooled):
  out = model(
    torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(text), torch.tensor(pooled),
    torch.tensor(t),
  ).sample
  return out.permute(0, 2, 3, 1)


def test_outputs_and_gradients(randomized, ported, quick_jit, assert_same_gradients):
  theirs = randomized(diffusers.SD3Transformer2DModel(**SMALLEST))
  _, graphdef, params = ported('mmdit', theirs)
  inputs = batch(SMALLEST)
  wanted = theirs_of(theirs, **inputs)
  wanted.square().mean().backward()

  def loss(params, inputs):
    y = network.merge(graphdef, params)(*ours(**inputs))
    return jnp.square(y).mean(), y

  gradients, y = quick_jit(jax.grad(loss, has_aux=True))(params, inputs)
  np.testing.assert_allclose(y, wanted.detach(), atol=1e-4)
  # The table of positions is not learned; there it is a buffer without gradient.
  assert not np.any(gradients.pop('pos_embed.pos_embed'))
  assert_same_gradients(theirs, gradients)


@pytest.mark.parametrize('config', [
  CONFIGS['Stable Diffusion 3.5'], *(random_config(seed) for seed in range(3))
])
def test_outputs(config, randomized, ported, quick_jit):
  theirs = randomized(diffusers.SD3Transformer2DModel(**config))
  _, graphdef, params = ported('mmdit', theirs)
  inputs = batch(config)
  with torch.no_grad():
    wanted = theirs_of(theirs, **inputs)
  run = lambda params, inputs: network.merge(graphdef, params)(*ours(**inputs))
  y = quick_jit(run)(params, inputs)
  np.testing.assert_allclose(y, wanted, atol=1e-4)


@pytest.mark.parametrize('name', CONFIGS)
def test_diffusers_opens_what_we_write(name, tmp_path, randomized, ported, assert_same_weights):
  theirs = randomized(diffusers.SD3Transformer2DModel(**CONFIGS[name]))
  config, graphdef, params = ported('mmdit', theirs)
  save_params(tmp_path / 'ours', config, params)
  back = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)
  for key, value in CONFIGS[name].items():
    found = getattr(back.config, key)
    assert (tuple(found) if isinstance(found, list) else found) == value, key
  # A fresh network's positions are those of the reference.
  module = type(network.merge(graphdef, params))
  fresh = network.initialize(lambda rngs: module(config, rngs=rngs), jax.random.key(0))
  np.testing.assert_allclose(
    fresh['pos_embed.pos_embed'], params['pos_embed.pos_embed'], atol=1e-6
  )
