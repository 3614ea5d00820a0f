"""The work of evaluate: a model, pictures or an autoencoder against a reference."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from diffusion_jax.cli.options import open_model, open_run
from diffusion_jax.data.captions import read_lines
from diffusion_jax.data.sources.tfds import open_source
from diffusion_jax.data.splits import fingerprint, measured_on
from diffusion_jax.data.unreadable import Counted, Damage
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import comparison as comparisons
from diffusion_jax.evaluation.comparison import Column, Comparison, Found, Reference, local_mesh
from diffusion_jax.evaluation.extract import Extraction
from diffusion_jax.evaluation.extractors import load_named
from diffusion_jax.evaluation.extractors.clip import text_towers
from diffusion_jax.evaluation.generated import check_samples, fresh_weights
from diffusion_jax.evaluation.images import First, ImageSet, Split, open_images, shuffled
from diffusion_jax.evaluation.metrics.images import DISCRETE_BITS
from diffusion_jax.evaluation.options import CLIP, CaptionOptions, CompareOptions, LikelihoodConfig
from diffusion_jax.evaluation.reference import open_reference, write_moments
from diffusion_jax.evaluation.report import TESTED, measured_and_warnings
from diffusion_jax.evaluation.report import of_model as said_of_model
from diffusion_jax.evaluation.scores import metric_of
from diffusion_jax.formats.networks import resolve
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_params, to_host
from diffusion_jax.parallel.processes import A_DAY, agree
from diffusion_jax.run import TrainedRun, load_evaluator
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.trained_on import split_of
from diffusion_jax.viz.evaluation import examples
from diffusion_jax.viz.sweep import label, short

if TYPE_CHECKING:
  from diffusion_jax.cli.evaluate import (
    AutoencoderEvaluation,
    ImagesEvaluation,
    LikelihoodEvaluation,
    ModelEvaluation,
    OneModel,
    Sweep,
  )
  from diffusion_jax.pipelines.sampling import SampleConfig
  from diffusion_jax.types import Weights

SAMPLES, SIZE = 256, 64
IMAGE_METRICS, MODEL_METRICS = 'fd,kid', 'fd,kid,clip_score,retrieval'
PAIR_METRICS = 'fd,psnr,ssim,l1'
FAR = 0.1
"""Relative error of an average's profile from which on people are told."""


def all_are_here(name: str) -> bool:
  """Wait until every process has come here; return whether this is the first one."""
  agree(name, '', A_DAY)  # A page may take long.
  return jax.process_index() == 0


def lines(path: str, what: str = 'captions') -> list[str]:
  """Return the captions, or what else it is, of a file, one a line."""
  found = read_lines(path, what)
  if not found:
    raise UserError(f'{path} has no {what}; write one a line.')
  return found


def own_captions(options: CaptionOptions) -> tuple[list[str], list[str]]:
  """Return (captions, labels) of the options' files, as many as there are samples.

  UserError where they cannot be read, or do not fit each other.
  """
  found, samples = lines(options.captions), options.samples
  if samples is not None and not 1 <= samples <= len(found):
    raise UserError(
      f'--samples is {samples}, but {options.captions} has {len(found)} captions; choose 1 to '
      f'{len(found)}, or leave it out for all.'
    )
  labels = lines(options.labels, 'labels') if options.labels else []
  if labels and len(labels) != len(found):
    raise UserError(
      f'{options.labels} has {len(labels)} labels, but {options.captions} {len(found)} captions; '
      'write one label for each.'
    )
  return found[:samples], labels[:samples]


def say_unreadable(sentence: str) -> None:
  """Name a record that is left out."""
  print(f'diffusion_jax evaluate: left out: {sentence}', file=sys.stderr)


def open_split(options, name: str, size: int) -> Split:
  """Return a split of --dataset."""
  source = open_source(options.dataset, name, size=size, data_dir=options.data_dir, prepare=True)
  return named_split(source, options.dataset, size, name)


def named_split(source, dataset: str, size: int, name: str) -> Split:
  """Return a split of a data set as a set of images that knows which it is.

  Images of another size are another reference.
  """
  return Split(
    source, f'{dataset} {size} px {name}',
    pictures=split_of(dataset, name, size, len(source), fingerprint(source)),
  )


