"""Every sampler by name, with what its users want to know; documentation is made from it."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial

from diffusion_jax.diffusion.samplers.adaptive import dpm_adaptive, probability_flow
from diffusion_jax.diffusion.samplers.common import as_arrays
from diffusion_jax.diffusion.samplers.multistep import (
  deis,
  dpmpp_2m,
  dpmpp_2m_sde,
  dpmpp_3m_sde,
  lms,
  pndm,
  sa_solver,
  unipc,
)
from diffusion_jax.diffusion.samplers.ode import (
  ddim,
  ddpm,
  dpm2,
  dpm2_ancestral,
  euler,
  flow_heun,
  heun,
)
from diffusion_jax.diffusion.samplers.sde import (
  annealed_langevin,
  dpmpp_2s_ancestral,
  dpmpp_sde,
  euler_maruyama,
  lcm,
  predictor_corrector,
  restart,
  tcd,
)
from diffusion_jax.errors import UserError

Sampler = Callable
"""sampler(denoise, x, grid, keys, *, trajectory=False, **options) -> x, or a `Trajectory`."""


@dataclasses.dataclass(frozen=True)
class SamplerInfo:
  """One sampler.

  order: by which power of the step the error falls on a smooth grid: that of the sample, or, of
  stochastic samplers, that of the variance of Gaussian data; None where it does not fall to 0.
  Steps that an option counts, those of restart, must grow alike.
  calls: of the network in each step; None where the sampler chooses its steps. more_calls: in the
  first steps, beyond those.
  """

  function: Sampler
  stochastic: bool
  order: int | None
  calls: int | None
  description: str
  citation: str
  more_calls: int = 0


def _ode(function, order, calls, description, citation, more_calls=0) -> SamplerInfo:
  return SamplerInfo(function, False, order, calls, description, citation, more_calls)


def _sde(function, order, calls, description, citation) -> SamplerInfo:
  return SamplerInfo(function, True, order, calls, description, citation)


EDM_CHURN = dict(s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)

SAMPLERS: dict[str, SamplerInfo] = {
  'ddim': _ode(ddim, 1, 1, 'DDIM, eta = 0; eps follows a clipped x_0', 'Song et al. 2021'),
  'ddpm': _sde(
    ddpm, 1, 1, "ancestral, the posterior's variance, or a learned one", 'Ho et al. 2020'
  ),
  'ddpm_large': _sde(
    partial(ddpm, variance='fixed_large'), 1, 1, 'ancestral, variance beta_t', 'Ho et al. 2020'
  ),
  'euler': _ode(euler, 1, 1, 'Euler on the probability-flow ODE', 'Karras et al. 2022'),
  'euler_ancestral': _sde(
    partial(ddim, eta=1.0), 1, 1, 'Euler with fresh noise; DDIM, eta = 1', 'Song et al. 2021'
  ),
  'heun': _ode(heun, 2, 2, 'trapezoidal rule in sigma / alpha', 'Karras et al. 2022'),
  'heun_churn': _sde(
    partial(heun, **EDM_CHURN), 1, 2, 'Heun with noise added and removed', 'Karras et al. 2022'
  ),
  'dpm2': _ode(dpm2, 2, 2, 'midpoint rule, midpoints in log-SNR', 'Lu et al. 2022'),
  'dpm2_ancestral': _sde(dpm2_ancestral, 2, 2, 'dpm2 with fresh noise', 'Lu et al. 2022'),
  'lms': _ode(lms, 4, 1, 'Adams-Bashforth of 4 steps in sigma / alpha', 'k-diffusion'),
  'plms': _ode(
    partial(pndm, runge_kutta=False), 2, 1,
    'pseudo multistep of eps; one call more in the first step', 'Liu et al. 2022', 1,
  ),
  'pndm': _ode(
    pndm, 2, 1, 'pseudo multistep of eps; in three steps four calls, midpoints in log-SNR',
    'Liu et al. 2022', 9,
  ),
  'deis': _ode(deis, 3, 1, 'exponential multistep of eps', 'Zhang & Chen 2023'),
  'dpmpp_2m': _ode(dpmpp_2m, 2, 1, 'DPM-Solver++(2M)', 'Lu et al. 2022'),
  'unipc': _ode(unipc, 3, 1, 'UniPC, predictor of order 2, corrector of order 3',
                'Zhao et al. 2023'),
  'dpmpp_2s_ancestral': _sde(
    dpmpp_2s_ancestral, 2, 2, 'DPM-Solver++(2S) with fresh noise', 'Lu et al. 2022'
  ),
  'dpmpp_sde': _sde(dpmpp_sde, 2, 2, 'DPM-Solver++ for the reverse SDE', 'Lu et al. 2022'),
  'dpmpp_2m_sde': _sde(dpmpp_2m_sde, 2, 1, 'SDE-DPM-Solver++(2M)', 'Lu et al. 2022'),
  'dpmpp_3m_sde': _sde(dpmpp_3m_sde, 2, 1, 'SDE-DPM-Solver++(3M)', 'Lu et al. 2022'),
  'sa_solver': _sde(
    sa_solver, 2, 1, 'stochastic Adams predictor and corrector', 'Xue et al. 2023'
  ),
  'dpm_adaptive': _ode(
    dpm_adaptive, 3, None, 'DPM-Solver-23 with adaptive steps of three calls', 'Lu et al. 2022'
  ),
  'probability_flow': _ode(
    probability_flow, 5, None, 'Dormand-Prince 5(4), adaptive steps of six calls',
    'Song et al. 2021',
  ),
  'euler_maruyama': _sde(euler_maruyama, 1, 1, 'Euler-Maruyama on the reverse SDE',
                         'Song et al. 2021'),
  'predictor_corrector': _sde(
    predictor_corrector, None, 2, 'Euler-Maruyama after a Langevin step', 'Song et al. 2021'
  ),
  'annealed_langevin': _sde(
    annealed_langevin, None, 100, 'Langevin dynamics at each noise level', 'Song & Ermon 2019'
  ),
  'restart': _sde(
    restart, 2, 2, 'Heun that goes back up from sigma / alpha 0.1 to 2 twice', 'Xu et al. 2023'
  ),
  'lcm': _sde(lcm, None, 1, 'multistep consistency, for distilled networks', 'Luo et al. 2023'),
  'tcd': _sde(
    tcd, None, 1, 'trajectory consistency, for distilled networks', 'Zheng et al. 2024'
  ),
  'flow_euler': _ode(ddim, 1, 1, 'Euler in the time of a flow; equals ddim', 'Lipman et al. 2023'),
  'flow_heun': _ode(flow_heun, 2, 2, 'trapezoidal rule in the time of a flow',
                    'Lipman et al. 2023'),
}


def sampler(name: str, **options) -> Sampler:
  """Return the sampler of that name, with its options bound.

  Raises:
    UserError: for a name that is not in the table, or an option that the sampler does not have.
  """
  if name not in SAMPLERS:
    raise UserError(f'sampler {name!r} is unknown; choose one of {", ".join(SAMPLERS)}.')
  function = SAMPLERS[name].function
  known = [
    option.name for option in inspect.signature(function).parameters.values()
    if option.kind is option.KEYWORD_ONLY
  ]
  for option in options:
    if option not in known:
      raise UserError(f'sampler {name!r} has no option {option!r}; choose from {", ".join(known)}.')

  return lambda denoise, x, grid, keys, **more: function(
    denoise, *as_arrays(x, grid), keys, **options, **more
  )
