"""What a model draws, scored: once, over a sweep, or for each new checkpoint of a run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_jax.cli import evaluate_job
from diffusion_jax.cli.options import load, load_run
from diffusion_jax.errors import UserError

if TYPE_CHECKING:
  from diffusion_jax.evaluation.comparison import Column
  from diffusion_jax.evaluation.images import Split
  from diffusion_jax.pipelines.sampling import SampleConfig
  from diffusion_jax.run import TrainedRun
  from diffusion_jax.types import Weights

SAMPLES = 256
BITS_DRAWS = 8
"""Of the bound beside other figures: unbiased still, and quicker than drawing pictures."""
FAR = 0.1
"""Relative error of an average's profile from which on people are told."""


class Subject:
  """The model that is scored, the weights that it may have, and what it is asked to draw."""

  def __init__(self, args: argparse.Namespace, mesh):
    from diffusion_jax.data.unreadable import Counted, Damage

    self.args, self.mesh, self.run, self.step = args, mesh, None, None
    if args.workdir:
      self.run, self.sample = load_run(args)
      self.model, self.name, self.step = self.run.model, args.workdir, self.run.newest()
      self.train, self.test = self.run.sources
      if args.most_unreadable is None:
        args.most_unreadable = self.run.config.data.most_unreadable
    else:
      self.model, self._given, self.sample, self.name = load(args, mesh)
      damage, most = Damage(evaluate_job.say_unreadable), args.most_unreadable or 0.0
      self.train, self.test = (
        Counted(
          evaluate_job.open_split(args, name, max(self.model.trained_size)).records, most, damage,
          f'{name} records', '--most_unreadable',
        ) for name in ('train', 'test')
      )
    self._held: tuple[Any, Weights | None] = (None, None)
    self._splits: dict[str, Split] = {}
    self.check_average(args.ema_halflife_images)

  def check_average(self, ema_halflife_images: float | None) -> None:
    """Whether there can be an average of that length; says how near it comes."""
    if ema_halflife_images is None:
      return
    if self.run is None:
      raise UserError(
        'ema_halflife_images needs a run (--workdir): a model alone has one average.'
      )
    stored, combined = self.run.averages(self.step, ema_halflife_images)
    if combined.error > FAR:
      print(f'note: the average over {ema_halflife_images:g} images is {combined.error:.0%} off '
            f'with {len(stored)} snapshots; keep more checkpoints (loop.keep_every_steps).')

  @functools.cached_property
  def records(self) -> list | None:
    """The test split's records whose captions are drawn; None for captions of one's own."""
    from diffusion_jax.evaluation.generated import check_samples, shuffled

    if self.args.captions:
      return None
    samples = SAMPLES if self.args.samples is None else self.args.samples
    check_samples(samples, len(self.test))
    return shuffled(self.test, samples)

  @functools.cached_property
  def captions(self) -> list[str]:
    """What is drawn. UserError for more than there are, or too few to score."""
    found = self._captions()
    self.model.rows(found)  # Says of all of them together how many are too long.
    return found

  def _captions(self) -> list[str]:
    if self.args.captions:
      found, samples = evaluate_job.lines(self.args.captions), self.args.samples
      if samples is not None and not 1 <= samples <= len(found):
        raise UserError(
          f'--samples is {samples}, but {self.args.captions} has {len(found)} captions; choose 1 '
          f'to {len(found)}, or leave it out for all.'
        )
      return found[:samples]
    return [record['captions'][0] for record in self.records]

  @functools.cached_property
  def labels(self) -> list[str]:
    """The classes of the captions; empty where they are not known."""
    if self.args.captions:
      return (evaluate_job.labels_of(self.args) or [])[: self.args.samples]
    return [record['label'] for record in self.records if 'label' in record]

  @functools.cached_property
  def _bits(self):
    """Bits per dimension of the test images of the captions, where --metrics names them."""
    from diffusion_jax.evaluation.comparison import FiguresOf
    from diffusion_jax.evaluation.likelihood import discrete_bits
    from diffusion_jax.evaluation.metrics.images import DISCRETE_BITS

    if not wants_bits(self.args):
      return None
    draws = draws_of(self.args)
    compute = discrete_bits(
      self.model, self.records, draws=draws, seed=self.args.seed, mesh=self.mesh,
      batch_size=self.args.batch,
    )
    return FiguresOf((DISCRETE_BITS,), {'draws': draws}, compute)

  def split(self, name: str) -> Split:
    """A split of the data set that the model was made for."""
    if name not in self._splits:
      dataset, size = self.args.dataset, max(self.model.trained_size)
      if self.run:
        dataset, size = self.run.config.data.dataset, self.run.config.data.size
      source = self.train if name == 'train' else self.test
      self._splits[name] = evaluate_job.named_split(source, dataset, size, name)
    return self._splits[name]

  @property
  def about(self) -> list[str]:
    """What is drawn, and what the model was trained on."""
    whose = self.args.captions or f'the captions of {self.split("test").name}'
    return [f'Each is drawn for one of {whose}.', *self.trained_on]

  @property
  def trained_on(self) -> list[str]:
    """What the model was trained on, seen from the test images."""
    from diffusion_jax.build import provenance_of_start
    from diffusion_jax.data.splits import measured_on
    from diffusion_jax.evaluation.report import TESTED, of_model

    test = self.split('test').pictures
    if self.run is None:
      return [of_model(self.name, self.name, {TESTED: test})]
    own = [] if self.args.captions else [measured_on(self.test).told]
    return [*own, *provenance_of_start(self.run.config, self.run.task, test)]

  def weights(self, ema_halflife_images: float | None = None) -> Callable[[], Weights]:
    """On the mesh, read when first called for; of a run, perhaps with an average of another length.

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
    """The model's name and which of its weights these are, for it may be trained on meanwhile."""
    return identity(self.name, self.run, self.step, ema_halflife_images)

  def drawn(
    self, sample: SampleConfig, ema_halflife_images: float | None = None, place: str = '',
    weights: Callable[[], Weights] | None = None,
  ) -> Column:
    """The captions as the model draws them; they are kept where --keep says so."""
    weights = weights or self.weights(ema_halflife_images)
    return self._column(weights, self.identity(ema_halflife_images), sample, True, place)

  def _column(
    self, weights: Callable[[], Weights], name: str, sample: SampleConfig, keep: bool,
    place: str = '',
  ) -> Column:
    from diffusion_jax.evaluation.comparison import Column, of_model

    return Column(of_model(
      self.model, weights, name, self.captions, sample, seed=self.args.seed, mesh=self.mesh,
      batch_size=self.args.batch, figures=self._bits,
    ), self.captions, keep, place, self.labels)

  def untrained(self, weights: Callable[[], Weights]) -> Column:
    """The same network with fresh weights."""
    from diffusion_jax.evaluation.generated import fresh_weights

    @functools.cache
    def fresh() -> Weights:
      return fresh_weights(self.model, weights(), self.mesh)

    # The same at each step of a run, whose frozen parts stay as they are.
    name = f'{self.name} ({self.run.settings_fingerprint})' if self.run else self.identity()
    return self._column(fresh, f'untrained {name}', self.sample, False)

  def real(self) -> dict[str, Column]:
    """'real', the test images of the captions, where these are the test split's."""
    from diffusion_jax.evaluation.comparison import Column, of_images
    from diffusion_jax.evaluation.images import Split

    if self.records is None:
      return {}
    work = of_images(Split(self.records, f'{len(self.records)} of {self.split("test").name}'))
    return {'real': Column(work, self.captions, labels=self.labels)}