def open_comparison(
  options: CompareOptions, split: Callable[[str], ImageSet], default: str, clip: str = CLIP,
  reference: Reference | None = None, captioned: bool = True,
) -> Comparison:
  """Open what the options say, on the devices of this process.

  Args:
    split: opens a split of the data set, by its name. default: the metrics without --metrics.
    clip: the features without --features. reference: in place of --reference. captioned: whether
      there are captions.
  """
  mesh, out = local_mesh(), Path(options.out)
  named = options.features or (f'clip:{clip}',)
  metrics = (options.metrics or default).split(',') if options.metrics or default else []
  computed = list(dict.fromkeys([*metrics, 'fd'])) if options.save_statistics else metrics
  extraction = Extraction(load_named(named, computed, mesh), mesh)
  _check_towers(metrics, extraction.extractors)
  keep = getattr(options, 'keep', '')
  return Comparison(
    extraction, metrics, reference or _reference(options, metrics, extraction, split),
    out.with_name(f'{out.stem}.parts'),
    texts=text_towers(named, extraction.extractors, mesh) if captioned else {}, named=named,
    seed=options.seed, most_unreadable=options.most_unreadable or 0.0,
    kept=(out.with_name(f'{out.stem}.images'), keep) if keep else None,
  )


def _check_towers(metrics: Sequence[str], extractors: Sequence) -> None:
  """Raise a UserError where texts are asked of CLIPs that all are image towers alone."""
  clips = [extractor for extractor in extractors if hasattr(extractor, 'has_texts')]
  asked = [name for name in metrics if 'texts' in metric_of(name).needs]
  if asked and clips and not any(clip.has_texts for clip in clips):
    raise UserError(
      f'{asked[0]} needs texts, but {clips[0].name} is an image tower alone; give a CLIP with both '
      f'towers in --features, or leave {asked[0]} out of --metrics.'
    )


def _reference(
  options: CompareOptions, metrics: Sequence[str], extraction: Extraction,
  split: Callable[[str], ImageSet],
) -> Reference:
  """Return the reference; images that are scored without one are compared with nothing."""
  what = options.reference
  needs = {need for name in metrics for need in metric_of(name).needs}
  if hasattr(options, 'images') and what is None and not needs & {'reference', 'moments'}:
    return Reference('none', moments={})
  if what in (None, 'train', 'test'):
    images = split(what or 'train')
    return Reference(images.name, images)
  name, found, notes = open_reference(what, extraction.columns)
  known = {'moments' if isinstance(found, dict) else 'images': found}
  return Reference(name, notes=tuple(notes), **known)


def report(
  options: CompareOptions, comparison: Comparison, found: Found, shown: dict,
  settings: Mapping[str, Any] | None = None, about: Sequence[str] = (),
  tested: Split | None = None,
) -> dict[str, Any]:
  """Return columns of values, and, of the first, 'intervals', 'measured', 'warnings', 'settings'.

  Args:
    shown: is given what the page shows beside them, of that column.
    settings: what else decides the values.
    about, tested: as of `evaluation.report.measured_and_warnings`.
  """
  first = found.first
  features, plan = found.pictured[first].features, found.columns[first].work.plan
  shown |= examples(comparison, found)
  if options.save_statistics:
    files = write_moments(
      options.save_statistics, features.columns, comparison.extraction.extractors
    )
    print(f'statistics of {first} written to {", ".join(map(str, files))}')
  measured, warnings = measured_and_warnings(comparison, len(features.rows), about, tested)
  for text in warnings:
    print(f'note: {text}')
  scores = found.told()
  scores['warnings'] = [*warnings, *scores['warnings']]
  return scores | {'measured': measured, 'settings': {
    'samples': len(features.rows), 'unreadable': len(features.trouble),
    **{name: plan[name] for name in ('images', 'model') if name in plan},
    **settings_of(comparison), **(settings or {}),
  }}


def settings_of(comparison: Comparison) -> dict[str, Any]:
  """Return what decides the values, whatever the pictures are."""
  return {
    'reference': comparison.reference.name, 'reference_images': comparison.reference.count,
    'features': [extractor.name for extractor in comparison.extraction.extractors],
    'metrics': comparison.metrics, 'seed': comparison.seed,
  }


