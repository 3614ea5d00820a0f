"""CFG++ beside its algorithm in NumPy."""

import jax
import numpy as np
import pytest

from diffusion_jax.diffusion.free_guidance import plus_plus
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.samplers import sampler

X = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
MEANS = {'text': np.full((3, 1), 0.7, np.float32), 'none': np.full((3, 1), -0.2, np.float32)}
VARIANCE = 0.25


def denoise(x, alpha, sigma, mean):
  """The exact denoiser of N(mean, VARIANCE)."""
  return mean + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x - alpha * mean)


def _keys():
  return jax.random.split(jax.random.key(0), len(X))


@pytest.mark.parametrize('scale', [0.0, 0.6, 1.0])
def test_cfg_plus_plus_renoises_without_the_text(scale):
  grid = NoiseSchedule.of(NoiseConfig()).grid(7)
  alphas, sigmas = (np.asarray(part, np.float64) for part in grid[:2])
  guided = plus_plus(denoise, MEANS['text'], MEANS['none'], scale)
  start = X * sigmas[0].astype(np.float32)
  found = sampler('ddim', keep_epsilon=True)(guided, start, grid, _keys())
  x = X.astype(np.float64) * sigmas[0]
  for here, there in zip(range(7), range(1, 8), strict=True):
    alpha, sigma = alphas[here], sigmas[here]
    eps = {k: (x - alpha * denoise(x, alpha, sigma, m)) / sigma for k, m in MEANS.items()}
    mixed = eps['none'] + scale * (eps['text'] - eps['none'])
    x = alphas[there] * (x - sigma * mixed) / alpha + sigmas[there] * eps['none']
  np.testing.assert_allclose(found, x, rtol=2e-4, atol=2e-4)
