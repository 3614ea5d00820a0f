"""Configuration to objects."""

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax.checkpoint.saving import of_storage, reason
from diffusion_jax.data.cache import ChooseText, cached_source, synthetic_cache
from diffusion_jax.data.loader import Loader, Source
from diffusion_jax.data.sources import open_data, without_effect
from diffusion_jax.data.sources.folder import FOLDER, Together, open_labelled
from diffusion_jax.data.splits import APART, fingerprint, measured_on
from diffusion_jax.data.transforms import Label, build_transforms
from diffusion_jax.data.unreadable import Counted, Damage, readable
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import EVALUATE, Evaluator
from diffusion_jax.evaluation.generated import check_samples
from diffusion_jax.evaluation.report import REFERENCE, TESTED, of_features, of_model
from diffusion_jax.io.trained import run_weights
from diffusion_jax.models.attention import check_attention
from diffusion_jax.models.kernels import check_matmul_precision
from diffusion_jax.models.text.tokenizer import (
  Tokenize,
  load_tokenizer,
  save_tokenizer,
  train_tokenizer,
)
from diffusion_jax.parallel.mesh import local_rows, make_mesh
from diffusion_jax.pipelines.directory import assemble
from diffusion_jax.recipe import DTYPES, LATENT, TrainingConfig, completed, parse, resolved
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.metrics import check_wandb
from diffusion_jax.runs.trained_on import Pictures, check_data, pictures_of, write_data
from diffusion_jax.sizes import check_sizes
from diffusion_jax.train.optimizer import learning_rates, make_optimizer
from diffusion_jax.train.tasks.autoencoder import AutoencoderTask
from diffusion_jax.train.tasks.classifier import ClassifierTask, with_classes
from diffusion_jax.train.tasks.clip import CLIPTask, CLIPTaskConfig
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from diffusion_jax.train.tasks.finetune import make_finetune_task
from diffusion_jax.train.tasks.prior_preservation import draw_prior
from diffusion_jax.train.tasks.task import Task
from diffusion_jax.train.tasks.toy import ToyTask
from diffusion_jax.train.training import Training

SYNTHETIC_RECORDS = 64
"""At least; a batch needs as many as it has examples."""


def open_sources(
  config: TrainingConfig, synthetic: bool = False, damage: Damage | None = None
) -> tuple[Source, Source]:
  """(train, test) that a config names, or random numbers in their place.

  `damage` counts the records that cannot be read; by default they are said.

  Raises:
    UserError: they are not there, or cannot be read.
  """
  train, test = _sources(config, synthetic)
  if synthetic or config.task == 'toy':
    return train, test
  damage = Damage(_say_unreadable) if damage is None else damage
  most = config.data.most_unreadable
  return (
    Counted(train, most, damage, 'training records'), Counted(test, most, damage, 'test records')
  )


def _say_unreadable(sentence: str) -> None:
  print(f'diffusion_jax: left out: {sentence}', file=sys.stderr, flush=True)


def _sources(config: TrainingConfig, synthetic: bool) -> tuple[Source, Source]:
  data = config.data
  if config.task == 'toy':  # Points are random numbers anyway.
    if data.transforms:
      raise UserError('data.transforms have no effect on points; empty them.')
    return open_data(data)
  if data.dataset.startswith(FOLDER) and config.task == 'classifier' and not synthetic:
    without_effect(data, 'a classifier', 'caption', 'caption_column')
    return open_labelled(data.dataset, data.size, data.test_fraction)
  return open_data(data, max(config.loop.batch_size, SYNTHETIC_RECORDS) if synthetic else 0)


def pictures_in(
  config: TrainingConfig, train: Source, test: Source, prints: dict[str, dict[str, str]]
) -> tuple[Pictures | None, Pictures | None]:
  """What a run is trained and what it is tested on; None for points and random numbers.

  `prints` are the fingerprints of both, as in data.json.
  """
  data = config.data
  return tuple(
    pictures_of(data.dataset, split, data.size, len(source), prints[name])
    if prints.get(name) else None
    for split, name, source in (('train', 'training', train), ('test', 'test', test))
  )


def told_of(
  config: TrainingConfig, train: Pictures | None, test: Pictures | None,
  evaluators: Sequence[Evaluator],
) -> tuple[str, ...]:
  """Sentences on networks that were there before the run: what they were trained on.

  Those whose features score what is drawn, and what the training begins with.
  """
  named = [name for one in evaluators for name in getattr(one, 'features', ())]
  sets = {REFERENCE: train, TESTED: test}
  return (*of_features(named, sets), *told_of_begin(config, test))


def begun_with(config: TrainingConfig) -> str:
  """The model that a run began with, '' for fresh weights."""
  if config.weights_from:
    return f'{config.weights_from}/model'
  return config.settings.model if config.task == 'finetune' else ''


