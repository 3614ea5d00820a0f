"""Open a finished run, or one that goes on: its model and weights, to sample and to score."""

import json
import zlib
from collections.abc import Callable, Sequence

import jax

from diffusion_jax.build import added_evaluators, build_task, open_sources
from diffusion_jax.checkpoint.checkpoints import Checkpoints
from diffusion_jax.config import parse
from diffusion_jax.data.splits import measured_on
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import EVALUATE, Evaluator, run_all, scores_of
from diffusion_jax.files import reading
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_params, to_host
from diffusion_jax.parallel.processes import agree, in_step
from diffusion_jax.pipelines.generator import Generator
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.weights import run_weights
from diffusion_jax.sizes import scored_at
from diffusion_jax.train.ema import Combination, Snapshot, combine
from diffusion_jax.train.tasks.task import Env
from diffusion_jax.train.training import stating
from diffusion_jax.types import Params, Scores, Weights


class TrainedRun:
  """A run with a checkpoint, finished or not; UserError: no run, no checkpoint, or unreadable."""

  def __init__(self, workdir: str):
    self.workdir, self.directory = workdir, RunDirectory(workdir)
    values = self.directory.read_json('config.json')
    with reading(
      self.directory.path / 'config.json', 'is not the config of a run', 'restore that file'
    ):
      self.config = parse(values)
    if not self.directory.checkpoints.is_dir():
      raise UserError(f'{workdir} has no checkpoint yet; train longer, or give another workdir.')
    self.sources = open_sources(self.config)
    self.mesh = make_mesh(MeshConfig())
    self.task = build_task(self.config, *self.sources, self.directory.path, self.mesh)
    self._shapes = jax.eval_shape(self.task.initialize, jax.random.key(0))
    self._checkpoints = Checkpoints(self.directory.checkpoints, read_only=True)

  @property
  def model(self) -> Generator:
    """The model; UserError where the run trains something else."""
    if not isinstance(self.task.model, Generator):
      raise UserError(
        f'{self.workdir} trains {self.config.task}; give the workdir of a diffusion run.'
      )
    return self.task.model

  @property
  def autoencoder(self) -> Network:
    """The autoencoder; UserError where the run trains something else."""
    if not hasattr(self.task, 'autoencoder'):
      raise UserError(
        f'{self.workdir} trains {self.config.task}; give the workdir of an autoencoder.'
      )
    return self.task.autoencoder

  @property
  def added_evaluators(self) -> list[Evaluator]:
    """Return what its config adds to the evaluators of its task."""
    env = Env(*self.sources, self.directory.path, self.mesh)
    return added_evaluators(self.config, self.task, env)

  @property
  def sample(self) -> SampleConfig:
    """The settings of sampling while it trains."""
    return self.config.settings.sample

  def steps(self) -> list[int]:
    """Return the steps of its checkpoints, in ascending order."""
    return self._checkpoints.steps()

  def params(self, step: int | None = None, ema_halflife_images: float | None = None) -> Params:
    """The trained parameters on the mesh, averaged.

    step: of a checkpoint; None for the newest intact one. ema_halflife_images: None for the run's
    own average, 0 for none; others are combined from all checkpoints up to that step (`averages`).
    """
    own = self.config.loop.ema_halflife_images
    if step is None and ema_halflife_images in (None, own):
      return run_weights(self.workdir, self._shapes, self.mesh)
    step = self.newest() if step is None else step
    if ema_halflife_images in (None, own, 0):
      return self._read(step, own if ema_halflife_images is None else ema_halflife_images)
    stored, combined = self.averages(step, ema_halflife_images)
    total = None
    for snapshot, factor in zip(stored, combined.factors, strict=True):
      params = self._read(snapshot.step, snapshot.halflife_images)
      total = jax.tree.map(lambda p: factor * p, params) if total is None else (  # noqa: B023
        jax.tree.map(lambda t, p: t + factor * p, total, params)  # noqa: B023
      )
    return total

  def fingerprint(self, step: int, ema_halflife_images: float | None = None) -> str:
    """Return what changes with the checkpoints that `params` reads, if not with their steps."""
    own = self.config.loop.ema_halflife_images
    used = [step] if ema_halflife_images in (None, own, 0) else sorted({
      snapshot.step for snapshot in self.averages(step, ema_halflife_images)[0]
    })
    # One may be deleted just now: all fail alike, or go by what the first process has seen.
    read = lambda: ''.join(map(self._checkpoints.fingerprint, used))
    prints = in_step('reading fingerprints', read, (UserError,))
    return agree('fingerprint', f'{zlib.crc32(prints.encode()):08x}')[0]

  @property
  def settings_fingerprint(self) -> str:
    """A hash of the networks of the run and of its data set."""
    config = self.directory.read_json('config.json')
    used = [config['settings'], config['data']['dataset'], config['data']['size']]
    used += [config['data']['mixture']] if config['data'].get('mixture') else []
    return f'{zlib.crc32(json.dumps(used, sort_keys=True).encode()):08x}'

  def averages(
    self, step: int | None, ema_halflife_images: float
  ) -> tuple[Sequence[Snapshot], Combination]:
    """Return the stored snapshots that make up an average of another length, and their factors."""
    if ema_halflife_images < 0:
      raise UserError(
        f'ema_halflife_images is {ema_halflife_images}; give a number of images, or 0 for none.'
      )
    step, own = self.newest() if step is None else step, self.config.loop.ema_halflife_images
    # Training may delete some meanwhile, and all processes must read the same.
    steps = json.loads(agree('averages', json.dumps(self.steps()))[0])
    stored = [
      Snapshot(s, halflife) for s in steps if s <= step
      for halflife in ({0.0, own} if own else {0.0})
    ]
    wanted = Snapshot(step, ema_halflife_images)
    return stored, combine(wanted, stored, self.config.loop.batch_size)

  def weights(self, step: int | None = None, ema_halflife_images: float | None = None) -> Weights:
    """Return every network's weights on the host; the trained ones are those of `params`."""
    self.model  # noqa: B018
    return self.task.weights(to_host(self.params(step, ema_halflife_images)), self.task.frozen)

  def newest(self) -> int:
    """Return the step of the last intact checkpoint, on all processes. UserError without one."""
    step = json.loads(agree('newest', json.dumps(self._checkpoints.latest()))[0])
    if step is None:
      raise UserError(f'{self.workdir} has no checkpoint yet; train longer first.')
    return step

  def _read(self, step: int, ema_halflife_images: float) -> Params:
    return run_weights(self.workdir, self._shapes, self.mesh, step, bool(ema_halflife_images))


def load_evaluator(workdir: str) -> Callable[[int], Scores]:
  """Return a function of the number of samples that scores a run's last checkpoint."""
  run = TrainedRun(workdir)
  task = run.task
  frozen = {role: put_params(values, run.mesh) for role, values in task.frozen.items()}
  found = [*task.evaluators(run.mesh), *run.added_evaluators]
  scoring = [one for one in found if one.when == EVALUATE]
  about = (measured_on(run.sources[1]).sentence, *scored_at(run.config.data.shapes))
  return lambda samples: stating(scores_of(run_all(
    scoring, task.model, task.weights(run.params(), frozen), jax.random.key(0), samples=samples,
    baselines=True,
  )), run.newest(), about)