def wants_bits(args: argparse.Namespace) -> bool:
  """Whether bits per dimension are among the metrics."""
  return 'bits_per_dim' in (args.metrics or '').split(',')


def draws_of(args: argparse.Namespace) -> int:
  """Noise levels of their bound."""
  return BITS_DRAWS if args.draws is None else args.draws


def settings_of(subject: Subject) -> dict[str, Any]:
  """How pictures are drawn, and bits estimated."""
  bits = {'draws': draws_of(subject.args)} if wants_bits(subject.args) else {}
  return dataclasses.asdict(subject.sample) | bits


def identity(
  name: str, run: TrainedRun | None = None, step: int | None = None,
  ema_halflife_images: float | None = None,
) -> str:
  """What tells weights apart: a run's, with its step and its average, or a directory's, by date."""
  from diffusion_jax.formats.networks import resolve
  from diffusion_jax.viz.sweep import short

  if run is None:
    dates = [path.stat().st_mtime for path in resolve(name).rglob('*.safetensors')]
    date = time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(max(dates, default=0)))
    return f'{name} of {date} UTC'
  average = '' if ema_halflife_images is None else (
    f', averaged over {short(ema_halflife_images)} images'
  )
  # A run that was begun anew has the same names.
  return f'{name} at step {step}{average} ({run.fingerprint(step, ema_halflife_images)})'


