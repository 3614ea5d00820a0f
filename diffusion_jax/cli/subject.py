"""The model that evaluate scores: its weights, its settings, its captions and its data."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax

from diffusion_jax.cli.options import GuideOptions, open_model, open_run
from diffusion_jax.data.sources.tfds import open_source
from diffusion_jax.data.splits import measured_on
from diffusion_jax.data.unreadable import Counted, Damage
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.comparison import Comparison
from diffusion_jax.evaluation.evaluator import EVALUATE, Value, run_all
from diffusion_jax.evaluation.generated import GeneratedImages, PerImage, Prompts
from diffusion_jax.evaluation.images import Split, named_split
from diffusion_jax.evaluation.metrics.images import DISCRETE_BITS
from diffusion_jax.evaluation.options import CaptionOptions
from diffusion_jax.evaluation.report import TESTED
from diffusion_jax.evaluation.report import of_model as about_model
from diffusion_jax.formats.networks import resolve
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.run import TrainedRun
from diffusion_jax.sizes import scored_at
from diffusion_jax.viz.sweep import short

if TYPE_CHECKING:
  from diffusion_jax.cli.evaluate import LikelihoodEvaluation, ModelEvaluation
  from diffusion_jax.types import Weights

SAMPLES = 256
FAR = 0.1
"""Relative error of an average's profile from which on a note says so."""


def own_prompts(options: CaptionOptions) -> Prompts:
  """The captions of the options' files; UserError where unreadable or mismatched."""
  return Prompts.read(options.captions, options.labels, options.samples)


def say_unreadable(sentence: str) -> None:
  """Name a record that is left out."""
  print(f'diffusion_jax evaluate: left out: {sentence}', file=sys.stderr)


def open_split(options, name: str, size: int) -> Split:
  """Return a split of --dataset."""
  source = open_source(options.dataset, name, size=size, data_dir=options.data_dir, prepare=True)
  return named_split(source, options.dataset, size, name)