class Subject:
  """The model that is scored, the weights that it may have, and what it is asked to draw.

  sample: settings in place of the model's own.
  """

  def __init__(self, options: ModelEvaluation | LikelihoodEvaluation, sample: dict[str, Any], mesh):
    self.options, self.mesh, self.run, self.step = options, mesh, None, None
    unreadable = getattr(options, 'most_unreadable', None)
    if options.workdir:
      self.run, self.sample = open_run(options, sample)
      self.model, self.name, self.step = self.run.model, options.workdir, self.run.newest()
      self.train, self.test = self.run.sources
      data = self.run.config.data
      self.dataset, self.size = data.dataset, data.size
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
    self.most_unreadable = unreadable
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
  def records(self) -> list | None:
    """The test split's records whose captions are drawn; None for captions of one's own."""
    if self.options.captions:
      return None
    samples = SAMPLES if self.options.samples is None else self.options.samples
    check_samples(samples, len(self.test))
    return shuffled(self.test, samples)

  @functools.cached_property
  def captions(self) -> list[str]:
    """What is drawn. UserError for more than there are, or too few to score."""
    options = self.options
    if options.captions:
      found, _ = own_captions(options)
    else:
      found = [record['captions'][0] for record in self.records]
    self.model.rows(found)  # Says of all of them together how many are too long.
    return found

  @functools.cached_property
  def labels(self) -> list[str]:
    """The classes of the captions; empty where they are not known."""
    if self.options.captions:
      return own_captions(self.options)[1]
    return [record['label'] for record in self.records if 'label' in record]

  @functools.cached_property
  def _bits(self):
    """Bits per dimension of the test images of the captions, where --metrics names them."""
    options = self.options
    if not options.wants_bits:
      return None
    from diffusion_jax.evaluation.likelihood import discrete_bits

    compute = discrete_bits(
      self.model, self.records, draws=options.bits_draws, seed=options.seed, mesh=self.mesh,
      batch_size=options.batch,
    )
    return comparisons.FiguresOf((DISCRETE_BITS,), {'draws': options.bits_draws}, compute)

  def split(self, name: str) -> Split:
    """Return a split of the data set that the model was made for."""
    if name not in self._splits:
      source = self.train if name == 'train' else self.test
      self._splits[name] = named_split(source, self.dataset, self.size, name)
    return self._splits[name]

  @property
  def about(self) -> list[str]:
    """What is drawn, and what the model was trained on."""
    whose = self.options.captions or f'the captions of {self.split("test").name}'
    return [f'Each is drawn for one of {whose}.', *self.trained_on]

  @property
  def trained_on(self) -> list[str]:
    """What the model was trained on, seen from the test images."""
    from diffusion_jax.build import begun_with, provenance

    test = self.split('test').pictures
    if self.run is None:
      return [said_of_model(self.name, self.name, {TESTED: test})]
    own = [] if getattr(self.options, 'captions', '') else [measured_on(self.test).sentence]
    begun = begun_with(self.run.config, self.run.task)
    return [*own, *provenance(begun, (), None, test)]

  def weights(self, ema_halflife_images: float | None = None) -> Callable[[], Weights]:
    """Return a reader of the weights on the mesh; of a run, perhaps with another average.

    One set of weights is held at a time, for several may be more than a device has room for.
    """
    which = self.step, ema_halflife_images

    def read() -> Weights:
      if self.run is None:
        return self._given
      if self._held[0] != which:
        self._held = None, None
        self._held = which, self.model.on_mesh(self.run.weights(*which), self.mesh)
      return self._held[1]

    return read

  def identity(self, ema_halflife_images: float | None = None) -> str:
    """Return the model's name and which of its weights these are: it may be trained on meanwhile.
    """
    return identity(self.name, self.run, self.step, ema_halflife_images)

  def drawn(
    self, sample: SampleConfig, ema_halflife_images: float | None = None, place: str = '',
    weights: Callable[[], Weights] | None = None,
  ) -> Column:
    """Return the captions as the model draws them; they are kept where --keep says so."""
    weights = weights or self.weights(ema_halflife_images)
    return self._column(weights, self.identity(ema_halflife_images), sample, True, place)

  def _column(
    self, weights: Callable[[], Weights], name: str, sample: SampleConfig, keep: bool,
    place: str = '',
  ) -> Column:
    return Column(comparisons.of_model(
      self.model, weights, name, self.captions, sample, seed=self.options.seed, mesh=self.mesh,
      batch_size=self.options.batch, figures=self._bits,
    ), self.captions, keep, place, self.labels)

  def untrained(self, weights: Callable[[], Weights]) -> Column:
    """Return what the same network with fresh weights draws."""
    fresh = functools.cache(lambda: fresh_weights(self.model, weights(), self.mesh))
    # The same at each step of a run, whose frozen parts stay as they are.
    name = f'{self.name} ({self.run.settings_fingerprint})' if self.run else self.identity()
    return self._column(fresh, f'untrained {name}', self.sample, False)

  def real(self) -> dict[str, Column]:
    """Return 'real', the test images of the captions, where these are the test split's."""
    if self.records is None:
      return {}
    name = f'{len(self.records)} of {self.split("test").name}'
    work = comparisons.of_images(Split(self.records, name))
    return {'real': Column(work, self.captions, labels=self.labels)}

  @property
  def settings(self) -> dict[str, Any]:
    """How pictures are drawn, and bits estimated."""
    bits = {'draws': self.options.bits_draws} if self.options.wants_bits else {}
    return dataclasses.asdict(self.sample) | bits