def told_of_begin(config: TrainingConfig, test: Pictures | None) -> tuple[str, ...]:
  """A sentence on what a run began with, if not with fresh weights."""
  begun = begun_with(config)
  return (of_model(begun, begun, {TESTED: test}),) if begun else ()


def _told(train: Source, test: Source) -> list[str]:
  """What of the data is left out, and the split that we have chosen: no one else tells it."""
  told, measured = list(getattr(train, 'notes', ())), measured_on(test)
  if measured != APART:
    told.append(f'scores are measured {measured.told[0].lower()}{measured.told[1:]}')
  return told if jax.process_index() == 0 else []


def build_task(
  config: TrainingConfig, train: Source, test: Source, directory: RunDirectory, mesh: Mesh
) -> Task:
  """The task with its frozen networks loaded, large ones onto the mesh."""
  dtype, settings = DTYPES[config.dtype], config.settings
  options = {'dtype': dtype, 'remat': config.remat, 'attention': config.attention}
  if config.task == 'autoencoder':
    return AutoencoderTask(settings, test, **options)
  if config.task == 'toy':
    return ToyTask(settings, test)
  if config.task == 'classifier':
    return _classifier_task(config, train, test, options)
  if config.task == 'clip':
    return _clip_task(settings, train, test, directory, options)
  if config.task == 'finetune':
    return make_finetune_task(
      settings, train, test, mesh, products=config.products, **options
    )
  model, frozen = assemble(
    settings.unet, settings.autoencoder, settings.clip, settings.schedule,
    settings.objective.parameterization,
    settings.latent_patch_size, dtype,
  )
  model = model.with_attention(config.attention)
  return DiffusionTask(settings, model, frozen, train, test, config.remat, config.products)


def _classifier_task(
  config: TrainingConfig, train, test, options: dict[str, Any]
) -> ClassifierTask:
  settings = with_classes(config.settings, train.labels, test.labels)
  context = {'size': config.data.size, 'classes': settings.classifier.class_names}
  made = build_transforms(config.data.transforms, **context)
  if not any(isinstance(one, Label) for one in made):
    raise UserError('data.transforms of a classifier need label; put it before normalize.')
  return ClassifierTask(settings, test, **options)


def _clip_task(
  settings: CLIPTaskConfig, train, test, directory: RunDirectory, options: dict[str, Any]
) -> CLIPTask:
  """Trains the tokenizer, or reads the one that this run trained when it began."""
  text = settings.clip.text_config
  if (directory.tokenizer / 'tokenizer.json').exists():
    tokenizer = load_tokenizer(directory.tokenizer)
  else:
    captions = (caption for record in readable(train) for caption in record['captions'])
    tokenizer = train_tokenizer(captions, text.vocab_size, text.max_position_embeddings)
  text = dataclasses.replace(
    text, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
  )
  clip = dataclasses.replace(settings.clip, text_config=text)
  return CLIPTask(dataclasses.replace(settings, clip=clip), tokenizer, test, **options)


def _loader(
  config: TrainingConfig, task: Task, train: Source, mesh: Mesh, synthetic: bool = False
) -> Loader:
  """Batches of this process, or, with a cache, of latents and text embeddings."""
  batch_size = config.loop.batch_size
  ways = mesh.shape['data'] * mesh.shape['fsdp'] * config.loop.accumulation_steps
  if batch_size % ways:
    raise UserError(
      f'loop.batch_size {batch_size} cannot be split over {ways} device shares '
      '(data x fsdp x accumulation_steps); make it a multiple of that.'
    )
  if config.task in LATENT and config.settings.cache:
    if synthetic:
      source = synthetic_cache(task.model, task.frozen, len(train))
    else:
      source = cached_source(train, task.model, task.frozen, mesh)
    transforms = [ChooseText()]
  else:
    source = train
    transforms = build_transforms(
      config.data.transforms, size=config.data.size, **_context(task)
    )
  return Loader(
    source, transforms, batch_size=batch_size, rows=local_rows(mesh, batch_size),
    seed=config.loop.seed, num_threads=config.data.workers,
  )


def _context(task: Task) -> dict[str, Any]:
  """What transforms may ask for."""
  if task.name == 'clip':
    length = task.clip.config.text_config.max_position_embeddings
    return {'tokenizer': Tokenize(task.tokenizer, length)}
  if task.name == 'classifier':
    return {'classes': task.classes}
  if task.name in LATENT:
    return {'tokenizer': task.model.text.tokenize}
  return {}


def _check_host_memory(mesh: Mesh) -> None:
  device = mesh.local_devices[0]
  if 'pinned_host' not in {memory.kind for memory in device.addressable_memories()}:
    raise UserError(
      f"config.remat is 'offload', but {device.device_kind} has no pinned memory on the host; set "
      "it to 'block'."
    )


