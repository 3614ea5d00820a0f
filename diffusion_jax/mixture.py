"""Data of several sources: what a config says of each, and how often each is read."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.limits import Fraction, Range

_NEAR = 0.005
"""Relative error of a part's share from which on more passes are not worth it."""
_MOST_EXAMPLES = 2**24
"""Examples of an epoch that nearer shares may lead to."""

Much = Annotated[float, Range(0, above=True)]


@dataclasses.dataclass(frozen=True)
class PartConfig:
  """One of several sources of data.

  How often: weight: examples, in proportion to the other parts' weights, however many records each
  has. repeats: passes over its records, in proportion to the other parts'; all parts have one of
  the two, by default one pass. share: fraction of the examples of every step; the other parts have
  what is left.

  dataset, caption, caption_column, test_fraction, data_dir, background: as those of all data, which
  are the default. prefix, suffix: of every caption. caption_dropout: as of the task, which is the
  default. transforms: of its records, before those of all.
  """

  dataset: str
  weight: Much | None = None
  repeats: Much | None = None
  share: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
  caption: str | None = None
  caption_column: str | None = None
  test_fraction: Fraction | None = None
  data_dir: str | None = None
  background: str | None = None
  prefix: str = ''
  suffix: str = ''
  caption_dropout: Fraction | None = None
  transforms: tuple = ()

  def __post_init__(self):
    given = [name for name in ('weight', 'repeats', 'share') if getattr(self, name) is not None]
    if len(given) > 1:
      raise UserError(
        f'data.mixture has {" and ".join(given)} for {self.dataset}; leave one of them.'
      )

  def of_data(self) -> dict[str, Any]:
    """The keys of a `DataConfig` that are its own."""
    names = (
      'dataset', 'caption', 'caption_column', 'test_fraction', 'data_dir', 'background'
    )
    own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
    return own | {'mixture': {}, 'test_of': '', 'transforms': self.transforms}


def check_mixture(mixture: Mapping[str, PartConfig], dataset: str, test_of: str) -> None:
  """Raise UserError for what cannot be together."""
  if not mixture and not dataset:
    raise UserError('data.dataset is empty; name a data set, or several in data.mixture.')
  if mixture and dataset:
    raise UserError(
      f"data.dataset is {dataset!r} and data.mixture has more; set data.dataset to '' and name it "
      'in data.mixture, or leave data.mixture out.'
    )
  if test_of and test_of not in mixture:
    raise UserError(
      f'data.test_of is {test_of!r}; leave it empty for the test records of all, or give one of '
      f'{", ".join(mixture) or "data.mixture, which is empty"}.'
    )
  of = {
    key: [name for name, part in mixture.items() if getattr(part, key) is not None]
    for key in ('weight', 'repeats', 'share')
  }
  if of['weight'] and of['repeats']:
    raise UserError(
      f'data.mixture has a weight for {of["weight"][0]} and repeats for {of["repeats"][0]}; give '
      'all of them weights, or all repeats.'
    )
  bare = [name for name in mixture if not any(name in names for names in of.values())]
  if of['weight'] and bare:
    raise UserError(f'data.mixture.{bare[0]} has no weight, but {of["weight"][0]} has; give one.')
  total, rest = sum(mixture[name].share for name in of['share']), len(mixture) - len(of['share'])
  if of['share'] and (total >= 1 if rest else abs(total - 1) > 1e-6):
    raise UserError(
      f'the shares of data.mixture are {total:g} together; '
      + ('leave some below 1 to the other parts.' if rest else 'make them 1.')
    )


def described(mixture: Mapping[str, PartConfig]) -> str:
  """A mixture as the name of a data set: the names of its parts, with their data sets."""
  return 'mixture: ' + ', '.join(f'{name} ({part.dataset})' for name, part in mixture.items())


class Passes(NamedTuple):
  """How often an epoch goes over the records of each part, int64 [parts], of so many records."""

  counts: np.ndarray
  passes: np.ndarray

  @property
  def shares(self) -> np.ndarray:
    """Fractions of the examples, float64 [parts]."""
    examples = self.counts * self.passes
    return examples / examples.sum()


def passes_of(parts: Sequence[PartConfig], counts: Sequence[int]) -> Passes:
  """The fewest whole passes that come near to the wanted shares; the rarest part has one, or few.

  counts: records of each part, one at least.
  """
  records = np.asarray(counts, np.int64)
  wanted = wanted_shares(parts, counts)
  rates = wanted / records
  rates /= rates.min()
  best, least = np.ones(len(records), np.int64), np.inf
  for most in range(1, 1 + int(1 / _NEAR)):
    passes = np.maximum(np.rint(most * rates), 1).astype(np.int64)
    found = Passes(records, passes)
    if most > 1 and (records * passes).sum() > _MOST_EXAMPLES:
      break
    error = float(np.abs(found.shares / wanted - 1).max())
    if error < least:
      best, least = passes, error
    if least <= _NEAR:
      break
  return Passes(records, best)


def wanted_shares(parts: Sequence[PartConfig], counts: Sequence[int]) -> np.ndarray:
  """Fractions of the examples that a config asks for, float64 [parts]."""
  fixed = np.array([part.share or 0.0 for part in parts])
  mass = np.array([
    0.0 if part.share else part.weight or (part.repeats or 1.0) * count
    for part, count in zip(parts, counts, strict=True)
  ])
  return fixed + (1 - fixed.sum()) * mass / mass.sum() if mass.any() else fixed / fixed.sum()
