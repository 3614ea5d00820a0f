"""Score-based model of the variance-preserving SDE (Song et al. 2021), by caption, on pixels.

Noise is added in continuous time, dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw with beta from 0.1 to
20 (eq. 32 and 33), of which DDPM is a discretisation. The score, grad_x ln p_t(x), is -eps / sigma:
to match it with the weight sigma^2 (eq. 7) is to predict the noise, which the network does here.

What is learned once is sampled in many ways:
  euler_maruyama        the reverse SDE dx = (f - g^2 score) dt + g dw (eq. 6), step by step
  predictor_corrector   a Langevin step at each noise level before it (algorithm 1)
  probability_flow      the ODE of the same marginals, dx = (f - g^2 score / 2) dt (eq. 13), by
                        adaptive Runge-Kutta; heun and lms (Karras et al. 2022) take fewer calls
Along the ODE the change of density is known: `evaluate likelihood` has the exact one (eq. 39).
`score_subvp` has less noise at every time (eq. 27) and better likelihoods, `score_ve` adds noise
alone, `ncsn` is the method from which these came.
"""

from diffusion_jax.configs.notes import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  settings = config.settings
  settings.schedule = ConfigDict({
    'process': 'linear', 'process_options': {'start': 0.1, 'end': 20.0},
  })
  settings.sample = ConfigDict({'sampler': 'euler_maruyama', 'steps': 50, 'guidance': 2.0})
  config.loop.total_steps = 1000
  return config
