"""Flux against diffusers' FluxTransformer2DModel, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.dit import FLUX, TRANSFORMERS
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models import network
from diffusion_jax.models.flux import FluxConfig, packed, unpacked
from diffusion_jax.models.network import Network
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

SMALLEST = dict(
  in_channels=12, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
  joint_attention_dim=6, pooled_projection_dim=5, axes_dims_rope=(2, 2, 4),
)
CONFIGS = {
  'dev': SMALLEST | dict(guidance_embeds=True, num_layers=2, out_channels=8),
  'schnell': SMALLEST,
}
H, W, LENGTH = 6, 10, 5


def batch(config):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  guidance = np.array([3.5, 1.0], np.float32) if config.get('guidance_embeds') else None
  return dict(
    x=draw(2, H, W, config['in_channels'] // 4), t=np.array([3.5, 999.0], np.float32),
    text=draw(2, LENGTH, config['joint_attention_dim']),
    pooled=draw(2, config['pooled_projection_dim']), guidance=guidance,
  )


def ours(x, t, text, pooled, guidance):
  return x, t, Condition(text, pooled, guidance=guidance)


def theirs_of(model, x, t, text, pooled, guidance):
  """As FluxPipeline packs latents and numbers their places."""
  pipeline = diffusers.FluxPipeline
  tokens = pipeline._pack_latents(torch.tensor(x.transpose(0, 3, 1, 2)), 2, x.shape[-1], H, W)
  places = pipeline._prepare_latent_image_ids(2, H // 2, W // 2, 'cpu', torch.float32)
  out = model(
    tokens, torch.tensor(text), torch.tensor(pooled), torch.tensor(t) / 1000, places,
    torch.zeros(LENGTH, 3), None if guidance is None else torch.tensor(guidance),
  ).sample
  return pipeline._unpack_latents(out, 8 * H, 8 * W, 8).permute(0, 2, 3, 1)


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_gradients_and_files(
  name, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(diffusers.FluxTransformer2DModel(**CONFIGS[name]))
  config, graphdef, params = ported('flux', theirs)
  inputs = batch(CONFIGS[name])
  wanted = theirs_of(theirs, **inputs)
  wanted.square().mean().backward()

  def loss(params, inputs):
    y = network.merge(graphdef, params)(*ours(**inputs))
    return jnp.square(y).mean(), y

  gradients, y = quick_jit(jax.grad(loss, has_aux=True))(params, inputs)
  np.testing.assert_allclose(y, wanted.detach(), atol=1e-4)
  assert_same_gradients(theirs, gradients)
  assert all(np.any(gradient) for gradient in gradients.values())
  save_params(tmp_path / 'ours', config, params)
  again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, again)


def test_padding_of_a_text_changes_nothing(quick_jit):
  config = FLUX.parse(CONFIGS['dev'], 'here')
  flux = Network.of(FLUX.module, config)
  rng = np.random.default_rng(1)
  fresh = flux.initialize(jax.random.key(0))
  params = {n: x + rng.normal(0, 0.2, x.shape).astype(np.float32) for n, x in fresh.items()}
  run = quick_jit(lambda x, t, condition: flux.bind(params)(x, t, condition))
  x, t, condition = ours(**batch(CONFIGS['dev']))
  mask = np.array([[1] * 5, [1] * 3 + [0] * 2])
  first = run(x, t, condition._replace(mask=mask))
  other = condition.text.copy()
  other[1, 3:] = 7.0
  np.testing.assert_array_equal(first, run(x, t, condition._replace(text=other, mask=mask)))
  short = jax.tree.map(lambda v: v[1:], condition)._replace(text=condition.text[1:, :3])
  np.testing.assert_allclose(first[1:], run(x[1:], t[1:], short), rtol=1e-4, atol=1e-4)
  assert np.abs(first - run(x, t, condition._replace(text=other))).max() > 1e-3


def test_packing():
  x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  np.testing.assert_array_equal(unpacked(packed(jnp.asarray(x)), 4, 6), x)


@pytest.mark.parametrize('name', ['flux_dev', 'flux_schnell'])
def test_parameters_at_full_size(name):
  config = TRANSFORMERS[name]
  values = {k: v for k, v in FLUX.describe(config).items() if not k.startswith('_')}
  with torch.device('meta'):
    theirs = diffusers.FluxTransformer2DModel(**values)
  wanted = {n: tuple(p.shape) for n, p in theirs.named_parameters()}
  shapes = FLUX.shapes(config)
  assert sum(x.size for x in shapes.values()) == sum(map(np.prod, wanted.values()))
  assert len(shapes) == len(wanted)
  assert isinstance(config, FluxConfig)
