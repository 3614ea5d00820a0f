"""One start of a run: all that is open while it trains, from the state that it begins with."""

import sys
from typing import Any

import jax

from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import put_params
from diffusion_jax.runs.metrics import MetricsWriter
from diffusion_jax.train.card import parameter_table
from diffusion_jax.train.compile import StepPrograms, step_and_batch
from diffusion_jax.train.health import Compilations, Safety, SideWork
from diffusion_jax.train.hooks import Hooks
from diffusion_jax.train.meter import Goodput, Meter
from diffusion_jax.train.profiling import ProfilerWindow
from diffusion_jax.train.saving import Saver
from diffusion_jax.train.state import TrainState, abstract_state, create_state
from diffusion_jax.train.training import Training

_NAMED = 100
"""Records that could not be read, in the status file."""
_ROWS = 16
"""Parameters that a person at the terminal is shown."""


class Session:
  """Everything is ready for the first step once it is made: restored or fresh, and compiled."""

  def __init__(self, training: Training, safety: Safety, show: bool):
    self.t, self.safety, self.show = training, safety, show
    self.goodput = Goodput()
    self.step = 0
    self.pending: tuple | None = None
    self.undrawn: dict[str, Any] | None = None  # Where the data stood before a step under way.
    self.last: dict[str, Any] = {}
    self.compilations, self.recompilations = Compilations(), None
    self.profiler = ProfilerWindow(
      training.directory.path / 'profile', training.loop.profile_first_step,
      training.loop.profile_steps,
    )
    self.side = SideWork(self._say, training.safety.checkpoint_retry_seconds)
    self.writer: MetricsWriter | None = None
    safety.tell('starting')
    with safety.watchdog.allow(training.safety.compile_timeout_seconds, 'compilation'):
      abstract = abstract_state(
        training.task, training.optimizer, training.loop.ema_halflife_images > 0, training.mesh
      )
      self.saver = Saver(training, self._say)
      self._begin(abstract)
      self.writer = MetricsWriter(
        training.directory, jax.process_index() == 0, wandb_project=training.loop.wandb_project,
        config=training.config,
      )
      self.hooks = Hooks(training, self.writer, self.frozen, self.side)
      self.hooks.describe(self.state, self.goodput.seconds())
      with self.goodput.phase('compile'):
        self._compile(abstract)
    self.goodput.enter('step')

  def _begin(self, abstract: TrainState) -> None:
    """Restore the state, or make a fresh one."""
    found = self.saver.restore(abstract)
    self.resumed = found is not None
    if found is None:
      self.state = create_state(
        self.t.task, self.t.optimizer, bool(abstract.ema), self.t.loop.seed, self.t.mesh,
        self.t.start(self.t.mesh), abstract,
      )
    else:
      self.state = found.state
    before = self.safety.start.status
    self.goodput.goes_on(
      found.goodput if found else None, before.goodput_before(), down=before.seconds_since()
    )
    self.meter = Meter(self.t.loop.batch_size, self.goodput, found.totals if found else {})
    self.step = int(self.state.step)
    if self.step > self.t.loop.total_steps:
      raise UserError(
        f'the run in {self.t.directory.path} has made {self.step} steps, more than '
        f'loop.total_steps {self.t.loop.total_steps}; give at least {self.step}, or choose another '
        'workdir.'
      )
    self.safety.facts = self._facts
    self.frozen = {
      role: put_params(params, self.t.mesh) for role, params in self.t.task.frozen.items()
    }

  def _compile(self, abstract: TrainState) -> None:
    """Compile the step before any time is spent on training, and report what it needs."""
    t = self.t
    self.safety.tell('compiling')
    step, batch = step_and_batch(t, abstract)
    self.update = StepPrograms(step, lambda: self.safety.watchdog.allow(
      t.safety.compile_timeout_seconds, 'compilation'
    ))
    report = self.update.prepare(self.state, self.frozen, batch)
    if jax.process_index() == 0:
      self.side(
        'step.json', lambda: t.directory.write_json('step.json', report.as_json()), keep=True
      )
    if self.show:
      print(parameter_table(abstract.params, _ROWS))
      print('\n'.join(report.lines(t.mesh, t.loop.batch_size)))

  def _facts(self) -> dict[str, Any]:
    """Return how far things are, for the status file."""
    facts = {
      'step': self.step, 'total_steps': self.t.loop.total_steps,
      'seconds': round(self.goodput.seconds(), 1), 'goodput': self.goodput.totals(),
    }
    if self.writer is not None:
      errors = [self.saver.error, *self.writer.errors, *self.side.errors]
      errors = [text for text in errors if text]
      facts |= {'trouble': errors} if errors else {}
    if unreadable := self.t.damage.sentences:
      facts['unreadable'] = {'records': len(unreadable), 'first': unreadable[:_NAMED]}
    return facts

  def _say(self, text: str) -> None:
    print(f'diffusion_jax train: {text}', file=sys.stderr)

  def close(self) -> None:
    """Free files and threads."""
    self.compilations.close()
    self.profiler.close()
    self.writer.close()
    self.saver.close()
