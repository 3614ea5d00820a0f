"""CFG-Zero* beside the guider of diffusers, on a flow of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.guiders import ClassifierFreeZeroStarGuidance

from diffusion_jax.diffusion.free_guidance import zero_star
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.samplers import sampler
from tests.diffusion.test_free_guidance import MEANS, X, denoise


def test_cfg_zero_star_is_that_of_diffusers():
  process = NoiseSchedule.of(NoiseConfig(process='flow'))
  grid = process.grid(6)
  sigmas = np.asarray(grid[1], np.float64)
  guider = ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=1)
  x, states = X.astype(np.float64) * sigmas[0], []
  for i in range(6):
    guider.set_state(i, 6, torch.tensor(sigmas[i]))
    velocity = [
      torch.tensor((x - denoise(x, 1 - sigmas[i], sigmas[i], MEANS[name])) / sigmas[i])
      for name in ('text', 'none')
    ]
    x = x + (sigmas[i + 1] - sigmas[i]) * guider.forward(*velocity).pred.numpy()
    states.append(x)
  assert np.array_equal(states[0], X * sigmas[0])  # The first step is none.
  guided = zero_star(denoise, MEANS['text'], MEANS['none'], 3.0, grid[1][0])
  start = jnp.asarray(X * sigmas[0].astype(np.float32))
  found = sampler('flow_euler')(guided, start, grid, jax.random.split(jax.random.key(0), len(X)))
  np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)