def open_subject(args: argparse.Namespace, out: Path, config: dict | None) -> tuple:
  """(the model, what it is compared with)."""
  from diffusion_jax.evaluation.comparison import local_mesh

  evaluate_job.start()
  subject = Subject(args, local_mesh())
  subject.captions  # noqa: B018
  clip = args.clip or (config['settings']['clip'] if config else evaluate_job.CLIP)
  return subject, evaluate_job.open_comparison(args, out, subject.split, clip)


def pictures(
  args: argparse.Namespace, out: Path, config: dict | None, shown: dict
) -> dict[str, Any] | None:
  """Scores of what the model draws, beside real pictures and the untrained model's."""
  subject, comparison = open_subject(args, out, config)
  weights = subject.weights(args.ema_halflife_images)
  found = comparison({
    'generated': subject.drawn(subject.sample, args.ema_halflife_images, weights=weights),
    'untrained': subject.untrained(weights), **subject.real(),
  })
  if found is None:
    return None
  return evaluate_job.report(
    args, comparison, found, shown, settings_of(subject), subject.about, subject.split('test')
  )


def sweep(
  args: argparse.Namespace, out: Path, config: dict | None, shown: dict
) -> dict[str, Any] | None:
  """Scores of every combination, beside real pictures; the page shows the best one's pictures."""
  from diffusion_jax.evaluation.sweep import (
    EMA,
    applied,
    best,
    combinations,
    network_calls,
  )
  from diffusion_jax.viz.sweep import label

  every = {label(one): one for one in combinations(args.sweep)}
  subject, comparison = open_subject(args, out, config)
  samples = {name: applied(subject.sample, one) for name, one in every.items()}
  for name, sample in samples.items():
    sample.check(subject.model.noise, subject.model.parameterization)
    subject.check_average(every[name].get(EMA))
  own = args.ema_halflife_images
  name_of_model = subject.identity(own)  # By all processes: they agree on the checkpoint.
  found = comparison({
    name: subject.drawn(sample, every[name].get(EMA, own), place=f'generated {name}')
    for name, sample in sorted(samples.items(), key=lambda item: every[item[0]].get(EMA, 0))
  } | subject.real(), choose=lambda figures: best({name: figures[name] for name in every}))
  if found is None:
    return None
  scores = evaluate_job.report(
    args, comparison, found, shown, about=subject.about, tested=subject.split('test')
  )
  scores['settings'] |= {
    'model': name_of_model, 'best': found.first, **settings_of(subject)
  }
  return scores | {'sweep': {
    name: {'combination': every[name], 'network_calls': network_calls(subject.model, sample)}
    for name, sample in samples.items()
  }}


