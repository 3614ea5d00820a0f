"""Settings of the train loop, whatever it trains."""

import dataclasses

from diffusion_jax.errors import UserError
from diffusion_jax.seeds import check_seed
from diffusion_jax.train.guard import GuardConfig


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """batch_size is global, over all devices and accumulation_steps. An interval of 0 means never.

  ema_halflife_images: images after which an old weight counts half in the average; 0 for none.
  evaluate_samples: images that are drawn or read for one evaluation; 0 for no scores at all.
  evaluate_seconds: that drawing them may take, 0 for no limit; the first evaluation finds out how
  many samples that allows, and all later ones are of so many (`train.sample_count`).
  Kept are the last keep_checkpoints, those of every keep_every_steps, and the one that evaluates
  best by the figure keep_best ('' for none), the lowest or highest as keep_best_is says.
  profile_first_step, profile_steps: the window that is traced into WORKDIR/profile; a SIGUSR1
  traces as many steps from then on. wandb_project: log to Weights & Biases too; '' for no.
  """

  total_steps: int = 1000
  batch_size: int = 64
  accumulation_steps: int = 1
  seed: int = 0
  ema_halflife_images: float = 0.0
  log_every_steps: int = 20
  checkpoint_every_steps: int = 500
  keep_checkpoints: int = 2
  keep_every_steps: int = 0
  keep_best: str = ''
  keep_best_is: str = 'lowest'
  sample_every_steps: int = 500
  evaluate_every_steps: int = 0
  evaluate_samples: int = 256
  evaluate_seconds: float = 0.0
  profile_first_step: int = 0
  profile_steps: int = 5
  wandb_project: str = ''

  def __post_init__(self):
    check_seed(self.seed, 'loop.seed')
    for name in ('total_steps', 'batch_size', 'accumulation_steps', 'log_every_steps',
                 'keep_checkpoints', 'profile_steps'):
      if getattr(self, name) < 1:
        raise UserError(f'loop.{name} is {getattr(self, name)}; it must be at least 1.')
    if self.evaluate_samples < 0 or (self.evaluate_every_steps and not self.evaluate_samples):
      raise UserError(
        f'loop.evaluate_samples is {self.evaluate_samples}; give a number of samples, or 0 with '
        'evaluate_every_steps 0 for no scores.'
      )
    if self.evaluate_seconds < 0:
      raise UserError(
        f'loop.evaluate_seconds is {self.evaluate_seconds:g}; give seconds, or 0 for no limit.'
      )
    if self.keep_best and not self.evaluate_every_steps:
      raise UserError(
        f'loop.keep_best is {self.keep_best!r}, but nothing is evaluated; set '
        'loop.evaluate_every_steps, or leave keep_best empty.'
      )
    if self.batch_size % self.accumulation_steps:
      raise UserError(
        f'loop.batch_size {self.batch_size} cannot be split into {self.accumulation_steps} equal '
        'parts; change loop.accumulation_steps.'
      )


@dataclasses.dataclass(frozen=True)
class SafetyConfig(GuardConfig):
  """What is done when something goes wrong; seconds, 0 for no limit.

  step_timeout_seconds: without a finished step, or a sign of life of an evaluation or a save, for
  that long, all stacks are written down and the process leaves. compile_timeout_seconds: the same
  for compiling, and for the first step. peer_timeout_seconds: a process that is silent for so long
  is lost, and the others leave. checkpoint_retry_seconds: between a save that failed, such as for
  want of space, and the next try. room_timeout_seconds: that the end of a run waits for its last
  checkpoint and its model to be written, before it leaves without.
  """

  step_timeout_seconds: float = 1800.0
  compile_timeout_seconds: float = 7200.0
  peer_timeout_seconds: float = 60.0
  checkpoint_retry_seconds: float = 60.0
  room_timeout_seconds: float = 86_400.0

  def __post_init__(self):
    super().__post_init__()
    for name in ('step_timeout_seconds', 'compile_timeout_seconds', 'checkpoint_retry_seconds',
                 'room_timeout_seconds'):
      if getattr(self, name) < 0:
        raise UserError(f'safety.{name} is {getattr(self, name)}; give seconds, or 0 for none.')
    if self.peer_timeout_seconds <= 0:
      raise UserError(
        f'safety.peer_timeout_seconds is {self.peer_timeout_seconds}; give a positive number.'
      )
