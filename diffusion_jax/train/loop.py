"""The train loop. There is one; what differs between tasks is in `train/tasks`."""

import contextlib
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from tqdm import tqdm

from diffusion_jax.backend.xla import block_on_cpu
from diffusion_jax.checkpoint.saving import may_pass
from diffusion_jax.errors import Diverged, UserError
from diffusion_jax.files import first_line, say
from diffusion_jax.parallel.mesh import put_batch, put_params, to_host
from diffusion_jax.parallel.processes import A_DAY, agree
from diffusion_jax.runs.directory import command_line
from diffusion_jax.runs.metrics import MetricsWriter
from diffusion_jax.runs.run_card import window_digests
from diffusion_jax.runs.start import Start
from diffusion_jax.train.card import parameter_table
from diffusion_jax.train.compile import (
  MEGABYTE,
  StepPrograms,
  batch_of,
  reports_as_json,
  step_and_batch,
)
from diffusion_jax.train.health import (
  TRY_AGAIN,
  BestEffort,
  Compilations,
  Safety,
  Stopping,
  resources,
)
from diffusion_jax.train.hooks import Hooks, due
from diffusion_jax.train.meter import Goodput, Meter
from diffusion_jax.train.profiling import ProfilerWindow
from diffusion_jax.train.saving import Saver, rescue, wait_for_room
from diffusion_jax.train.state import TrainState, abstract_state, initializer
from diffusion_jax.train.training import Training

_NAMED = 100
"""Records that could not be read, in the status file."""
_ROWS = 16
"""Parameters that a person at the terminal is shown."""


def train(training: Training, progress: bool = True, start: Start | None = None) -> int:
  """Train to the last step, or resume from the workdir's last checkpoint; return the exit code.

  0 when finished; 128 + the signal's number when stopped by one, after saving; 75 when the last
  checkpoint or model had no room, 1 for another reason.

  UserError: all checkpoints are damaged, or of another model or of more steps; or another run is in
  the workdir. Diverged: too many steps in a row were not finite; parameters are from before them.
  After other errors the state is saved first. One of several processes that fails, or sees another
  gone, leaves with exit code 1 or 75; status.json has the reason. start: the workdir, if taken
  already.
  """
  with contextlib.ExitStack() as stack:
    if start is None:
      start = stack.enter_context(Start(training.directory.path))
    start.join()
    safety = Safety(start, training.safety)
    stack.enter_context(safety.watching())
    stack.enter_context(jax.set_mesh(training.mesh))
    show = progress and jax.process_index() == 0
    return stack.enter_context(_Loop(training, safety, show)).run()


