"""Pictures to noise and back, and strips between two, by models of texts and of classes."""

import dataclasses

import jax
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import initial_noise
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.pipelines.inversion import invert, strip
from diffusion_jax.pipelines.sampling import SampleConfig
from tests import tiny_pipeline
from tests.pipelines.conftest import CLASSES

SIZE = 8
CONFIG = SampleConfig('ddim', steps=12, guidance=1.0)


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def by_text(tmp_path_factory):
  """(model, weights) of texts on latents."""
  folder = tmp_path_factory.mktemp('pipeline')
  tiny_pipeline.write_tiny_pipeline(folder, tiny_pipeline.SD)
  model, weights, _ = load_model(str(folder))
  return model, weights


def images_of(size):
  return np.random.default_rng(0).integers(40, 216, (2, size, size, 3), np.uint8)


def test_pictures_come_back_nearer_the_more_calls(by_class, mesh):
  """By the exact v of this network: another class's noise draws something else."""
  model, weights = by_class
  images, prompts = images_of(SIZE), ['red', 'green']
  draw = lambda noise, prompts, config=CONFIG: np.concatenate(
    list(model.sample(weights, prompts, config, seed=0, mesh=mesh, noise=noise))
  )
  noise = {
    n: invert(model, weights, images, prompts, CONFIG, mesh=mesh, iterations=n) for n in (1, 2, 6)
  }
  off = lambda n, prompts: np.abs(draw(noise[n], prompts) - (images / 127.5 - 1)).max()
  errors = [off(n, prompts) for n in noise]
  assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 1e-3, errors
  assert off(6, prompts[::-1]) > 10 * errors[2]
  assert noise[1].shape == (2, SIZE, SIZE, 3) and noise[1].dtype == np.float32
  guided = dataclasses.replace(CONFIG, guidance=1.5)
  back = invert(model, weights, images, prompts, guided, mesh=mesh, iterations=6)
  assert np.abs(draw(back, prompts, guided) - (images / 127.5 - 1)).max() < 5e-3
  assert np.abs(back - noise[6]).max() > 0.01


@pytest.mark.parametrize(('kind', 'prompts'), [
  ('by_class', ['red', 'green']), ('by_text', ['a cat', 'cat b']), ('by_text', ['cat', 'cat']),
])
def test_the_ends_of_a_strip_are_the_pictures_of_the_ends(kind, prompts, mesh, request):
  model, weights = request.getfixturevalue(kind)
  shape = model.space.shape(*model.trained_size)
  noise = np.asarray(initial_noise(3, 0, 2, shape)[0])
  config = dataclasses.replace(CONFIG, steps=3, guidance=2.0)
  frames = np.concatenate(list(strip(model, weights, noise, prompts, 5, config, seed=3, mesh=mesh)))
  ends = np.concatenate(list(model.sample(weights, prompts, config, seed=3, mesh=mesh)))
  np.testing.assert_allclose(frames[[0, -1]], ends, atol=2e-5)
  steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
  assert (steps > 0).all() and steps.max() < 0.9 * np.abs(ends[1] - ends[0]).mean()


def test_the_prompt_alone_changes_where_the_noise_stays(by_text, by_class, mesh):
  """A text's condition evenly; the class in the middle."""
  config = dataclasses.replace(CONFIG, steps=2, guidance=2.0)
  for (model, weights), prompts in ((by_text, ['a cat', 'zzz']), (by_class, CLASSES)):
    one = np.asarray(initial_noise(0, 0, 1, model.space.shape(*model.trained_size))[0])
    frames = np.concatenate(list(strip(
      model, weights, one.repeat(2, 0), prompts, 5, config, seed=0, mesh=mesh
    )))
    moved = np.abs(np.diff(frames, axis=0)).max(axis=(1, 2, 3)) > 1e-4
    assert moved.tolist() == ([True] * 4 if model.text else [False, True, False, False])


def test_eta_goes_from_ddim_to_ddpm(by_class, mesh):
  """0 is DDIM, 1 its ancestral form, and between them is neither; other samplers have none."""
  model, weights = by_class
  config = dataclasses.replace(CONFIG, steps=3)
  draw = lambda **changes: np.concatenate(list(model.sample(
    weights, ['red'], dataclasses.replace(config, **changes), seed=0, mesh=mesh
  )))
  found = [draw(), draw(eta=0.0), draw(eta=0.5), draw(eta=1.0), draw(sampler='euler_ancestral')]
  np.testing.assert_array_equal(found[0], found[1])
  np.testing.assert_allclose(found[3], found[4], atol=1e-5)
  assert np.abs(found[2] - found[0]).max() > 0.01 < np.abs(found[2] - found[3]).max()
  assert dataclasses.replace(config, eta=0.5).in_force()['eta'] == '0.5'
  with pytest.raises(UserError, match="'lms' has no option 'eta'"):
    draw(sampler='lms', eta=0.5)


def test_what_cannot_be_inverted_is_said(by_class, mesh):
  model, weights = by_class
  go = lambda config: invert(model, weights, images_of(SIZE)[:1], ['red'], config, mesh=mesh)
  for change, says in (
    ({'sampler': 'dpmpp_2m'}, 'set the sampler to ddim, not dpmpp_2m'),
    ({'options': {'eta': 1.0}}, 'leave out its eta'), ({'eta': 0.1}, 'leave out its eta'),
    ({'steps': 1}, 'one step cannot be undone'),
  ):
    with pytest.raises(UserError, match=says):
      go(dataclasses.replace(CONFIG, **change))
  with pytest.raises(UserError, match='frames from 2 on'):
    next(strip(model, weights, np.zeros((2, SIZE, SIZE, 3)), ['red'], 1, CONFIG))