class Subject:
  """The model that is scored, its weights, and its sampling; `sample` replaces its own settings.

  guides: names of those that are needed besides the ones of these settings.
  """

  def __init__(
    self, options: ModelEvaluation | LikelihoodEvaluation, sample: dict[str, Any], mesh,
    guides: Collection[str] = (),
  ):
    self.options, self.mesh, self.run, self.step = options, mesh, None, None
    unreadable = getattr(options, 'most_unreadable', None)
    if options.workdir:
      self.run, self.sample = open_run(options, sample)
      self.model, self.name, self.step = self.run.model, options.workdir, self.run.newest()
      self.train, self.test = self.run.sources
      data = self.run.config.data
      self.dataset, self.size = data.name, data.edge
      unreadable = data.most_unreadable if unreadable is None else unreadable
    else:
      self.model, self._given, self.sample, self.name = open_model(options, sample, mesh)
      self.dataset, self.size = options.dataset, max(self.model.trained_size)
      damage = Damage(say_unreadable)
      self.train, self.test = (
        Counted(
          open_split(options, name, self.size).records, unreadable or 0.0, damage,
          f'{name} records', '--most_unreadable',
        ) for name in ('train', 'test')
      )
    self.most_unreadable, self._guides = unreadable, {}
    if isinstance(options, GuideOptions):
      guides = {*guides, *self.sample.guides}
      self.model, found = options.guided(self.model, {}, guides)
      self._guides = self.model.on_mesh(found, mesh)
    self._held: tuple[Any, Weights | None] = (None, None)
    self._splits: dict[str, Split] = {}
    self.check_average(options.ema_halflife_images)

  def check_average(self, ema_halflife_images: float | None) -> None:
    """Say how near an average of that length comes. UserError where there can be none."""
    if ema_halflife_images is None:
      return
    if self.run is None:
      raise UserError('ema_halflife_images needs a run (--workdir): a model alone has one average.')
    stored, combined = self.run.averages(self.step, ema_halflife_images)
    if combined.error > FAR:
      print(f'note: the average over {ema_halflife_images:g} images is {combined.error:.0%} off '
            f'with {len(stored)} snapshots; keep more checkpoints (loop.keep_every_steps).')

  @functools.cached_property
  def prompts(self) -> Prompts:
    """Captions to sample. UserError for more than there are, or too few to score."""
    options = self.options
    if options.captions:
      found = own_prompts(options)
    else:
      samples = SAMPLES if options.samples is None else options.samples
      found = Prompts.of(self.test, samples, self.model.prompt, self.split('test').name)
    # Says of all of them together how many are too long.
    classes = Inputs(classes=tuple(found.labels)) if self.model.takes_classes else None
    self.model.rows(found.captions, inputs=classes, syntax=self.sample.prompt_syntax)
    return found

  @functools.cached_property
  def _bits(self):
    """Bits per dimension of the test images of the captions, where --metrics names them."""
    options = self.options
    if not options.wants_bits:
      return None
    from diffusion_jax.evaluation.likelihood import discrete_bits

    compute = discrete_bits(
      self.model, self.prompts.records, draws=options.bits_draws, seed=options.seed, mesh=self.mesh,
      batch_size=options.batch,
    )
    return PerImage((DISCRETE_BITS,), {'draws': options.bits_draws}, compute)

  def split(self, name: str) -> Split:
    """Return a split of the data set that the model was made for."""
    if name not in self._splits:
      source = self.train if name == 'train' else self.test
      self._splits[name] = named_split(source, self.dataset, self.size, name)
    return self._splits[name]

  @property
  def about(self) -> list[str]:
    """Sentences on what is sampled, and what the model was trained on."""
    whose = self.options.captions or f'the captions of {self.split("test").name}'
    return [f'Each is sampled for one of {whose}.', *self.trained_on]

  @property
  def trained_on(self) -> list[str]:
    """Sentences on what the model was trained on, and whether the test images are part of it."""
    from diffusion_jax.build import begun_with, provenance

    test = self.split('test').pictures
    if self.run is None:
      return [about_model(self.name, self.name, {TESTED: test})]
    own = [] if getattr(self.options, 'captions', '') else [measured_on(self.test).sentence]
    own += scored_at(self.run.config.data.shapes)
    begun = begun_with(self.run.config, self.run.task)
    return [*own, *provenance(begun, (), None, test)]

  def weights(self, ema_halflife_images: float | None = None) -> Callable[[], Weights]:
    """A reader of the weights on the mesh, one set in memory at a time; of a run, any average."""
    which = self.step, ema_halflife_images

    def read() -> Weights:
      if self.run is None:
        return {**self._given, **self._guides}
      if self._held[0] != which:
        self._held = None, None
        self._held = which, self.model.on_mesh(self.run.weights(*which), self.mesh)
      return {**self._held[1], **self._guides}

    return read

  def identity(self, ema_halflife_images: float | None = None) -> str:
    """Return the model's name and which of its weights these are: it may be trained on meanwhile.

    So may be what guides it.
    """
    own = identity(self.name, self.run, self.step, ema_halflife_images)
    return ', '.join([own, *self._guided_by])

  def evaluator(self, comparison: Comparison) -> GeneratedImages:
    """Return what samples the captions and scores what comes."""
    return GeneratedImages(
      comparison.named, comparison.metrics, self.sample, self.train, self.test, self.mesh,
      batch_size=self.options.batch, prompts=self.prompts, scorer=comparison, each=self._bits,
    )

  @functools.cached_property
  def _guided_by(self) -> list[str]:
    """What is given to guide samples, and which weights that has."""
    if not isinstance(self.options, GuideOptions):
      return []
    return [
      f'{name} {value if name == "clip_cutouts" else identity(value)}'
      for name, value in self.options.named_guides().items()
    ]

  @property
  def names(self) -> dict[str, str]:
    """Names of the model with its weights and without, by column."""
    generated = self.identity(self.options.ema_halflife_images)
    # The same at each step of a run, whose frozen parts stay as they are.
    name = f'{self.name} ({self.run.settings_fingerprint})' if self.run else generated
    untrained = [f'untrained {name}', *(self._guided_by if self.run else ())]
    return {'generated': generated, 'untrained': ', '.join(untrained)}

  def added(self) -> list[tuple[str, Value]]:
    """Return what the evaluators yield that the config of the run adds to its task's."""
    found = [one for one in self.run.added_evaluators if one.when == EVALUATE] if self.run else []
    if not found:
      return []
    weights = self.run.weights(self.step, self.options.ema_halflife_images)
    weights = self.model.on_mesh(weights, self.run.mesh)
    return list(run_all(found, self.model, weights, jax.random.key(self.options.seed)))

  @property
  def settings(self) -> dict[str, Any]:
    """Settings by which images are sampled, and bits estimated."""
    bits = {'draws': self.options.bits_draws} if self.options.wants_bits else {}
    return dataclasses.asdict(self.sample) | bits


def identity(
  name: str, run: TrainedRun | None = None, step: int | None = None,
  ema_halflife_images: float | None = None,
) -> str:
  """The identity of weights: a run's step and average, or a directory's date."""
  if run is None:
    dates = [path.stat().st_mtime for path in resolve(name).rglob('*.safetensors')]
    date = time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(max(dates, default=0)))
    return f'{name} of {date} UTC'
  average = '' if ema_halflife_images is None else (
    f', averaged over {short(ema_halflife_images)} images'
  )
  # A run that was begun anew has the same names.
  return f'{name} at step {step}{average} ({run.fingerprint(step, ema_halflife_images)})'
