"""Options of evaluate -> what is scored, by the evaluators and comparisons of the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from diffusion_jax.cli.settling import steps as steps
from diffusion_jax.cli.subject import SAMPLES, Subject, identity, open_split, own_prompts
from diffusion_jax.config import typed
from diffusion_jax.data.splits import measured_on
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.comparison import (
  Column,
  Comparison,
  Found,
  Reference,
  local_mesh,
  of_images,
)
from diffusion_jax.evaluation.evaluator import scores_of, with_options
from diffusion_jax.evaluation.extract import Extraction
from diffusion_jax.evaluation.images import ImageSet, RandomSubset, Split, named_split, open_images
from diffusion_jax.evaluation.metrics.metric import metric_of
from diffusion_jax.evaluation.options import CLIP, CompareOptions, LikelihoodConfig
from diffusion_jax.evaluation.reference import open_reference, write_moments
from diffusion_jax.evaluation.report import TESTED, report
from diffusion_jax.evaluation.report import of_model as about_model
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, to_host
from diffusion_jax.parallel.processes import A_DAY, agree
from diffusion_jax.pipelines.options import GUIDES
from diffusion_jax.run import TrainedRun, load_evaluator
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.sizes import scored_at
from diffusion_jax.viz.evaluation import examples
from diffusion_jax.viz.sweep import label

if TYPE_CHECKING:
  from diffusion_jax.cli.evaluate import (
    AutoencoderEvaluation,
    ImagesEvaluation,
    LikelihoodEvaluation,
    ModelEvaluation,
    OneModel,
    Sweep,
  )

SIZE = 64
IMAGE_METRICS, MODEL_METRICS = 'fd,kid', 'fd,kid,clip_score,retrieval'
PAIR_METRICS = 'fd,psnr,ssim,l1'


def all_are_here(name: str) -> bool:
  """Wait until every process has come here; return whether this is the first one."""
  agree(name, '', A_DAY)  # A page may take long.
  return jax.process_index() == 0


def open_comparison(
  options: CompareOptions, split: Callable[[str], ImageSet], default: str, clip: str = CLIP,
  reference: Reference | None = None, captioned: bool = True,
) -> Comparison:
  """Open what the options name, on this process's devices.

  split: opens a split of the data set by name. default: the metrics without --metrics. clip: the
  features without --features. reference: in place of --reference. captioned: if there are captions.
  """
  out, keep = Path(options.out), getattr(options, 'keep', '')
  metrics = (options.metrics or default).split(',') if options.metrics or default else []
  return Comparison(
    options.features or (f'clip:{clip}',), metrics, local_mesh(),
    lambda extraction: reference or _reference(options, metrics, extraction, split),
    parts=out.with_name(f'{out.stem}.parts'), captioned=captioned, seed=options.seed,
    computed=list(dict.fromkeys([*metrics, 'fd'])) if options.save_statistics else metrics,
    most_unreadable=options.most_unreadable or 0.0,
    kept=(out.with_name(f'{out.stem}.images'), keep) if keep else None,
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


def write_report(
  options: CompareOptions, comparison: Comparison, found: Found, shown: dict,
  settings: Mapping[str, Any] | None = None, about: Sequence[str] = (),
  tested: Split | None = None,
) -> dict[str, Any]:
  """Scores of `evaluation.report.report`; write statistics if asked, fill `shown` for the page."""
  shown |= examples(comparison, found)
  if options.save_statistics:
    files = write_moments(
      options.save_statistics, found.features.columns, comparison.extraction.extractors
    )
    print(f'statistics of {found.first} written to {", ".join(map(str, files))}')
  return report(comparison, found, settings or {}, about, tested)


def open_subject(
  options: ModelEvaluation, sample: dict[str, Any], guides: Collection[str] = ()
) -> tuple[Subject, Comparison]:
  """Return the model and what it is compared with; guides: see `Subject`."""
  if options.captions:
    own_prompts(options)  # What is wrong with them is said before a model is loaded.
  subject = Subject(options, sample, local_mesh(), guides)
  subject.prompts  # noqa: B018
  clip = options.clip or (subject.run.config.settings.clip if subject.run else CLIP)
  options = dataclasses.replace(options, most_unreadable=subject.most_unreadable)
  return subject, open_comparison(options, subject.split, MODEL_METRICS, clip)


def of_model(options: OneModel, sample: dict[str, Any], shown: dict) -> dict[str, Any] | None:
  """Score the model's samples, with real images and the untrained model's for comparison.

  A run of another task is scored by its own evaluators.
  """
  if options.workdir and trains_other(options.workdir):
    return of_task(options, sample)
  subject, comparison = open_subject(options, sample)
  return score(subject, comparison, shown, subject.settings)


def score(
  subject: Subject, comparison: Comparison, shown: dict, settings: Mapping[str, Any],
  place: str = '',
) -> dict[str, Any] | None:
  """Scores of a model at its step by the evaluators of its training; None but in process 0.

  settings: the model's. place: folder for the pieces of its samples.
  """
  options = subject.options
  found = subject.evaluator(comparison).found(
    subject.model, subject.weights(options.ema_halflife_images), options.seed, subject.prompts,
    names=subject.names, place=place,
  )
  more = subject.added()
  if found is None:
    return None
  scores = write_report(
    options, comparison, found, shown, settings, subject.about, subject.split('test')
  )
  return scores_of(more, found.first, scores)


def sweep(options: Sweep, sample: dict[str, Any], shown: dict) -> dict[str, Any] | None:
  """Score every combination, and real images; the page shows the best one's images."""
  from diffusion_jax.evaluation.sweep import EMA, applied, best, combinations, network_calls

  swept = combinations(options.sweep)
  for name in dict.fromkeys(name for one in swept for name in one):
    if name in sample or getattr(options, name, None) is not None:
      raise UserError(f'--{name} does nothing beside a sweep of {name}; leave it out.')
  every = {label(one): one for one in swept}
  guides = {name for one in swept for name in GUIDES if one.get(name)}
  subject, comparison = open_subject(options, sample, guides)
  samples = {name: applied(subject.sample, one) for name, one in every.items()}
  for name, settings in samples.items():
    subject.model.check_sampling(settings)
    subject.check_average(every[name].get(EMA))
  own, evaluator = options.ema_halflife_images, subject.evaluator(comparison)
  name_of_model = subject.identity(own)  # By all processes: they agree on the checkpoint.
  columns = {}
  for name in sorted(samples, key=lambda name: every[name].get(EMA, 0)):
    average = every[name].get(EMA, own)
    columns[name] = evaluator.column(
      subject.model, subject.weights(average), subject.identity(average), prompts=subject.prompts,
      seed=options.seed, sample=samples[name], keep=True, place=f'generated {name}',
    )
  found = comparison(
    columns | evaluator.real(subject.prompts),
    choose=lambda values: best({name: values[name] for name in every}),
  )
  if found is None:
    return None
  scores = write_report(
    options, comparison, found, shown, about=subject.about, tested=subject.split('test')
  )
  scores['settings'] |= {'model': name_of_model, 'best': found.first, **subject.settings}
  return scores | {'sweep': {
    name: {'combination': every[name], 'network_calls': network_calls(subject.model, settings)}
    for name, settings in samples.items()
  }}


