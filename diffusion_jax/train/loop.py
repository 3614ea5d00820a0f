"""The train loop. There is one; what differs between tasks is in `train/tasks`."""

import dataclasses
import json
import math
import signal
import time
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.data.loader import Loader
from diffusion_jax.errors import UserError
from diffusion_jax.io.checkpoint import Checkpoints
from diffusion_jax.io.metrics_writer import MetricsWriter
from diffusion_jax.io.run_directory import RunDirectory, command_line, versions
from diffusion_jax.parallel.sharding import put_batch, put_params, to_host
from diffusion_jax.train.card import model_card
from diffusion_jax.train.diverged import Diverged
from diffusion_jax.train.meter import Meter
from diffusion_jax.train.state import TrainState, abstract_state, create_state
from diffusion_jax.train.step import make_step
from diffusion_jax.train.stop import StopRequest
from diffusion_jax.train.tasks.task import Task
from diffusion_jax.viz.grids import make_grid, save_png
from diffusion_jax.viz.report import write_report


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """batch_size is global, over all devices and accumulation_steps. An interval of 0 means never.

  ema_halflife_images: images after which an old weight counts half in the average; 0 for none.
  evaluate_samples: images that are drawn or read for one evaluation; 0 for no scores at all.
  wandb_project: log to Weights & Biases too, in the project of this name.
  """

  total_steps: int = 1000
  batch_size: int = 64
  accumulation_steps: int = 1
  seed: int = 0
  ema_halflife_images: float = 0.0
  log_every_steps: int = 20
  checkpoint_every_steps: int = 500
  keep_checkpoints: int = 2
  sample_every_steps: int = 500
  evaluate_every_steps: int = 0
  evaluate_samples: int = 256
  wandb_project: str = ''

  def __post_init__(self):
    for name in ('total_steps', 'batch_size', 'accumulation_steps', 'log_every_steps',
                 'keep_checkpoints'):
      if getattr(self, name) < 1:
        raise UserError(f'loop.{name} is {getattr(self, name)}; it must be at least 1.')
    if self.evaluate_samples < 0 or (self.evaluate_every_steps and not self.evaluate_samples):
      raise UserError(
        f'loop.evaluate_samples is {self.evaluate_samples}; give a number of samples, or 0 with '
        'evaluate_every_steps 0 for no scores.'
      )
    if self.batch_size % self.accumulation_steps:
      raise UserError(
        f'loop.batch_size {self.batch_size} cannot be split into {self.accumulation_steps} equal '
        'parts; change loop.accumulation_steps.'
      )


@dataclasses.dataclass(frozen=True)
class Training:
  """Everything the loop needs, built and checked."""

  config: dict[str, Any]
  task: Task
  loop: LoopConfig
  optimizer: optax.GradientTransformation
  learning_rates: dict[str, optax.Schedule]
  loader: Loader
  mesh: Mesh
  directory: RunDirectory
  data_credit: str = ''


def train(training: Training, progress: bool = True) -> int:
  """Trains to the last step, or goes on from the last checkpoint in the workdir.

  Returns:
    0 when finished; 128 + the signal's number when stopped by one, after saving.

  Raises:
    UserError: the workdir belongs to another config, or its checkpoint cannot be read.
    Diverged: the loss became NaN or infinite; the last checkpoint is from before.
  """
  training.directory.check_config(training.config)
  with StopRequest() as stop:
    session = _Session(training, stop, progress and jax.process_index() == 0)
    try:
      return session.run()
    except BaseException as error:
      if not isinstance(error, UserError):
        session.status('failed', message=f'{type(error).__name__}: {error}'[:500])
      raise
    finally:
      session.close()