def identity(
  name: str, run: TrainedRun | None = None, step: int | None = None,
  ema_halflife_images: float | None = None,
) -> str:
  """Return what tells weights apart: a run's step and average, or a directory's date."""
  if run is None:
    dates = [path.stat().st_mtime for path in resolve(name).rglob('*.safetensors')]
    date = time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(max(dates, default=0)))
    return f'{name} of {date} UTC'
  average = '' if ema_halflife_images is None else (
    f', averaged over {short(ema_halflife_images)} images'
  )
  # A run that was begun anew has the same names.
  return f'{name} at step {step}{average} ({run.fingerprint(step, ema_halflife_images)})'


def open_subject(options: ModelEvaluation, sample: dict[str, Any]) -> tuple[Subject, Comparison]:
  """Return the model and what it is compared with."""
  if options.captions:
    own_captions(options)  # What is wrong with them is said before a model is loaded.
  subject = Subject(options, sample, local_mesh())
  subject.captions  # noqa: B018
  clip = options.clip or (subject.run.config.settings.clip if subject.run else CLIP)
  options = dataclasses.replace(options, most_unreadable=subject.most_unreadable)
  return subject, open_comparison(options, subject.split, MODEL_METRICS, clip)


def of_model(options: OneModel, sample: dict[str, Any], shown: dict) -> dict[str, Any] | None:
  """Score what the model draws, beside real pictures and the untrained model's."""
  subject, comparison = open_subject(options, sample)
  weights = subject.weights(options.ema_halflife_images)
  found = comparison({
    'generated': subject.drawn(subject.sample, options.ema_halflife_images, weights=weights),
    'untrained': subject.untrained(weights), **subject.real(),
  })
  return found and report(
    options, comparison, found, shown, subject.settings, subject.about, subject.split('test')
  )


def sweep(options: Sweep, sample: dict[str, Any], shown: dict) -> dict[str, Any] | None:
  """Score every combination beside real pictures; the page shows the best one's pictures."""
  from diffusion_jax.evaluation.sweep import EMA, applied, best, combinations, network_calls

  every = {label(one): one for one in combinations(options.sweep)}
  subject, comparison = open_subject(options, sample)
  samples = {name: applied(subject.sample, one) for name, one in every.items()}
  for name, settings in samples.items():
    settings.check(subject.model.noise, subject.model.parameterization)
    subject.check_average(every[name].get(EMA))
  own = options.ema_halflife_images
  name_of_model = subject.identity(own)  # By all processes: they agree on the checkpoint.
  found = comparison({
    name: subject.drawn(settings, every[name].get(EMA, own), place=f'generated {name}')
    for name, settings in sorted(samples.items(), key=lambda item: every[item[0]].get(EMA, 0))
  } | subject.real(), choose=lambda values: best({name: values[name] for name in every}))
  if found is None:
    return None
  scores = report(
    options, comparison, found, shown, about=subject.about, tested=subject.split('test')
  )
  scores['settings'] |= {'model': name_of_model, 'best': found.first, **subject.settings}
  return scores | {'sweep': {
    name: {'combination': every[name], 'network_calls': network_calls(subject.model, settings)}
    for name, settings in samples.items()
  }}


def likelihood(options: LikelihoodEvaluation, config: LikelihoodConfig) -> dict[str, Any]:
  """Estimate bits per dimension of test images."""
  from diffusion_jax.evaluation.likelihood import evaluate_likelihood

  if options.workdir and (task := trains_other(options.workdir)):
    raise UserError(f'{options.workdir} trains {task}; a likelihood needs a diffusion model.')
  mesh = make_mesh(MeshConfig())
  subject = Subject(options, {}, mesh)
  found = evaluate_likelihood(
    subject.model, subject.weights(options.ema_halflife_images)(), subject.train, subject.test,
    config, samples=options.samples, seed=options.seed, mesh=mesh, batch_size=options.batch,
  )
  whose = f'Of {found["settings"]["samples"]:,} images of {subject.split("test").name}.'
  return found | {'measured': [whose, *subject.trained_on]}