def likelihood(
  options: LikelihoodEvaluation, estimate: dict[str, Any], shown: dict
) -> dict[str, Any]:
  """Estimate bits per dimension of test images."""
  from diffusion_jax.registry import EVALUATORS, load

  del shown
  config = typed(LikelihoodConfig, estimate, '--')
  if options.workdir and (task := trains_other(options.workdir)):
    raise UserError(f'{options.workdir} trains {task}; a likelihood needs a diffusion model.')
  mesh = make_mesh(MeshConfig())
  subject = Subject(options, {}, mesh)
  if not subject.model.likelihood:
    raise UserError(
      f'of {subject.name} there is no likelihood of pictures; score it by evaluate model.'
    )
  measure = load(EVALUATORS, subject.model.likelihood)
  known = {field.name for field in dataclasses.fields(measure)}
  if other := [name for name in estimate if name not in known]:
    raise UserError(f'--{other[0]} does nothing for {subject.name}; leave it out.')
  evaluator = with_options(
    measure(train=subject.train, test=subject.test, mesh=mesh), images=options.samples,
    samples=options.samples, batch_size=options.batch, **dataclasses.asdict(config),
  )
  weights = subject.weights(options.ema_halflife_images)()
  found = scores_of(
    evaluator.run(subject.model, weights, jax.random.key(options.seed)), first='model'
  )
  whose = f'Of {found["settings"]["samples"]:,} images of {subject.split("test").name}.'
  return found | {'measured': [whose, *subject.trained_on]}


