"""A config to everything that the train loop needs. No task is known here by its name."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import use_deterministic
from diffusion_jax.checkpoint.saving import is_storage_error, reason
from diffusion_jax.config import DECIDING, TrainingConfig, completed, parse, untyped
from diffusion_jax.data.buckets import buckets_in_words
from diffusion_jax.data.loader import LikeLoader, Loader
from diffusion_jax.data.mixture import Mixture
from diffusion_jax.data.splits import APART, fingerprint, measured_on
from diffusion_jax.data.unreadable import Counted, Damage
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import EVALUATE, Evaluator, with_options
from diffusion_jax.evaluation.metrics.metric import best_is
from diffusion_jax.evaluation.report import REFERENCE, TESTED, of_features, of_model
from diffusion_jax.files import say
from diffusion_jax.formats.networks import shapes_only
from diffusion_jax.models.attention import check_attention
from diffusion_jax.models.kernels import check_matmul_precision
from diffusion_jax.parallel.mesh import local_rows, make_mesh
from diffusion_jax.registry import EVALUATORS, TASKS, build_parts, load
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.metrics import check_wandb
from diffusion_jax.runs.trained_on import DataSplit, check_data, split_of, write_data
from diffusion_jax.runs.weights import run_weights
from diffusion_jax.sizes import scored_at
from diffusion_jax.train.optimizer import learning_rates, make_optimizer
from diffusion_jax.train.tasks.task import Env, Task
from diffusion_jax.train.training import Training
from diffusion_jax.types import Source


def open_sources(
  config: TrainingConfig, synthetic: bool = False, damage: Damage | None = None
) -> tuple[Source, Source]:
  """(train, test) that a config names, or random numbers in their place.

  `damage` counts unreadable records; by default they are reported. UserError: missing or unreadable
  data.
  """
  train, test = load(TASKS, config.task).open_sources(config, synthetic)
  if synthetic:
    return train, test
  damage = Damage(_say_unreadable) if damage is None else damage  # Which is false while empty.
  count = partial(Counted, most=config.data.most_unreadable, damage=damage)
  named = (train, 'training records'), (test, 'test records')
  train, test = (
    source.counted(count, name) if isinstance(source, Mixture) else count(source, name=name)
    for source, name in named
  )
  return train, test


def _say_unreadable(sentence: str) -> None:
  say(f'left out: {sentence}', 'diffusion_jax: ')


def build_task(
  config: TrainingConfig, train: Source, test: Source, workdir: Path, mesh: Mesh
) -> Task:
  """Return the task of a config with its frozen networks loaded, large ones onto the mesh."""
  return load(TASKS, config.task).build(config, Env(train, test, workdir, mesh))


def begun_with(config: TrainingConfig, task: Task) -> str:
  """Return the model that a run began with, '' for fresh weights."""
  return f'{config.weights_from}/model' if config.weights_from else task.begins_with


def provenance(
  begun: str, features: Sequence[str], train: DataSplit | None, test: DataSplit | None
) -> tuple[str, ...]:
  """Sentences on the training data of the networks that a run begins with or is scored by.

  begun: the model that it began with, or ''. features: KIND:PATH of those that score.
  """
  found = of_features(features, {REFERENCE: train, TESTED: test})
  return (*found, of_model(begun, begun, {TESTED: test})) if begun else tuple(found)


def _check_batch(config: TrainingConfig, mesh: Mesh) -> None:
  """Raise UserError unless a batch can be split over the devices, and over what is accumulated."""
  ways = mesh.shape['data'] * mesh.shape['fsdp'] * config.loop.accumulation_steps
  if config.loop.batch_size % ways:
    raise UserError(
      f'loop.batch_size {config.loop.batch_size} cannot be split over {ways} parts '
      '(data x fsdp x accumulation_steps); make it a multiple of that.'
    )


def _loader(config: TrainingConfig, task: Task, env: Env, rows: np.ndarray | None) -> Loader:
  """Return the batches of this process; rows: as `Loader` takes them."""
  batch_size = config.loop.batch_size
  source, transforms = task.examples(config, env)
  if jax.process_index() == 0 and hasattr(source, 'buckets'):
    say(buckets_in_words(source, batch_size))
  loader = Loader(
    source, transforms, batch_size=batch_size, rows=rows,
    seed=config.loop.seed, num_threads=config.data.workers,
  )
  if missing := sorted(set(task.batch_fields) - loader.spec().keys()):
    raise UserError(
      f'batches lack {", ".join(missing)}, which task {config.task} needs; add to data.transforms '
      'what makes them, such as choose_caption, tokenize and normalize.'
    )
  return loader


def added_evaluators(config: TrainingConfig, task: Task, env: Env) -> list[Evaluator]:
  """Return the evaluators that a config adds to those of its task."""
  return build_parts(
    EVALUATORS, config.loop.evaluators, 'loop.evaluators', train=env.train, test=env.test,
    mesh=env.mesh, sample=getattr(config.settings, 'sample', None),
    objective=getattr(config.settings, 'objective', None), base=begun_with(config, task),
  )


def _wanted(
  config: TrainingConfig, own: Sequence[Evaluator], added: Sequence[Evaluator]
) -> list[Evaluator]:
  """The evaluators in use, with their networks loaded.

  Without loop.evaluate_samples only those score that the config adds. UserError where loading
  fails, or none gives the metric that checkpoints are kept or the run is ended by.
  """
  loop = config.loop
  if loop.evaluate_seconds and not any(
    hasattr(one, 'seconds') for one in (*own, *added) if one.when == EVALUATE
  ):
    raise UserError(
      'loop.evaluate_seconds limits how long samples are made for scores, and task '
      f'{config.task} makes none; set it to 0 and choose loop.evaluate_samples.'
    )
  if not loop.evaluate_samples:
    own = [one for one in own if one.when != EVALUATE]
  found = [*own, *added]
  scoring = [one for one in found if one.when == EVALUATE]
  deciding = {key: name for key in DECIDING if (name := getattr(loop, key))}
  for key, name in deciding.items():
    if not getattr(loop, f'{key}_is'):
      best_is(name, key)
  sized = {'samples': loop.evaluate_samples} if loop.evaluate_samples else {}
  wanted = [with_options(one, **sized) for one in scoring]
  known = [name for one in wanted for name in getattr(one, 'metrics', ())]
  known = known if all(hasattr(one, 'metrics') for one in wanted) else []
  for key, name in deciding.items():
    if known and name not in known:
      raise UserError(
        f'loop.{key} is {name!r}, which settings.evaluation does not measure; it measures '
        f'{", ".join(known)}.'
      )
  return found


def _check_devices(config: TrainingConfig, mesh: Mesh) -> None:
  """Raise UserError where the devices cannot do what the config asks for."""
  device = mesh.local_devices[0]
  if config.remat == 'offload' and 'pinned_host' not in {
    memory.kind for memory in device.addressable_memories()
  }:
    raise UserError(
      f"config.remat is 'offload', but {device.device_kind} has no pinned memory on the host; set "
      "it to 'block'."
    )
  if config.attention != 'auto':
    check_attention(config.attention, jax.numpy.dtype(config.dtype), mesh=mesh)
  check_matmul_precision(config.products, mesh)


def _credit(sources: Iterable[Source]) -> str:
  """Return whom to thank for the data, once each."""
  found = dict.fromkeys(getattr(source, 'credit', '') for source in sources)
  return '\n\n'.join(filter(None, found))


def _keep(directory: RunDirectory, data: dict[str, Any], task: Task) -> None:
  """Write what a resume needs to know of the data, and what the task has made of them."""
  try:
    write_data(directory, data)
    task.keep(directory.path)
  except Exception as error:
    if not is_storage_error(error):
      raise
    raise UserError(
      f'the workdir {directory.path} cannot be written ({reason(error)}); make room, or choose '
      'another.'
    ) from error


def _beginning(config: TrainingConfig, task: Task, shapes, directory: RunDirectory, mesh: Mesh):
  """Return the function of a mesh that gives the parameters to begin with, None for fresh ones."""
  if not config.weights_from:
    return task.start
  start = partial(run_weights, config.weights_from, shapes)
  if not directory.checkpoints.exists():
    start(mesh)  # So that what is wrong with it is known before a cache is filled.
  return start


def fill_cache(config: dict, workdir: str, kinds: Sequence[str]) -> Path:
  """Encode what the training of a config would have to, into its cache on the disk; its folder.

  workdir: '' where the config has a `settings.cache_dir`. kinds: of `data.cache.KINDS`. UserError:
  any fault of the config, the data or the frozen parts, or a task without a cache.
  """
  values = config.to_dict() if hasattr(config, 'to_dict') else config
  kind = load(TASKS, values.get('task'), 'config.task')
  if not hasattr(kind, 'cached'):
    raise UserError(f'task {values["task"]} has no cache; give a config of another task.')
  config = parse({**values, 'settings': {**values.get('settings', {}), 'cache': 'disk'}})
  if not (config.settings.cache_dir or workdir):
    raise UserError('settings.cache_dir is empty; give --config.settings.cache_dir or --workdir.')
  mesh = make_mesh(config.mesh)
  _check_devices(config, mesh)
  kind.check(config)
  damage = Damage(_say_unreadable)
  env = Env(*open_sources(config, damage=damage), Path(workdir), mesh, damage=damage)
  task = kind.build(config, env)
  task.cached(config, env, kinds)
  return task.cache_folder(env)


def build(
  config: dict, workdir: str, synthetic: bool = False, report: Callable[..., None] | None = None
) -> Training:
  """Everything the train loop needs; nothing is written before all of it has been checked.

  synthetic: random batches in place of the data set, which need not exist. report: takes a state
  and more, for the status file, while that takes long. UserError: any fault of the config, the
  data, the frozen parts or the workdir.
  """
  config = parse(config)
  loop, kind, directory = config.loop, load(TASKS, config.task), RunDirectory(workdir)
  check_wandb(loop.wandb_project)
  directory.check_config(untyped(config), completed)
  use_deterministic(config.deterministic)
  mesh = make_mesh(config.mesh)
  _check_devices(config, mesh)
  kind.check(config)
  damage = Damage(_say_unreadable)
  train, test = open_sources(config, synthetic, damage)
  hashes = {} if synthetic else {'training': fingerprint(train), 'test': fingerprint(test)}
  check_data(directory, hashes)
  trained_on, tested_on = (
    split_of(config.data.name, split, config.data.edge, len(source), hashes[name])
    if hashes.get(name) else None  # Points, or random numbers.
    for split, name, source in (('train', 'training', train), ('test', 'test', test))
  )
  env = Env(train, test, directory.path, mesh, synthetic, damage)
  env = env if report is None else dataclasses.replace(env, report=report)
  task = kind.build(config, env)
  evaluators = _wanted(config, task.evaluators(mesh), added_evaluators(config, task, env))
  if more := task.more_data(config, env):
    hashes |= {name: fingerprint(source) for name, source in more.items()}
    check_data(directory, hashes)
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  start = _beginning(config, task, shapes, directory, mesh)
  platform = mesh.devices.flat[0].platform
  optimizer = make_optimizer(config.optimizer, shapes, loop.total_steps, platform)
  # Last, because filling a cache takes long.
  _check_batch(config, mesh)
  rows = local_rows(mesh, loop.batch_size)
  loader = _loader(config, task, dataclasses.replace(env, more=more), rows)
  measured, begun = measured_on(test), begun_with(config, task)
  features = [name for one in evaluators for name in getattr(one, 'features', ())]
  about = provenance(begun, features, trained_on, tested_on)
  if jax.process_index() == 0:
    _keep(directory, hashes, task)
    for text in getattr(train, 'notes', ()):
      say(text)
    if measured != APART:
      say(f'scores are measured {measured.sentence[0].lower()}{measured.sentence[1:]}')
  return Training(
    config=untyped(config), task=task, loop=loop, safety=config.safety, optimizer=optimizer,
    learning_rates=learning_rates(config.optimizer, loop.total_steps), loader=loader, mesh=mesh,
    directory=directory, start=start, data_credit=_credit([train, *more.values()]),
    mixture=getattr(train, 'mixed', None), measured=measured, damage=damage,
    provenance=(*scored_at(config.data.shapes), *about),
    evaluators=evaluators,
    trained_on=trained_on and dataclasses.replace(trained_on, begun=begun),
  )


def build_shapes(config: dict, devices: Sequence) -> Training:
  """The training of a config on devices that need not be here, for the shapes of its step.

  Nothing is written, no data and no weights are read: batches are random, and frozen parameters,
  in `Task.frozen`, are shapes. UserError: a fault of the config, or of the frozen parts' configs.
  """
  config = parse(config)
  use_deterministic(config.deterministic)
  kind, mesh = load(TASKS, config.task), make_mesh(config.mesh, devices)
  _check_devices(config, mesh)
  kind.check(config)
  _check_batch(config, mesh)
  # One example tells the shapes of all.
  one = dataclasses.replace(
    config, loop=dataclasses.replace(config.loop, batch_size=1, accumulation_steps=1)
  )
  train, test = open_sources(one, synthetic=True)
  env = Env(train, test, Path(), mesh, synthetic=True)
  with shapes_only():
    task = kind.build(config, env)
    env = dataclasses.replace(env, more=task.more_data(config, env))
    loader = LikeLoader(_loader(one, task, env, None), config.loop.batch_size)
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  platform = mesh.devices.flat[0].platform
  return Training(
    config=untyped(config), task=task, loop=config.loop, safety=config.safety,
    optimizer=make_optimizer(config.optimizer, shapes, config.loop.total_steps, platform),
    learning_rates={}, loader=loader, mesh=mesh, directory=RunDirectory(Path()),
    start=lambda mesh: None,
  )
