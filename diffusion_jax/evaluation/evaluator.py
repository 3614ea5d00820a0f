"""Evaluators score a model, or show what it makes: the same while it is trained and after."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import UInt8

from diffusion_jax.pipelines.model import DENOISER
from diffusion_jax.types import Params, Scores, Weights

SAMPLE, EVALUATE = 'sample', 'evaluate'
TEST = 'test'
"""The column of a model that is scored on what it makes of test records."""


class Picture(NamedTuple):
  """Images of a fixed input, to compare over time, perhaps of several sizes; captions: one each;
  about: one sentence."""

  images: UInt8[np.ndarray, 'n h w 3'] | Sequence[UInt8[np.ndarray, 'h w 3']]
  captions: Sequence[str]
  about: str = ''


Value = float | Picture | Mapping[str, Any] | Sequence[str]


class Evaluator(Protocol):
  """Score a model, or show its samples.

  Attributes:
    name: of the row in `registry.EVALUATORS`.
    when: 'sample' or 'evaluate': it runs every loop.sample_every_steps or evaluate_every_steps, and
      at the end of a run.

  Dataclasses may have fields that the caller sets (`with_options`): samples, how many; seconds,
  their time budget; baselines, whether to add columns for comparison. Those with names known
  beforehand may have `metrics`, all value names, and `features`, the scoring networks, KIND:PATH
  each; reading them loads networks, or raises a UserError.
  """

  name: str
  when: str

  def run(self, model: Any, params: Params, key: jax.Array) -> Iterator[tuple[str, Value]]:
    """Yield (name, value).

    Numbers are named COLUMN.METRIC, or METRIC in the first column; 'measured' and 'warnings' are
    sentences, 'settings' decide the numbers, others of BESIDE are kept as they are. All else is a
    `Picture`. model: of the task, such as `pipelines.model.Diffusion`; params: all its weights.
    key: typed, of one seed for comparable results.
    """
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Cached:
  """An evaluator that makes some things once, such as compiled programs.

  cache: shared by all copies that `with_options` makes.
  """

  cache: dict[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)

  def once(self, name: str, make: Callable[[], Any]) -> Any:
    """Return what `make` has returned when it was first asked for by that name."""
    if name not in self.cache:
      self.cache[name] = make()
    return self.cache[name]


def with_options(evaluator: Evaluator, **options: Any) -> Evaluator:
  """Return the evaluator with those of the options that it has fields for."""
  known = dataclasses.fields(evaluator) if dataclasses.is_dataclass(evaluator) else ()
  given = {field.name: options[field.name] for field in known if field.name in options}
  return dataclasses.replace(evaluator, **given) if given else evaluator


def run_all(
  evaluators: Iterable[Evaluator], model: Any, params: Params, key: jax.Array, **options: Any
) -> Iterator[tuple[str, Value]]:
  """Yield what several evaluators yield, each with those of the options that it knows."""
  for evaluator in evaluators:
    yield from with_options(evaluator, **options).run(model, params, key)


SENTENCES = ('measured', 'warnings')
BESIDE = ('intervals', *SENTENCES, 'settings', 'sweep', 'history', 'bound_by_step', 'settling')
"""Entries of scores that are no columns."""


def scores_of(
  results: Iterable[tuple[str, Value]], first: str = TEST, known: Mapping[str, Any] | None = None
) -> Scores:
  """The numbers by column, sentences and settings; pictures are left out, first settings win.

  first: the column of numbers without one before them. known: scores to add to.
  """
  found = {name: dict(value) if isinstance(value, Mapping) else value
           for name, value in (known or {}).items()}
  for name, value in results:
    if name in SENTENCES:
      found[name] = [*found.get(name, ()), *value]
    elif name == 'settings':
      found[name] = dict(value) | found.get(name, {})
    elif name in BESIDE:
      found[name] = value
    elif not isinstance(value, Picture):
      column, _, metric = name.rpartition('.')
      column = column or next((one for one in found if one not in BESIDE), first)
      found.setdefault(column, {})[metric] = float(value)
  columns = {name: value for name, value in found.items() if name not in BESIDE}
  return columns | found


def named(columns: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, float]]:
  """Yield the numbers of columns as an evaluator does."""
  for column, values in columns.items():
    for metric, value in values.items():
      yield f'{column}.{metric}', value


def with_untrained(
  model: Any, weights: Weights, wanted: bool = True
) -> Iterator[tuple[str, Weights]]:
  """Yield (column, weights) of a model and, if wanted, of the same denoiser untrained."""
  yield 'generated', weights
  if wanted:
    yield 'untrained', {DENOISER: jax.jit(model.denoiser.initialize)(jax.random.key(1))}


def seed_of(key: jax.Array) -> int:
  """Return the seed that a key was made of by `jax.random.key`."""
  return int(jax.random.key_data(key)[-1])
