"""DiT against diffusers' DiTTransformer2DModel, with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.networks import load, save, save_params
from diffusion_jax.models import network
from diffusion_jax.models.dit import DiT
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

SMALLEST = dict(
  num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=6, num_layers=2,
  sample_size=4, patch_size=2, num_embeds_ada_norm=5,
)


def random_config(seed):
  rng = np.random.default_rng(seed)
  pick = lambda *values: values[rng.integers(len(values))]
  patch = pick(1, 2, 3)
  return dict(
    num_attention_heads=pick(1, 2, 3), attention_head_dim=pick(4, 8), in_channels=pick(1, 4),
    out_channels=pick(None, 2), num_layers=pick(1, 2), attention_bias=pick(True, False),
    sample_size=patch * pick(2, 3), patch_size=patch, num_embeds_ada_norm=pick(1, 7),
    norm_eps=pick(1e-5, 1e-2),
  )


def batch(config, height, width):
  """Latents, times, and labels for both."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, height, width, config['in_channels'])).astype(np.float32)
  classes = config['num_embeds_ada_norm']
  labels = jnp.array([0, classes - 1, classes])
  return x, np.array([0.0, 17.0, 999.0], np.float32), labels


def nchw(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


def test_outputs_and_gradients(randomized, ported, quick_jit, assert_same_gradients):
  theirs = randomized(diffusers.DiTTransformer2DModel(**SMALLEST))
  _, graphdef, params = ported('dit', theirs)
  x, t, labels = batch(SMALLEST, 4, 4)
  wanted = theirs(nchw(x), torch.tensor(t), torch.tensor(np.asarray(labels))).sample
  wanted.square().mean().backward()

  def loss(params):
    y = network.merge(graphdef, params)(jnp.asarray(x), jnp.asarray(t), Condition(labels=labels))
    return jnp.square(y).mean(), y

  gradients, y = quick_jit(jax.grad(loss, has_aux=True))(params)
  assert y.shape == (3, 4, 4, 6)
  np.testing.assert_allclose(y, nhwc(wanted), atol=1e-4)
  assert_same_gradients(theirs, gradients)


@pytest.mark.parametrize('seed', range(3))
def test_random_configs_at_another_size(seed, randomized, ported, quick_jit):
  config = random_config(seed)
  theirs = randomized(diffusers.DiTTransformer2DModel(**config))
  _, graphdef, params = ported('dit', theirs)
  x, t, labels = batch(config, *(2 * [4 * config['patch_size']]))
  with torch.no_grad():
    wanted = theirs(nchw(x), torch.tensor(t), torch.tensor(np.asarray(labels))).sample
  run = lambda params: network.merge(graphdef, params)(x, t, Condition(labels=labels))
  y = quick_jit(run)(params)
  np.testing.assert_allclose(y, nhwc(wanted), atol=1e-4)


def test_oblong_latents(randomized, ported, quick_jit):
  """diffusers puts an oblong image together as a square, so its tokens are compared."""
  theirs = randomized(diffusers.DiTTransformer2DModel(**SMALLEST))
  _, graphdef, params = ported('dit', theirs)
  x, t, labels = batch(SMALLEST, 4, 16)
  tokens = []
  theirs.proj_out_2.register_forward_hook(lambda module, inputs, output: tokens.append(output))
  with torch.no_grad(), pytest.raises(RuntimeError):
    theirs(nchw(x[:, :, :14]), torch.tensor(t), torch.tensor(np.asarray(labels)))
  run = lambda params: network.merge(graphdef, params)(x[:, :, :14], t, Condition(labels=labels))
  y = quick_jit(run)(params)
  patches = np.asarray(y).reshape(3, 2, 2, 7, 2, 6).swapaxes(2, 3).reshape(3, 14, 24)
  np.testing.assert_allclose(patches, tokens[0], atol=1e-4)


def test_files_and_the_shared_embedding(
  tmp_path, randomized, ported, quick_jit, assert_same_weights
):
  theirs = randomized(diffusers.DiTTransformer2DModel(**SMALLEST))
  config, graphdef, params = ported('dit', theirs)
  save_params(tmp_path / 'ours', config, params)
  back = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)
  for key, value in SMALLEST.items():
    assert getattr(back.config, key) == value, key

  shared_config = dataclasses.replace(config, shared_embedding=True)
  graph, shapes = network.abstract(lambda rngs: DiT(shared_config, rngs=rngs))
  shared = {name: params[name] for name in shapes}
  assert len(params) - len(shared) == 5
  same = {n: params[n.replace('blocks.1.norm1.emb', 'blocks.0.norm1.emb')] for n in params}
  x, t, labels = batch(SMALLEST, 4, 4)
  run = lambda graph, params: quick_jit(
    lambda params: network.merge(graph, params)(x, t, Condition(labels=labels))
  )(params)
  np.testing.assert_array_equal(run(graph, shared), run(graphdef, same))
  save(network.merge(graph, shared), tmp_path / 'shared')
  again = load('dit', tmp_path / 'shared')
  assert again.config == shared_config
  assert all(np.array_equal(v, shared[n]) for n, v in network.split(again)[1].items())
