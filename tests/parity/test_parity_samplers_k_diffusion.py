"""Trajectories in float64 against k-diffusion's, as recorded by reference/make_k_diffusion.py."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import sampler
from tests.diffusion.exact_mixture import denoise

RECORD = json.loads((Path(__file__).parent / 'reference' / 'k_diffusion.json').read_text())
SIGMAS = np.array(RECORD['sigmas'])
NOISES = np.array(RECORD['noises']).reshape(-1, *RECORD['shape'])

CHURN = {'s_churn': 2.0, 's_tmin': 0.1, 's_tmax': 5.0, 's_noise': 1.003}
ANCESTRAL = {'eta': 0.7, 's_noise': 1.01}
OURS = {
  'euler': ('euler', {}),
  'euler_churn': ('euler', CHURN),
  'euler_ancestral': ('euler_ancestral', {}),
  'euler_ancestral_options': ('euler_ancestral', ANCESTRAL),
  'heun': ('heun', {}),
  'heun_churn': ('heun', CHURN),
  'dpm2': ('dpm2', {}),
  'dpm2_churn': ('dpm2', CHURN),
  'dpm2_ancestral': ('dpm2_ancestral', {}),
  'dpm2_ancestral_options': ('dpm2_ancestral', ANCESTRAL),
  'lms': ('lms', {}),
  'lms_2': ('lms', {'order': 2}),
  'dpmpp_2s_ancestral': ('dpmpp_2s_ancestral', {}),
  'dpmpp_2s_ancestral_options': ('dpmpp_2s_ancestral', ANCESTRAL),
  'dpmpp_sde': ('dpmpp_sde', {}),
  'dpmpp_sde_options': ('dpmpp_sde', ANCESTRAL),
  'dpmpp_2m': ('dpmpp_2m', {}),
  'dpmpp_2m_sde': ('dpmpp_2m_sde', {}),
  'dpmpp_2m_sde_options': ('dpmpp_2m_sde', {**ANCESTRAL, 'slope': 'exact'}),
  'dpmpp_3m_sde': ('dpmpp_3m_sde', {}),
  'dpmpp_3m_sde_options': ('dpmpp_3m_sde', ANCESTRAL),
  'dpm_adaptive_2': ('dpm_adaptive', {'order': 2}),
  'dpm_adaptive_3': ('dpm_adaptive', {'order': 3}),
  'dpm_adaptive_options': (
    'dpm_adaptive',
    {'order': 3, 'rtol': 0.01, 'atol': 0.001, 'pcoeff': 0.2, 'icoeff': 0.6, 'dcoeff': 0.1,
     'eta': 0.5, 's_noise': 1.01},
  ),
}


def independent_parts(noises):
  """What `dpmpp_sde` has to draw for its noises to be these.

  k-diffusion asks its noise sampler for the increments of one Brownian path in sigma, from sigma to
  the midpoint and from sigma to the next sigma; ours draws the second as what is new in it.
  """
  parts = np.array(noises)
  for i in range(len(SIGMAS) - 2):
    whole, first = SIGMAS[i] - SIGMAS[i + 1], SIGMAS[i] - np.sqrt(SIGMAS[i] * SIGMAS[i + 1])
    shared = np.sqrt(first / whole)
    parts[2 * i + 1] = (noises[2 * i + 1] - shared * noises[2 * i]) / np.sqrt(1 - shared**2)
  return parts


def test_every_recorded_run_is_compared():
  assert RECORD['runs'].keys() == OURS.keys()


@pytest.mark.parametrize('name', OURS)
def test_trajectory_is_that_of_k_diffusion(name):
  ours, options = OURS[name]
  wanted = RECORD['runs'][name]
  noises = independent_parts(NOISES) if ours == 'dpmpp_sde' else NOISES
  sigmas = SIGMAS[:-1] if ours == 'dpm_adaptive' else SIGMAS
  with jax.enable_x64(True):
    noises, grid = jnp.asarray(noises), (jnp.ones(len(sigmas)), jnp.asarray(sigmas))
    draw = lambda index, like: noises[index]
    x = jnp.asarray(RECORD['x']).reshape(RECORD['shape'])
    out = jax.jit(partial(sampler(ours, **options), denoise, trajectory=True, keys=draw))(
      x=x, grid=grid
    )
  assert out.sample.dtype == np.float64
  np.testing.assert_array_equal(out.states[-1], out.sample)
  if 'states' in wanted:
    reference = np.array(wanted['states'])
    found = np.asarray(out.states).reshape(reference.shape)
  else:
    reference, found = np.array([wanted['sample']]), np.asarray(out.sample).reshape(1, -1)
  largest = np.abs(reference).max(axis=1)
  assert (np.abs(found - reference).max(axis=1) < 1e-10 * largest).all()
  if 'accepted' in wanted:
    assert len(np.unique(out.sigmas)) == wanted['accepted']
