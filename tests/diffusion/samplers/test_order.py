"""Order of convergence in float64, on Gaussian data and on a mixture with two modes.

Errors are against the exact flow, on grids smooth in log-SNR that end at a small noise, with twice
the steps. Multistep methods start with lower orders where x is nearly pure noise and the estimate
nearly constant, so that their own order shows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import infos
from diffusion_jax.diffusion.samplers.multistep import dpmpp_3m_sde, lms, sa_solver, unipc
from diffusion_jax.diffusion.samplers.ode import dpmpp_2s_ancestral
from tests.diffusion.exact_mixture import denoise, geometric, quantile_map

SAMPLERS = infos()

FULL = {'lower_order_final': False}  # On these grids without clean end it would set the order.
FUNCTIONS = {
  name: (info.function, info.order)
  for name, info in SAMPLERS.items() if not info.stochastic and info.calls is not None
} | {
  'unipc': (partial(unipc, **FULL), SAMPLERS['unipc'].order),
  'dpmpp_2s': (partial(dpmpp_2s_ancestral, eta=0.0), 2),
  # As k-diffusion has it, and with the factor 2 that makes it of the third order.
  'dpmpp_3m': (partial(dpmpp_3m_sde, eta=0.0), 2),
  'dpmpp_3m_exact': (partial(dpmpp_3m_sde, eta=0.0, curvature=1.0), 3),
  'lms_3': (partial(lms, order=3), 3),
  'unipc_1': (partial(unipc, order=1, **FULL), 2),
  'unipc_2_bh1': (partial(unipc, order=2, variant='bh1', **FULL), 3),
  'unipc_3': (partial(unipc, order=3, **FULL), 4),
  'sa_solver': (partial(sa_solver, tau=0.0, **FULL), 2),
  'sa_solver_3_3': (partial(sa_solver, tau=0.0, order=3, corrector_order=3, **FULL), 3),
}
X = np.array([[-1.3, -0.9], [0.4, 0.2], [1.1, 1.7]]).reshape(3, 1, 1, 2)


def errors(function, steps, high, low):
  """Largest error of the Gaussian and of the mixture channel."""
  grid = geometric(high, low, steps)
  pairs = [(float(a), float(s)) for a, s in zip(*grid, strict=True)]
  x = X * np.sqrt(0.25 * pairs[0][0] ** 2 + pairs[0][1] ** 2)
  out = jax.jit(lambda x, grid: function(denoise, x, grid, None))(jnp.asarray(x), grid)
  return np.abs(out - quantile_map(x, pairs[0], pairs[-1])).max(axis=(0, 1, 2))


@pytest.mark.parametrize('name', FUNCTIONS)
def test_order_of_convergence(name):
  function, order = FUNCTIONS[name]
  with jax.enable_x64(True):
    coarse, fine = (errors(function, steps, 3000.0, 0.05) for steps in (200, 400))
  gaussian, mixture = np.log2(coarse / fine)
  # Errors of two orders may cancel, and their sum fall faster.
  assert gaussian > order - 0.3 and order - 0.3 < mixture < order + 0.7
