"""Samples as steps grow: deterministic ones settle at their order, ancestral ones do not."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.diffusion.samplers import initial_noise, sampler
from diffusion_jax.evaluation.settling import changes, drawn_by
from diffusion_jax.pipelines.sampling import SampleConfig

MIXTURE = GaussianMixture(
  jnp.array([0.4, 0.6]), jnp.array([[[[0.5]]], [[[-0.8]]]]), jnp.array([0.05, 0.1])
)
COUNTS = (10, 20, 40, 80, 160)


def exact_model():
  """What `drawn_by` asks of a model, with the exact denoiser of a mixture."""
  noise = Schedule(ScheduleConfig('linear', 1e-4, 0.02))

  def sample(weights, prompts, config, seed):
    x, keys = initial_noise(seed, 0, len(prompts), (1, 1, 1))
    grid = noise.grid(config.steps, config.spacing)
    run = jax.jit(lambda x, grid, keys: sampler(config.sampler)(MIXTURE.denoise, x, grid, keys))
    yield np.asarray(run(x, grid, keys))

  return types.SimpleNamespace(sample=sample, check_sampling=lambda config: None)


def test_deterministic_samples_settle_and_ancestral_ones_do_not():
  config = SampleConfig('ddim', guidance=1.0)
  drawn = drawn_by(
    exact_model(), {}, [''] * 512, config, ('ddim', 'heun', 'ddpm'), COUNTS[::-1], seed=0
  )
  found = {name: changes(images) for name, images in drawn.items()}
  assert all(tuple(of) == COUNTS[:-1] for of in found.values())
  ddim, heun, ddpm = (np.array(list(found[name].values())) for name in ('ddim', 'heun', 'ddpm'))
  assert (ddim[1:] < 0.65 * ddim[:-1]).all() and ddim[-1] < 0.03, ddim
  assert (heun[2:] < 0.45 * heun[1:-1]).all() and heun[-1] < ddim[-1], heun
  # As far apart as samples of other noise: the root of twice the variance of the data.
  far = float(np.sqrt(2 * np.mean(MIXTURE.variance())))
  assert (ddpm > 0.4 * far).all() and ddpm[-1] > 10 * ddim[-1], ddpm


def test_the_command_writes_a_page(command, finished, tmp_path, capsys):
  out = tmp_path / 'steps.json'
  common = ('evaluate', 'steps', '--workdir', finished, '--out', out)
  assert command(*common, '--samples', 2, '--counts', '2,4,3', '--samplers', 'ddim,ddpm') == 0
  scores = json.loads(out.read_text())
  assert scores['settling']['steps'] == [2, 3, 4]
  for name in ('ddim', 'ddpm'):
    points = scores['settling']['changes'][name]
    assert [few for few, _ in points] == [2, 3] and all(change > 0 for _, change in points)
    assert scores[name]['change_at_3_steps'] == points[1][1]
  page = out.with_suffix('.html').read_text()
  assert 'ancestral samples are others each time' in page and page.count('data:image/png') >= 12
  assert command(*common, '--steps', 3) == 2
  assert '--steps does nothing beside' in capsys.readouterr().err


@pytest.mark.parametrize(('arguments', 'says'), [
  (('--counts', '10'), 'give two numbers of steps or more'), (('--counts', '5,x'), '--counts is'),
  (('--samplers', 'ddim,dpm'), '--samplers'),
])
def test_what_compares_nothing(arguments, says, command, capsys, tmp_path):
  assert command('evaluate', 'steps', *arguments, '--out', tmp_path / 'a.json') == 2
  assert says in capsys.readouterr().err
