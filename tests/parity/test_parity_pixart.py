"""PixArt against diffusers' PixArtTransformer2DModel, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.dit import PIXART, TRANSFORMERS
from diffusion_jax.formats.networks import save_params
from diffusion_jax.formats.published import published_shape, to_published_names
from diffusion_jax.models import network
from diffusion_jax.models.network import Network
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

SMALLEST = dict(
  num_attention_heads=3, attention_head_dim=4, in_channels=3, out_channels=6, num_layers=2,
  sample_size=4, patch_size=2, cross_attention_dim=12, caption_channels=7,
)
CONFIGS = {
  # Twice the size of the positions that it began with, and told the picture's size.
  'alpha': SMALLEST | dict(use_additional_conditions=True, interpolation_scale=2),
  'sigma': SMALLEST | dict(interpolation_scale=1.5, attention_bias=False),
  'text as it is': SMALLEST | dict(
    caption_channels=None, cross_attention_dim=5, out_channels=None, norm_eps=1e-2, patch_size=1
  ),
}
MASK = np.array([[1] * 5, [1] * 3 + [0] * 2])
SIZES = np.array([[9, 9, 9, 9, 512, 768], [9, 9, 9, 9, 1024, 1000]], np.float32)


def batch(config):
  """Latents of 4 x 6, a text of 5 tokens, of which the second's last two are padding."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  text = draw(2, 5, config['caption_channels'] or config['cross_attention_dim'])
  sizes = SIZES if config.get('use_additional_conditions') else None
  condition = Condition(text, sizes=sizes, mask=MASK)
  return draw(2, 4, 6, config['in_channels']), np.array([3.0, 999.0], np.float32), condition


def theirs_of(model, x, t, condition):
  sizes = None if condition.sizes is None else torch.tensor(condition.sizes)
  more = None if sizes is None else {
    'resolution': sizes[:, 4:], 'aspect_ratio': sizes[:, 4:5] / sizes[:, 5:]
  }
  return model(
    torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(condition.text), torch.tensor(t), more,
    encoder_attention_mask=torch.tensor(condition.mask),
  ).sample.permute(0, 2, 3, 1)


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_gradients_and_files(
  name, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(diffusers.PixArtTransformer2DModel(**CONFIGS[name]))
  config, graphdef, params = ported('pixart', theirs)
  inputs = batch(CONFIGS[name])
  wanted = theirs_of(theirs, *inputs)
  wanted.square().mean().backward()

  def loss(params, inputs):
    y = network.merge(graphdef, params)(*inputs)
    return jnp.square(y).mean(), y

  gradients, y = quick_jit(jax.grad(loss, has_aux=True))(params, inputs)
  np.testing.assert_allclose(y, wanted.detach(), atol=1e-4)
  assert_same_gradients(theirs, gradients)
  # What is added to all keys of a query changes no weight.
  keys = ('attn1.to_k.bias', 'attn2.to_k.bias')
  assert all(np.any(g) for n, g in gradients.items() if not n.endswith(keys))
  save_params(tmp_path / 'ours', config, params)
  again = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, again)
  for key, value in CONFIGS[name].items():
    assert getattr(again.config, key) == value, key


def test_padding_of_a_text_changes_nothing(quick_jit, randomized, ported):
  theirs = randomized(diffusers.PixArtTransformer2DModel(**CONFIGS['alpha']))
  _, graphdef, params = ported('pixart', theirs)
  run = quick_jit(lambda *inputs: network.merge(graphdef, params)(*inputs))
  x, t, condition = batch(CONFIGS['alpha'])
  first, other = run(x, t, condition), condition.text.copy()
  other[1, 3:] = 7.0
  np.testing.assert_array_equal(first, run(x, t, condition._replace(text=other)))
  short = jax.tree.map(lambda v: v[1:], condition)
  short = short._replace(text=condition.text[1:, :3], mask=None)
  np.testing.assert_allclose(first[1:], run(x[1:], t[1:], short), rtol=1e-4, atol=1e-4)
  assert np.abs(first - run(x, t, condition._replace(text=other, mask=None))).max() > 1e-3


def test_a_fresh_network_gives_zero():
  config = PIXART.parse(CONFIGS['alpha'], 'here')
  made = Network.of(PIXART.module, config)
  y = made.bind(made.initialize(jax.random.key(0)))(*batch(CONFIGS['alpha']))
  assert y.shape == (2, 4, 6, 6) and not np.any(y)


@pytest.mark.parametrize(('name', 'count'), [
  ('pixart_alpha', 611_349_152), ('pixart_sigma', 610_856_096)
])
def test_names_and_shapes_at_full_size(name, count):
  config = TRANSFORMERS[name]
  values = {k: v for k, v in PIXART.describe(config).items() if not k.startswith('_')}
  with torch.device('meta'):
    theirs = diffusers.PixArtTransformer2DModel(**values)
  shapes = PIXART.shapes(config)
  ours = {
    published: published_shape(own, shapes[own].shape)
    for own, published in to_published_names(shapes).items()
  }
  assert ours == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
  assert network.count(shapes) == count
