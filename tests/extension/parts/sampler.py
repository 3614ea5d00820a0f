"""A sampler: DDIM once more, each step with the noise and the estimate that it began with."""

from diffusion_jax.diffusion.samplers import SamplerInfo
from diffusion_jax.diffusion.samplers.common import Steps, scanned
from diffusion_jax.registry import SAMPLERS, register


@scanned
def straight(denoise, grid, noise):
  """From the first pair of the grid to its last; without noise of its own."""

  def step(x, carry, here, there, index):
    (alpha, sigma), (next_alpha, next_sigma) = here, there
    x0 = denoise(x, alpha, sigma)
    eps = (x - alpha * x0) / sigma
    return next_alpha * x0 + next_sigma * eps, carry, x0

  return Steps(step)


STRAIGHT = SamplerInfo(straight, 1, 1, 'DDIM, once more', 'Song et al. 2021')
register(SAMPLERS, 'straight', f'{__name__}:STRAIGHT')
