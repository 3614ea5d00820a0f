"""How near RePaint's passes come to a Gaussian's conditional, which is known.

Two entries have variance 1 and covariance 0.8; one is known to be 1.5. Given it the other has mean
1.2 and variance 0.36. The table of docs/diffusion.md is made of the file.

  python -m benchmarks.resampling
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import run_command
from benchmarks.table import markdown
from diffusion_jax.diffusion.projection import known_places, projected
from diffusion_jax.diffusion.samplers import Grid, initial_noise, sampler
from diffusion_jax.diffusion.samplers.resampling import resampled, stacked, stretches
from diffusion_jax.files import atomic_write

DESCRIPTION = __doc__
FILE = Path(__file__).with_suffix('.json')
COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])
KNOWN, COUNT, LEVELS = 1.5, 4000, (50.0, 0.02)
PASSES, SAMPLERS = (1, 4, 24, 100), ('euler_ancestral', 'ddim')
COARSE, FINE = (40, 5), (160, 20)
"""Steps, and those of a stretch."""


def grid_of(steps: int) -> Grid:
  """Return a grid of the variance-preserving process from the first to the last level, then 0."""
  ratios = np.geomspace(*LEVELS, steps)
  alphas = 1 / np.sqrt(1 + ratios**2)
  return np.append(alphas, 1.0), np.append(ratios * alphas, 0.0)


def denoise(x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """E[x_0 | x] for x [b 2]."""
  noised = alpha**2 * COVARIANCE + sigma**2 * np.eye(2)
  return alpha * x @ jnp.linalg.solve(noised, COVARIANCE)


def measured(name: str, steps: int, jump: int, passes: int) -> dict[str, float]:
  """Return the mean and the variance of the entry that is not known."""
  grid, known = grid_of(steps), jnp.asarray([False, True])
  noise, keys = initial_noise(0, 0, COUNT, (2,))
  x = grid[1][0] * noise + grid[0][0] * KNOWN * known
  cut = stretches(grid, jump, passes)
  blocks = stacked(cut, len(cut), jump)
  held = projected(denoise, known_places(KNOWN * jnp.ones(2), ~known))
  drawn = jax.jit(lambda: resampled(sampler(name), held, x, blocks, keys))()
  free = np.asarray(drawn[:, 0], np.float64)
  return {'mean': round(float(free.mean()), 4), 'variance': round(float(free.var()), 4)}


def table() -> str:
  """Return the table of docs/diffusion.md."""
  found = json.loads(FILE.read_text(encoding='utf-8'))['coarse']
  rows = [
    (f'{what}, `{name}`', *(f'{found[name][str(n)][what]:.2f}' for n in PASSES))
    for name in SAMPLERS for what in ('mean', 'variance')
  ]
  return markdown(('passes', *map(str, PASSES)), rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """There are none."""


def run(args: argparse.Namespace) -> int:
  """Measure, write and print."""
  del args
  found: dict[str, Any] = {
    'command': 'python -m benchmarks.resampling', 'samples': COUNT, 'steps': COARSE, 'fine': FINE,
  }
  with jax.enable_x64(True):
    found['coarse'] = {
      name: {str(n): measured(name, *COARSE, n) for n in PASSES} for name in SAMPLERS
    }
    found['of_fine_steps'] = {name: measured(name, *FINE, PASSES[-1]) for name in SAMPLERS}
  with atomic_write(FILE) as file:
    file.write((json.dumps(found, indent=1) + '\n').encode())
  print(table(), found['of_fine_steps'], sep='\n\n')
  return 0


if __name__ == '__main__':
  raise SystemExit(run_command('benchmarks.resampling', sys.modules[__name__]))
