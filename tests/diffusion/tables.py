"""Tables of any process."""

import numpy as np

from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.diffusion.processes import tabulate


def sampled(process, steps):
  """The table of a process at times 1/T, 2/T .. 1; `Schedule.process` inverts it."""
  schedule = Schedule(ScheduleConfig(num_train_timesteps=steps))
  schedule.alphas, schedule.sigmas = tabulate(process, np.arange(1, steps + 1) / steps)
  return schedule