class _Loop:
  """One start of a run: once made, everything is restored or fresh, open, and compiled."""

  def __init__(self, training: Training, safety: Safety, show: bool):
    self.t, self.safety, self.show, loop = training, safety, show, training.loop
    self.step, self.goodput = 0, Goodput()
    self.pending: tuple | None = None  # A window of metrics that is closed and not written yet.
    self.data_before: dict[str, Any] | None = None  # Where the data stood before a step under way.
    self.last: dict[str, Any] = {}
    self.ended = ''  # Why the run ends before its last step.
    self.compilations, self.recompilations = Compilations(), 0
    self.profiler = ProfilerWindow(
      training.directory.path / 'profile', loop.profile_first_step, loop.profile_steps
    )
    self.side = BestEffort(say, training.safety.checkpoint_retry_seconds)
    safety.report('starting')
    with self._compiling():
      abstract = abstract_state(
        training.task, training.optimizer, loop.ema_halflife_images > 0, training.mesh
      )
      self.saver = Saver(training, say)
      self._begin(abstract)
      self.writer = MetricsWriter(
        training.directory, jax.process_index() == 0, wandb_project=loop.wandb_project,
        config=training.config,
      )
      safety.facts = self._facts
      self.hooks = Hooks(training, self.writer, self.frozen, self.side)
      self.hooks.describe(self.state, self.goodput.seconds())
      with self.goodput.phase('compile'):
        self._compile(abstract)
    self.goodput.enter('step')

  @contextlib.contextmanager
  def _compiling(self) -> Iterator[None]:
    seconds = self.t.safety.compile_timeout_seconds
    with self.safety.watchdog.allow(seconds, 'compilation'):
      yield

  @contextlib.contextmanager
  def _waiting(self) -> Iterator[None]:
    """Within, a program is compiled that the next step needs."""
    with self._compiling(), self.goodput.phase('compile'):
      yield

  def _meet(self) -> None:
    """Wait until all processes have the next step's program: a collective would not for so long."""
    if jax.process_count() > 1:
      with self._waiting():
        agree('compiled', '', self.t.safety.compile_timeout_seconds or A_DAY)

  def _begin(self, abstract: TrainState) -> None:
    """Restore the state, or make a fresh one."""
    t, found, before = self.t, self.saver.restore_run(abstract), self.safety.start.status
    self.resumed = found is not None
    self.state = found.state if found else initializer(
      t.task, t.optimizer, t.loop.seed, abstract
    )(t.start(t.mesh))
    self.goodput.resume(
      found.goodput if found else None, before.goodput_before(), down=before.seconds_since()
    )
    self.meter = Meter(t.loop.batch_size, self.goodput, found.totals if found else {})
    self.step = int(self.state.step)
    if self.step > t.loop.total_steps:
      raise UserError(
        f'the run in {t.directory.path} has made {self.step} steps, more than loop.total_steps '
        f'{t.loop.total_steps}; give at least {self.step}, or choose another workdir.'
      )
    self.frozen = {role: put_params(params, t.mesh) for role, params in t.task.frozen.items()}

  def _compile(self, abstract: TrainState) -> None:
    """Compile the step before any time is spent on training, and report what it needs."""
    t = self.t
    self.safety.report('compiling')
    step, batch = step_and_batch(t, abstract)
    self.update = StepPrograms(step, self._waiting, self._meet)
    self.programs = self.reported = 0
    report = self.update.prepare(self.state, self.frozen, batch)
    self._report_programs()
    if self.show:
      print(parameter_table(abstract.params, _ROWS))
      print('\n'.join(report.lines(t.mesh, t.loop.batch_size)))

  def _compile_ahead(self) -> None:
    """Compile the step for the other sizes of pictures that will come, while training goes on."""
    others = self.t.loader.buckets_until(self.t.loop.total_steps)[1:]
    if not others:
      return
    self.programs = len(others) + 1
    if self.show:
      print(
        f'the step is compiled for each of {len(others) + 1} sizes: for the first before training, '
        'for the others meanwhile'
      )
    self.update.prepare_ahead(
      self.state, self.frozen, [partial(batch_of, self.t, bucket) for bucket in others]
    )

  def _report_programs(self) -> None:
    """Write what the programs need that have been compiled since; say so of the last of several."""
    found, before = list(self.update.reports), self.reported
    if len(found) == before or jax.process_index():
      return
    self.reported = len(found)
    write = partial(self.t.directory.write_json, 'step.json', reports_as_json(found))
    self.side('step.json', write, keep=True)
    if 1 < len(found) == self.programs and self.show:
      most = max(found, key=lambda report: report.bytes)
      self.bar.write(
        f'the step is compiled for all {len(found)} sizes; {most.size} needs the most memory, '
        f'{most.bytes / MEGABYTE:,.1f} MB of each device'
      )

  def _facts(self) -> dict[str, Any]:
    """Return how far things are, for the status file."""
    facts = {
      'step': self.step, 'total_steps': self.t.loop.total_steps,
      'seconds': round(self.goodput.seconds(), 1), 'goodput': self.goodput.totals(),
    }
    errors = [text for text in (self.saver.error, *self.writer.errors, *self.side.errors) if text]
    facts |= {'trouble': errors} if errors else {}
    if unreadable := self.t.damage.sentences:
      facts['unreadable'] = {
        'records': len(unreadable), 'causes': self.t.damage.causes, 'first': unreadable[:_NAMED],
      }
    return facts

  def __enter__(self) -> '_Loop':
    return self

  def __exit__(self, kind, error, traceback) -> None:
    """Free files and threads; what ends a run is said before a compilation is over."""
    with self.safety.watchdog.allow(0, 'compilation'):
      self.update.close(wait=kind is None)
    self.compilations.close()
    self.profiler.close()
    self.writer.close()
    self.saver.close()

  def run(self) -> int:
    """Make steps until the end or a signal."""
    loop = self.t.loop
    if self.resumed and self.show:
      print(f'going on from step {self.step} in {self.t.directory.path}')
    self.bar = tqdm(
      total=loop.total_steps * loop.batch_size, initial=self.step * loop.batch_size, unit='img',
      disable=not self.show, desc=f'training {self.t.task.name}', dynamic_ncols=True,
    )
    with self.bar:
      try:
        self.safety.training = True
        if self.resumed:
          preview, evaluate = self.hooks.missing(self.step)
          self._run_hooks(preview, evaluate or self.saver.lacks_score(self.step))
          self.ended = self.saver.ends_at(self.step)
        self.safety.stop.barrier()  # Compiling may have taken long.
        self._compile_ahead()
        self.safety.report('training')
        while self.step < loop.total_steps and not self.ended:
          self.safety.check()
          # The first line compiles small things of its own.
          before, counts = self.compilations.count, bool(self.last)
          self._one_step()
          self.recompilations += counts * (self.compilations.count - before)
          self.bar.update(loop.batch_size)
          self.bar.set_postfix(self.last, refresh=False)
          self._pauses()
        return self._finish()
      except Stopping:
        return self._leave()
      except Exception as error:
        self._rescue(error)
        raise

  def _one_step(self) -> None:
    self.profiler.before(self.step)
    with self.goodput.phase('data'):
      self.data_before = self.t.loader.get_state()
      batch = next(self.t.loader)
    fields = {name: batch[name] for name in self.t.task.batch_fields}
    self.state, metrics = self.update(self.state, self.frozen, put_batch(fields, self.t.mesh))
    block_on_cpu(metrics)
    # First of all what belongs to the step, so that state and counts agree whatever fails below.
    self.meter.add(metrics)
    self.step, self.data_before = self.step + 1, None
    ends, closed = self.step % self.t.loop.log_every_steps == 0, self.pending
    self.pending = (self.step, *self.meter.close_window()) if ends else None
    if closed:
      self._write(*closed)  # What the step before closed: a chip is busy again by now.

  def _log(self) -> None:
    """Write the window that the last step has closed, if it has."""
    closed, self.pending = self.pending, None
    if closed:
      self._write(*closed)

  def _write(self, step: int, totals: dict, speed: dict[str, float]) -> None:
    """Write a line of metrics. Diverged where they say that the run has been given up."""
    self._report_programs()
    self.hooks.digest(step, window_digests(jax.device_get(totals)))
    values = self.meter.read(totals)
    given_up = values.pop('given_up')
    rates = {name: float(rate(step - 1)) for name, rate in self.t.learning_rates.items()}
    self.writer.write('train', step, {
      'time': self.goodput.seconds(), **values, **rates, **speed, **resources(),
      'recompilations': self.recompilations, 'unreadable': len(self.t.damage),
    })
    self.last = {'loss': f'{values["loss"]:.4f}', 'step': step}
    self.safety.report('training', now=False)
    if given_up:
      self.writer.flush()
      self.saver.wait()  # So that the last checkpoint can be named.
      raise Diverged(
        f'{self.t.safety.max_skipped_in_a_row} steps in a row up to step {step} had a loss or '
        'gradient that is not finite or a spike, and were skipped; the last checkpoint, from '
        f'before, is of step {self.saver.latest()}. Lower optimizer.learning_rate or set '
        'optimizer.clip_norm.'
      )

  def _pauses(self) -> None:
    """Save, sample and score where it is due; the last step is left to `_finish`."""
    loop = self.t.loop
    if due(self.step, loop.checkpoint_every_steps, loop) or self.saver.retry_is_due(self.step):
      self._save()
    self._run_hooks(
      due(self.step, loop.sample_every_steps, loop), due(self.step, loop.evaluate_every_steps, loop)
    )
    self.side.again()

  def _run_hooks(self, preview: bool, evaluate: bool) -> None:
    """Sample and score, and bring the report up to date."""
    if not preview and not evaluate:
      return
    with self.goodput.phase('evaluation'):
      if preview:
        self.safety.report('sampling')
        self.hooks.preview(self.state, self.step)
      if evaluate:
        self.safety.report('evaluating')
        self._evaluate()
      self.hooks.report()
      self.bar.refresh()
    self.safety.stop.barrier()
    self.safety.report('training')

  def _evaluate(self, final: bool = False) -> dict:
    """Return the scores; those that can be compared decide which checkpoints stay."""
    scores, comparable = self.hooks.evaluate(self.state, self.step, final=final)
    if comparable:
      self.saver.scores(self.step, comparable)
    if not final:
      self.ended = self.saver.ends_at(self.step)
    return scores

  def _save(self) -> None:
    self._log()
    if self.meter.totals and self.meter.read(self.meter.totals)['given_up']:
      # Nothing new to keep: the run ends here, with the last metrics written.
      self.pending = (self.step, *self.meter.close_window())
      self._log()
    with self.goodput.phase('checkpoint'):
      self.saver.save_run(self.step, self.state, self.meter.totals, self.goodput.totals())
      self.hooks.digest_params(self.state, self.step)
    self.safety.report('training')

  def _rescue(self, error: Exception) -> None:
    """Save before an error ends the run, unless the state itself is what is wrong."""
    if isinstance(error, Diverged):
      return
    try:
      self._log()
    except Diverged:
      return
    except Exception as other:  # What has failed may be this.
      say(f'a line of metrics is lost ({first_line(other)})')
    with self.safety.watchdog.allow(0, 'checkpoint'):
      saved = rescue(
        self.saver, self.state, self.meter.totals, self.goodput.totals(),
        self.t.safety.max_skipped_in_a_row, self.data_before,
      )
    self.safety.note = f'; {saved}'
    say(f'an error ends the run: {saved}')

  def _leave(self) -> int:
    self._save()
    with self.safety.watchdog.allow(0, 'checkpoint'):
      self.saver.wait()
    number = self.safety.stop.signal or signal.SIGTERM
    self.bar.close()
    saved, error = self.saver.latest(), self.saver.error
    self.safety.report('interrupted', message=(
      f'stopped by {signal.Signals(number).name}, saved step {saved}'
      f'{f"; {error}" if error else ""}'
    ))
    self.hooks.report(last=True)
    if jax.process_index() == 0:
      print(
        f'saved step {saved} of {self.t.loop.total_steps} in {self.t.directory.path}; '
        f'to go on, run again: {command_line()}'
      )
    return 128 + number

  def _finish(self) -> int:
    """Sample, score and export the last state; done again if it was cut off."""
    if self.ended and self.show:
      self.bar.write(self.ended)
    self._report_programs()
    self._save()
    self.safety.report('finishing')
    with self.goodput.phase('evaluation'):
      self.hooks.preview(self.state, self.step)
      scores = self._evaluate(final=True) if self.hooks.scoring else {}
    params = to_host(self.state.eval_params)
    missing = wait_for_room(
      self.safety, self.saver, save=self._save, say=say,
      export=lambda: self.hooks.finish(self.state, self.goodput.seconds(), scores, params),
    )
    self.side.again(now=True)
    if missing:
      self.safety.report('unsaved', message=missing, retry=may_pass(missing))
      say(f'the run has not finished: {missing}')
    else:
      said = filter(None, (self.ended, *self.side.errors))
      self.safety.report('finished', message='; '.join(said))
    self.hooks.report(last=True)
    if missing:
      return TRY_AGAIN if may_pass(missing) else 1
    if jax.process_index() == 0:
      directory = self.t.directory
      print(f'finished: see {directory.path / "report.html"}; the model is in {directory.model}')
    return 0
