"""An optimizer from one file outside of the package, by name."""

import json

import numpy as np

from diffusion_jax.run import TrainedRun
from tests import tiny


def test_an_optimizer(outside, trained_with):
  """Every update of every parameter is as large as the learning rate."""
  values = tiny.toy_config(
    optimizer={'name': 'sign_descent', 'learning_rate': 0.25, 'warmup_steps': 0,
               'weight_decay': 0.0},
    loop={'total_steps': 2, 'checkpoint_every_steps': 1, 'ema_halflife_images': 0.0},
  )
  workdir = trained_with(outside('optimizer'), values)
  assert json.loads((workdir / 'config.json').read_text())['optimizer']['name'] == 'sign_descent'
  run = TrainedRun(str(workdir))  # Which has not read the config file.
  first, second = (run.params(step) for step in (1, 2))
  moved = {abs(float(x)) for name in first for x in np.ravel(second[name] - first[name])}
  assert all(min(abs(x - 0.25), abs(x)) < 1e-6 for x in moved) and max(moved) > 0.2