class _Session:
  """One start of a run: from the state it begins with to the state it leaves."""

  def __init__(self, training: Training, stop: StopRequest, show: bool):
    self.t, self.stop, self.show = training, stop, show
    self.main = jax.process_index() == 0
    self.started = time.time()
    self.previous_seconds = 0.0
    loop = training.loop
    use_ema = loop.ema_halflife_images > 0
    abstract = abstract_state(training.task, training.optimizer, use_ema, training.mesh)
    fresh = not training.directory.checkpoints.exists()
    self.checkpoints = Checkpoints(training.directory.checkpoints, loop.keep_checkpoints)
    step = self.checkpoints.latest()
    totals = {}
    if step is None:
      self.state = create_state(
        training.task, training.optimizer, use_ema, loop.seed, training.mesh
      )
    else:
      self.state, totals = self._restore(step, abstract)
    self.step = int(self.state.step)
    self.resumed = not fresh and step is not None
    self.frozen = {
      role: put_params(params, training.mesh) for role, params in training.task.frozen.items()
    }
    self.meter = Meter(loop.batch_size, totals)
    self.pending: tuple | None = None
    self.last: dict[str, Any] = {}
    self._describe()
    self.writer = MetricsWriter(
      training.directory, self.main, wandb_project=loop.wandb_project, config=training.config
    )
    self.update = make_step(
      training.task, training.optimizer, batch_size=loop.batch_size, mesh=training.mesh,
      ema_halflife_images=loop.ema_halflife_images, accumulation=loop.accumulation_steps,
      shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )

  def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
    parts, extra = self.checkpoints.restore(step, _as_parts(abstract))
    self.t.loader.set_state(extra['loader'])
    self.previous_seconds = extra['seconds']
    totals = {
      name: tuple(np.asarray(part, np.float32) for part in pair)
      for name, pair in extra['totals'].items()
    }
    state = TrainState(
      step=parts['rest']['step'], key=parts['rest']['key'], params=parts['params'],
      opt_state=parts['opt_state'], ema=parts['ema'], memory=parts['rest']['memory'],
    )
    return state, totals

  def _describe(self) -> None:
    """Writes what the run is before anything can go wrong in it."""
    if self.main:
      directory = self.t.directory
      directory.write_json('config.json', self.t.config)
      directory.write_json('versions.json', versions())
      directory.write_text('README.md', self._card({}))
    self.status('training')

  def _card(self, scores: dict) -> str:
    return model_card(
      self.t.config, parameters=sum(p.size for p in jax.tree.leaves(self.state.params)),
      steps=int(self.step), seconds=self.seconds(), command=command_line(), scores=scores,
      credit=self.t.data_credit,
    )

  def seconds(self) -> float:
    """Seconds spent on this run, over all of its starts."""
    return self.previous_seconds + time.time() - self.started

  def status(self, state: str, **more: Any) -> None:
    """Writes status.json, from which launchers and reports tell how things stand."""
    if self.main and self.t.directory.path.exists():
      self.t.directory.write_json('status.json', {
        'state': state, 'step': getattr(self, 'step', 0), 'total_steps': self.t.loop.total_steps,
        'seconds': round(self.seconds(), 1), **more,
      })

  def run(self) -> int:
    """Steps until the end or a signal."""
    loop = self.t.loop
    if self.resumed and self.show:
      print(f'going on from step {self.step} in {self.t.directory.path}')
    bar = tqdm(
      total=loop.total_steps * loop.batch_size, initial=self.step * loop.batch_size, unit='img',
      disable=not self.show, desc=f'training {self.t.task.name}', dynamic_ncols=True,
    )
    with bar:
      while self.step < loop.total_steps:
        if self.stop.agreed():
          return self._leave(bar)
        self._one_step()
        bar.update(loop.batch_size)
        bar.set_postfix(self.last, refresh=False)
        self._pauses(bar)
    return self._finish()

  def _one_step(self) -> None:
    with self.meter.waiting():
      batch = next(self.t.loader)
    fields = {name: batch[name] for name in self.t.task.batch_fields}
    self.state, metrics = self.update(self.state, self.frozen, put_batch(fields, self.t.mesh))
    self._log()  # What the step before closed: the device is busy again by now.
    self.meter.add(metrics)
    self.step += 1
    if self._due(self.t.loop.log_every_steps):
      self.pending = (self.step, *self.meter.close_window())

  def _log(self) -> None:
    """Writes the closed window, if there is one."""
    if self.pending is None:
      return
    step, totals, speed = self.pending
    self.pending = None
    values = self.meter.read(totals)
    rates = {name: float(rate(step - 1)) for name, rate in self.t.learning_rates.items()}
    self.writer.write('train', step, {'time': self.seconds(), **values, **rates, **speed})
    self.last = {'loss': f'{values["loss"]:.4f}', 'step': step}
    self._check_finite(step, values)

  def _check_finite(self, step: int, values: dict[str, Any]) -> None:
    if not math.isfinite(values['loss']) or not math.isfinite(values['gradient_norm']):
      raise Diverged(
        f'the loss is not finite at step {step}; the last checkpoint is from step '
        f'{self.checkpoints.latest()}. Lower optimizer.learning_rate or set optimizer.clip_norm.'
      )

  def _due(self, every: int) -> bool:
    return every > 0 and self.step % every == 0 and self.step < self.t.loop.total_steps + 1

  def _pauses(self, bar) -> None:
    """What interrupts training now and then; the last step is left to `_finish`."""
    loop = self.t.loop
    if self.step == loop.total_steps:
      return
    with self.meter.paused():
      if self._due(loop.checkpoint_every_steps):
        self._save()
      if self._due(loop.sample_every_steps):
        self._preview()
      if self._due(loop.evaluate_every_steps):
        self._evaluate(final=False)
      if self._due(loop.sample_every_steps) or self._due(loop.evaluate_every_steps):
        self._report()
        bar.refresh()

  def _save(self) -> None:
    self._log()
    if self.meter.totals:  # So that a state after a loss that is not finite is never saved.
      self._check_finite(self.step, self.meter.read(self.meter.totals))
    extra = {
      'loader': self.t.loader.get_state(),
      'totals': {
        name: [part.tolist() for part in pair] for name, pair in to_host(self.meter.totals).items()
      },
      'seconds': self.seconds(),
    }
    self.checkpoints.save(self.step, _as_parts(self.state), extra)
    self.status('training')

  def _preview(self) -> None:
    images, captions = self.t.task.preview(self.state.eval_params, self.frozen, self.t.mesh)
    if not self.main:
      return
    columns = min(8, math.ceil(math.sqrt(len(images))))
    scale = max(1, 128 // images.shape[1])
    grid = make_grid(images, columns=columns, captions=captions, scale=scale)
    save_png(
      grid, self.t.directory.samples / f'step_{self.step:08d}.png',
      {'step': str(self.step), 'captions': json.dumps(captions)},
    )
    self.writer.image('samples', self.step, np.asarray(grid.convert('RGB')))

  def _evaluate(self, final: bool) -> dict:
    scores = self.t.task.evaluate(
      self.state.eval_params, self.frozen, self.t.mesh, samples=self.t.loop.evaluate_samples,
      final=final,
    )
    own = next(iter(scores.values()))
    self.writer.write('evaluation', self.step, own)
    return scores

  def _report(self) -> None:
    if self.main:
      self.writer.flush()
      write_report(self.t.directory.path)

  def _leave(self, bar) -> int:
    self._save()
    self.checkpoints.wait()
    number = self.stop.signal or signal.SIGTERM
    self.status('interrupted', message=f'stopped by {signal.Signals(number).name}')
    self._report()
    bar.close()
    if self.show:
      print(
        f'saved step {self.step} of {self.t.loop.total_steps} in {self.t.directory.path}; '
        f'to go on, run again: {command_line()}'
      )
    return 128 + number

  def _finish(self) -> int:
    """Scores, draws and exports the last state. Runs again if it was cut off."""
    directory = self.t.directory
    self._log()
    self._save()
    self._preview()
    scores = self._evaluate(final=True) if self.t.loop.evaluate_samples else {}
    params = to_host(self.state.eval_params)
    if self.main:
      directory.write_json('scores.json', scores)
      self.t.task.export(directory.model, params, scores)
      directory.write_text('README.md', self._card(scores))
      directory.write_text('model/README.md', self._card(scores))
    self.checkpoints.wait()
    self.status('finished')
    self._report()
    if self.show:
      print(f'finished: see {directory.path / "report.html"}; the model is in {directory.model}')
    return 0

  def close(self) -> None:
    """Frees files and threads."""
    self.writer.close()
    self.checkpoints.close()


def _as_parts(state: TrainState) -> dict[str, Any]:
  return {
    'params': state.params, 'opt_state': state.opt_state, 'ema': state.ema,
    'rest': {'step': state.step, 'key': state.key, 'memory': state.memory},
  }