def _evaluators(config: TrainingConfig, task: Task, mesh: Mesh) -> list[Evaluator]:
  """Return those of the task that are wanted, with what scores loaded.

  UserError where it cannot be, or does not give the metric that checkpoints are kept by.
  """
  loop, found = config.loop, task.evaluators(mesh)
  scoring = [one for one in found if one.when == EVALUATE]
  if loop.evaluate_seconds and not any(hasattr(one, 'seconds') for one in scoring):
    raise UserError(
      'loop.evaluate_seconds limits how long pictures are drawn for scores, and task '
      f'{config.task} draws none; set it to 0 and choose loop.evaluate_samples.'
    )
  if not loop.evaluate_samples:
    return [one for one in found if one not in scoring]
  known = [name for one in scoring for name in getattr(one, 'metrics', ())]
  if loop.keep_best and known and loop.keep_best not in known:
    raise UserError(
      f'loop.keep_best is {loop.keep_best!r}, which settings.evaluation does not measure; it '
      f'measures {", ".join(known)}.'
    )
  return list(found)


def _check_computing(config: TrainingConfig, mesh: Mesh) -> None:
  """Whether the devices can do what the config asks for."""
  if config.remat == 'offload':
    _check_host_memory(mesh)
  if config.attention != 'auto':
    check_attention(config.attention, DTYPES[config.dtype], mesh=mesh)
  check_matmul_precision(config.products, mesh)


def _keep(directory: RunDirectory, data: dict[str, Any], task: Task) -> None:
  """Writes what a resume needs to know of the data, and a tokenizer that was trained on them."""
  try:
    write_data(directory, data)
    if task.name == 'clip' and not (directory.tokenizer / 'tokenizer.json').exists():
      save_tokenizer(task.tokenizer, directory.tokenizer)
  except Exception as error:
    if not of_storage(error):
      raise
    raise UserError(
      f'the workdir {directory.path} cannot be written ({reason(error)}); make room, or choose '
      'another.'
    ) from error


def build(config: ConfigDict | dict, workdir: str, synthetic: bool = False) -> Training:
  """Everything the train loop needs. Nothing is written before all of it is known to be good.

  With `synthetic` batches of random numbers take the place of the data set, which need not exist.

  Raises:
    UserError: whatever is wrong with the config, the data, the frozen parts or the workdir.
  """
  checked = parse(config)
  check_wandb(checked.loop.wandb_project)
  directory = RunDirectory(workdir)
  directory.check_config(resolved(checked), completed)
  mesh = make_mesh(checked.mesh)
  _check_computing(checked, mesh)
  if checked.task in LATENT and checked.settings.cache and checked.data.transforms:
    raise UserError(
      'data.transforms have no effect with settings.cache; empty them or switch the cache off.'
    )
  check_sizes(checked)
  damage = Damage(_say_unreadable)
  train, test = open_sources(checked, synthetic, damage)
  data = {} if synthetic else {'training': fingerprint(train), 'test': fingerprint(test)}
  check_data(directory, data)
  told, known = _told(train, test), pictures_in(checked, train, test, data)
  if checked.task in LATENT and checked.loop.evaluate_samples:
    if checked.task == 'finetune':
      checked.settings.check_scored()
    check_samples(checked.loop.evaluate_samples, len(test))
  task = build_task(checked, train, test, directory, mesh)
  evaluators = _evaluators(checked, task, mesh)
  if checked.task == 'finetune' and checked.settings.prior.folder:
    prior = train if synthetic else Counted(
      draw_prior(task, mesh), checked.data.most_unreadable, damage, 'records of the prior'
    )
    data |= {'prior': fingerprint(prior)}
    check_data(directory, data)
    train = Together(train, prior, checked.settings.prior.weight)
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  start = task.start
  if checked.weights_from:
    start = partial(run_weights, checked.weights_from, shapes)
    if not directory.checkpoints.exists():
      start(mesh)  # So that what is wrong with it is known before a cache is filled.
  steps = checked.loop.total_steps
  optimizer = make_optimizer(checked.optimizer, shapes, steps)
  # Last, because filling a cache takes long.
  loader = _loader(checked, task, train, mesh, synthetic)
  if jax.process_index() == 0:
    _keep(directory, data, task)
  for text in told:
    print(f'diffusion_jax train: {text}', file=sys.stderr)
  return Training(
    config=resolved(checked), task=task, loop=checked.loop, safety=checked.safety,
    optimizer=optimizer,
    learning_rates=learning_rates(checked.optimizer, steps), loader=loader, mesh=mesh,
    directory=directory, start=start, data_credit=getattr(train, 'credit', ''),
    measured=measured_on(test), told=told_of(checked, *known, evaluators),
    trained_on=known[0] and dataclasses.replace(known[0], begun=begun_with(checked)),
    damage=damage, evaluators=evaluators,
  )