def trains_other(workdir: str) -> str:
  """Return the task of a run whose model draws no images for captions, '' of others."""
  from diffusion_jax.registry import TASKS, load
  from diffusion_jax.train.tasks.diffusion import DiffusionTask

  task = RunDirectory(workdir).read_json('config.json').get('task', '')
  return '' if issubclass(load(TASKS, task, 'config.task'), DiffusionTask) else task


def of_task(options: OneModel, sample: dict[str, Any]) -> dict[str, Any]:
  """Score the model of a run by its task's own evaluators."""
  own = type(options)(out=options.out, workdir=options.workdir, samples=options.samples)
  other = [
    field.name for field in dataclasses.fields(options)
    if getattr(options, field.name) != getattr(own, field.name)
  ]
  if other := [*other, *sample]:
    raise UserError(
      f'{options.workdir} trains {trains_other(options.workdir)}; --{other[0]} does nothing '
      'there, leave it out.'
    )
  return load_evaluator(options.workdir)(SAMPLES if options.samples is None else options.samples)


def of_images(options: ImagesEvaluation, shown: dict) -> dict[str, Any] | None:
  """Score pictures that are there."""
  images = open_images(options.images)  # Before a data set is prepared, which may take minutes.
  alone = options.save_statistics and not (options.metrics or options.reference)
  comparison = open_comparison(
    options, lambda name: open_split(options, name, options.size), '' if alone else IMAGE_METRICS,
    captioned=False,
  )
  found = comparison({'samples': Column(comparisons.of_images(images))})
  if found is None:
    return None
  for note in images.notes:
    print(f'note: {note}')
  found.scores[found.first].warnings.extend(images.notes)
  return report(options, comparison, found, shown, about=[f'They are of {images.name}.'])


def of_autoencoder(options: AutoencoderEvaluation, shown: dict) -> dict[str, Any] | None:
  """Score 'reconstructed' and 'untrained', both against the originals."""
  from diffusion_jax.evaluation import reconstruction
  from diffusion_jax.formats.networks import load_lpips

  mesh = local_mesh()
  network, read, name, test, about = _open_autoencoder(options)
  originals = First(test, min(SAMPLES, len(test)) if options.samples is None else options.samples)
  comparison = open_comparison(
    options, lambda name: test, PAIR_METRICS + (',lpips' if options.lpips else ''),
    reference=Reference(originals.name, originals, own=True), captioned=False,
  )
  distances = None
  if options.lpips:
    lpips = put_params(load_lpips(options.lpips), mesh)
    distances = reconstruction.perceptual(lpips, mesh, options.batch)
  reconstruct = reconstruction.reconstructor(network, mesh, options.batch)
  fresh = lambda: to_host(jax.jit(network.initialize)(jax.random.key(1)))
  # All of them whatever is asked for, so that a second start may ask for more.
  work = lambda name, params: reconstruction.of_autoencoder(
    reconstruct, functools.cache(lambda: put_params(params(), mesh)), name, originals,
    tuple(reconstruction.FIGURES), distances, options.lpips,
  )
  found = comparison({
    'reconstructed': Column(work(name, read), keep=True),
    'untrained': Column(work(f'untrained {name}', fresh)),
  })
  settings = {'lpips': options.lpips} if options.lpips else {}
  return found and report(options, comparison, found, shown, settings, about, test)


def _open_autoencoder(options: AutoencoderEvaluation) -> tuple:
  """Return (network, a reader of its parameters, its name and weights, the test images, what it
  was trained on)."""
  from diffusion_jax.formats.networks import load_params
  from diffusion_jax.models.autoencoder import AutoencoderKL
  from diffusion_jax.models.network import Network, under

  half_life = options.ema_halflife_images
  if options.workdir:
    run = TrainedRun(options.workdir)
    network, step, data = run.autoencoder, run.newest(), run.config.data
    read = lambda: to_host(under('autoencoder', run.params(step, half_life)))
    name = identity(options.workdir, run, step, half_life)
    images = named_split(run.sources[1], data.dataset, data.size, 'test')
    return network, read, name, images, [measured_on(run.sources[1]).sentence]
  if not options.model:
    raise UserError('there is no autoencoder; give --workdir of a run, or --model of a directory.')
  config, params = load_params('autoencoder', options.model)
  own = config.sample_size if isinstance(config.sample_size, int) else SIZE
  images = open_split(options, 'test', options.size or own)
  about = [said_of_model(options.model, options.model, {TESTED: images.pictures})]
  return Network.of(AutoencoderKL, config), lambda: params, identity(options.model), images, about
