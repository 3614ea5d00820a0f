"""Writes k_diffusion.json: trajectories of k-diffusion's samplers on a mixture of two Gaussians.

  pip install --no-deps --target /tmp/k_diffusion k-diffusion==0.1.1.post1
  python tests/parity/reference/make_k_diffusion.py /tmp/k_diffusion

Needs torch and scipy. k-diffusion itself is not among the test dependencies because of its own;
those that its samplers do not use are replaced by empty modules here.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

WEIGHTS = torch.tensor([[0.5, 0.3], [0.5, 0.7]], dtype=torch.float64)
MEANS = torch.tensor([[0.0, -1.0], [0.0, 0.8]], dtype=torch.float64)
VARIANCES = torch.tensor([[0.25, 0.04], [0.25, 0.09]], dtype=torch.float64)

STEPS = 7
SHAPE = (2, 1, 1, 2)
CHURN = {'s_churn': 2.0, 's_tmin': 0.1, 's_tmax': 5.0, 's_noise': 1.003}
ANCESTRAL = {'eta': 0.7, 's_noise': 1.01}

# name -> (function, options)
RUNS = {
  'euler': ('sample_euler', {}),
  'euler_churn': ('sample_euler', CHURN),
  'euler_ancestral': ('sample_euler_ancestral', {}),
  'euler_ancestral_options': ('sample_euler_ancestral', ANCESTRAL),
  'heun': ('sample_heun', {}),
  'heun_churn': ('sample_heun', CHURN),
  'dpm2': ('sample_dpm_2', {}),
  'dpm2_churn': ('sample_dpm_2', CHURN),
  'dpm2_ancestral': ('sample_dpm_2_ancestral', {}),
  'dpm2_ancestral_options': ('sample_dpm_2_ancestral', ANCESTRAL),
  'lms': ('sample_lms', {}),
  'lms_2': ('sample_lms', {'order': 2}),
  'dpmpp_2s_ancestral': ('sample_dpmpp_2s_ancestral', {}),
  'dpmpp_2s_ancestral_options': ('sample_dpmpp_2s_ancestral', ANCESTRAL),
  'dpmpp_sde': ('sample_dpmpp_sde', {}),
  'dpmpp_sde_options': ('sample_dpmpp_sde', ANCESTRAL),
  'dpmpp_2m': ('sample_dpmpp_2m', {}),
  'dpmpp_2m_sde': ('sample_dpmpp_2m_sde', {}),
  'dpmpp_2m_sde_options': ('sample_dpmpp_2m_sde', {**ANCESTRAL, 'solver_type': 'heun'}),
  'dpmpp_3m_sde': ('sample_dpmpp_3m_sde', {}),
  'dpmpp_3m_sde_options': ('sample_dpmpp_3m_sde', ANCESTRAL),
  'dpm_adaptive_2': ('sample_dpm_adaptive', {'order': 2}),
  'dpm_adaptive_3': ('sample_dpm_adaptive', {'order': 3}),
  'dpm_adaptive_options': (
    'sample_dpm_adaptive',
    {'order': 3, 'rtol': 0.01, 'atol': 0.001, 'pcoeff': 0.2, 'icoeff': 0.6, 'dcoeff': 0.1,
     'eta': 0.5, 's_noise': 1.01},
  ),
}


def load(folder: str):
  """k_diffusion.sampling, without the dependencies of the rest of the package."""
  for name, attribute in (('torchdiffeq', 'odeint'), ('torchsde', None)):
    module = types.ModuleType(name)
    if attribute:
      setattr(module, attribute, None)
    sys.modules[name] = module
  package = types.ModuleType('k_diffusion')
  package.__path__ = [str(Path(folder) / 'k_diffusion')]
  utils = types.ModuleType('k_diffusion.utils')
  utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
  package.utils = utils
  sys.modules.update({'k_diffusion': package, 'k_diffusion.utils': utils})
  return importlib.import_module('k_diffusion.sampling')


def denoise(x, sigma, **_):
  """E[x_0 | x] at alpha = 1, each entry of x [b 1 1 2] by itself."""
  sigma, x = sigma.reshape(-1, 1, 1, 1, 1), x[..., None, :]
  spread = VARIANCES + sigma**2
  logits = WEIGHTS.log() - (x - MEANS) ** 2 / (2 * spread) - spread.log() / 2
  return (logits.softmax(-2) * (MEANS + VARIANCES / spread * (x - MEANS))).sum(-2)


def run(sampling, name: str, sigmas, x, noises) -> dict:
  """States on the way, or the sample alone; noise is taken from `noises` in turn."""
  function, options = RUNS[name]
  states, draws = [], iter(noises)
  extra = dict(options)
  if 's_churn' in options:
    torch.randn_like = lambda x: next(draws)
  elif function not in ('sample_euler', 'sample_heun', 'sample_dpm_2', 'sample_lms',
                        'sample_dpmpp_2m'):
    extra['noise_sampler'] = lambda *_: next(draws)
  keep = lambda info: states.append(info['x'].clone())
  if 'adaptive' in name:
    bounds = float(sigmas[-2]), float(sigmas[0])
    sample, info = getattr(sampling, function)(
      denoise, x, *bounds, disable=True, return_info=True, **extra
    )
    return {'accepted': info['n_accept'], 'sample': sample.flatten().tolist()}
  sample = getattr(sampling, function)(denoise, x, sigmas, callback=keep, disable=True, **extra)
  states = [state.flatten().tolist() for state in [*states[1:], sample]]
  return {'sample': states[-1]} if 's_churn' in options else {'states': states}


def main(folder: str):
  torch.set_default_dtype(torch.float64)
  sampling = load(folder)
  generator = np.random.default_rng(0)
  levels = np.linspace(20.0 ** (1 / 7), 0.03 ** (1 / 7), STEPS) ** 7
  sigmas = torch.tensor(np.append(levels, 0.0))
  x = 20.0 * torch.tensor(generator.standard_normal(SHAPE))
  noises = torch.tensor(generator.standard_normal((40, *SHAPE)))
  plain = torch.randn_like
  runs = {}
  for name in RUNS:
    runs[name] = run(sampling, name, sigmas, x, noises)
    torch.randn_like = plain
  flat = lambda value: [float(entry) for entry in value.flatten()]
  record = {
    'source': 'k-diffusion 0.1.1.post1', 'shape': SHAPE, 'sigmas': flat(sigmas), 'x': flat(x),
    'noises': [flat(noise) for noise in noises],
  }
  lines = [f'"{name}": {json.dumps(run)}' for name, run in runs.items()]
  text = json.dumps(record)[:-1] + ', "runs": {\n' + ',\n'.join(lines) + '\n}}\n'
  Path(__file__).with_name('k_diffusion.json').write_text(text)


if __name__ == '__main__':
  main(sys.argv[1])