def trains_other(workdir: str) -> str:
  """The task of a run whose model samples no images from captions; '' for others."""
  from diffusion_jax.registry import TASKS, load

  task = RunDirectory(workdir).read_json('config.json').get('task', '')
  return '' if load(TASKS, task, 'config.task').captioned else task


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


def of_pictures(options: ImagesEvaluation, _: dict, shown: dict) -> dict[str, Any] | None:
  """Score existing pictures."""
  images = open_images(options.images)  # Before a data set is prepared, which may take minutes.
  alone = options.save_statistics and not (options.metrics or options.reference)
  comparison = open_comparison(
    options, lambda name: open_split(options, name, options.size), '' if alone else IMAGE_METRICS,
    captioned=False,
  )
  found = comparison({'samples': Column(of_images(images))})
  if found is None:
    return None
  for note in images.notes:
    print(f'note: {note}')
  found.scores[found.first].warnings.extend(images.notes)
  return write_report(options, comparison, found, shown, about=[f'They are of {images.name}.'])


def of_autoencoder(options: AutoencoderEvaluation, _: dict, shown: dict) -> dict[str, Any] | None:
  """Score 'reconstructed' and 'untrained', both against the originals."""
  from diffusion_jax.evaluation.reconstruction import columns

  network, read, name, test, about = _open_autoencoder(options)
  count = min(SAMPLES, len(test)) if options.samples is None else options.samples
  originals = RandomSubset(test, count)
  comparison = open_comparison(
    options, lambda name: test, PAIR_METRICS + (',lpips' if options.lpips else ''),
    reference=Reference(originals.name, originals, own=True), captioned=False,
  )
  found = comparison(columns(
    network, read, name, originals, local_mesh(), options.batch, options.lpips
  ))
  settings = {'lpips': options.lpips} if options.lpips else {}
  return found and write_report(options, comparison, found, shown, settings, about, test)


def _open_autoencoder(options: AutoencoderEvaluation) -> tuple:
  """Return (network, a reader of its parameters, its name and weights, the test images, what it
  was trained on)."""
  from diffusion_jax.formats.autoencoder import QUANTIZED
  from diffusion_jax.formats.networks import read_part
  from diffusion_jax.models.network import under

  half_life = options.ema_halflife_images
  if options.workdir:
    run = TrainedRun(options.workdir)
    network, step, data = run.autoencoder, run.newest(), run.config.data
    read = lambda: to_host(under('autoencoder', run.params(step, half_life)))
    name = identity(options.workdir, run, step, half_life)
    images = named_split(run.sources[1], data.name, data.edge, 'test')
    about = [measured_on(run.sources[1]).sentence, *scored_at(data.shapes)]
    return network, read, name, images, about
  if not options.model:
    raise UserError('there is no autoencoder; give --workdir of a run, or --model of a directory.')
  part = read_part(options.model).expect(('autoencoder', *QUANTIZED))
  config = part.config
  own = config.sample_size if isinstance(config.sample_size, int) else SIZE
  images = open_split(options, 'test', options.size or own)
  about = [about_model(options.model, options.model, {TESTED: images.pictures})]
  return part.network(), part.load, identity(options.model), images, about
