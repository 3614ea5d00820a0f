"""The loss on pictures that are not trained on, with fixed noise at fixed times."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import jit
from diffusion_jax.diffusion.objective import Objective, ObjectiveConfig
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import EVALUATE, Cached, Value, seed_of
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.likelihood import image_keys, over_images
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Condition, Latents, Params, Record, Source, Weights

GOLDEN = (5**0.5 - 1) / 2
LOSS, SEEN, GAP = 'held_out_loss', 'seen_loss', 'held_out_gap'


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HeldOutLoss(Cached):
  """held_out_loss of the first `pictures` test records in the order of `shuffled`, or of all.

  The weighted error of the prediction (`Objective.losses_at`), of z at its mean for the first
  caption, none dropped, in the mean over `levels` times of each: one in each of as many equal
  ranges of the quantiles of the objective's times, cleanest first, at a place and with noise that
  the seed and the record's number fix. held_out_loss_{n}_of_{k} are the means within the ranges.
  seen_loss is the same of as many training records, and held_out_gap the difference: what is
  learned by heart.
  """

  train: Source
  test: Source
  mesh: Mesh
  objective: ObjectiveConfig | None = None
  pictures: int = 64
  levels: int = 4
  batch_size: int = 32
  name = 'held_out_loss'
  when = EVALUATE

  def __post_init__(self):
    if not isinstance(self.objective, ObjectiveConfig):
      raise UserError(
        f'loop.evaluators has {self.name}, which is of tasks with settings.objective; leave it out.'
      )
    for key in ('pictures', 'levels', 'batch_size'):
      value = getattr(self, key)
      if type(value) is not int or value < 1:
        raise UserError(f'{key} of {self.name} is {value!r}; give a whole number from 1 on.')
    if not len(self.test):
      raise UserError(
        f'{self.name} needs a test split, which is empty; set data.test_fraction above 0.'
      )

  @property
  def metrics(self) -> list[str]:
    ranges = [f'{LOSS}_{n}_of_{self.levels}' for n in range(1, self.levels + 1)]
    return [LOSS, *ranges, SEEN, GAP]

  def run(self, model: Diffusion, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    seed = seed_of(key)
    held_out, seen = (
      self._losses(name, source, model, params, seed)
      for name, source in (('test', self.test), ('train', self.train))
    )
    yield LOSS, held_out.mean()
    for n, value in enumerate(held_out.mean(axis=0), 1):
      yield f'{LOSS}_{n}_of_{self.levels}', value
    yield SEEN, seen.mean()
    yield GAP, held_out.mean() - seen.mean()
    yield 'settings', {'held_out_pictures': len(held_out), 'held_out_levels': self.levels}

  def _losses(
    self, name: str, source: Source, model: Diffusion, weights: Weights, seed: int
  ) -> np.ndarray:
    """Return the losses, float64 [n levels], of the records of a split."""
    found = []
    for z, rows, start in self.once(name, lambda: self._given(source, model, weights)):
      score = self.once('score', lambda: make_scorer(
        model, Objective(self.objective, model.noise, model.parameterization),
        tuple(rows), self.levels,  # noqa: B023
      ))
      keys = image_keys(jax.random.key(seed), start + len(z))[start:]
      # Evenly spread for any number of records (the golden ratio's multiples).
      places = np.mod(GOLDEN * (1 + np.arange(start, start + len(z))), 1).astype(np.float32)
      found.append(over_images(
        score, weights, z, keys, places, *rows.values(), mesh=self.mesh,
        batch_size=min(self.batch_size, len(z)), label='held-out loss',
      )['loss'])
    return np.concatenate(found).astype(np.float64)

  def _given(
    self, source: Source, model: Diffusion, weights: Weights
  ) -> list[tuple[np.ndarray, dict[str, np.ndarray], int]]:
    """(z [n ...], `Diffusion.rows`, number of the first) of the records of each size.

    Made once: none of it changes.
    """
    of_size: dict[tuple[int, ...], list[Record]] = {}
    for record in shuffled(source, min(self.pictures, len(source))):
      of_size.setdefault(record[model.space.field].shape, []).append(record)
    found, start = [], 0
    for shape, records in of_size.items():
      z = self._encoded(records, model, weights)
      captions = [model.prompt(record) for record in records]
      rows = model.rows(captions, height=shape[0], width=shape[1]) if model.conditioners else {}
      found.append((z, rows, start))
      start += len(z)
    return found

  def _encoded(self, records: Sequence[Record], model: Diffusion, weights: Weights) -> np.ndarray:
    """Return z [n ...] of records of one size, at its mean."""
    space = model.space
    examples = np.stack([record[space.field] for record in records])
    encode = lambda weights, x: space.encode(weights, to_float(x) if x.dtype == np.uint8 else x)
    if not space.networks:
      return np.asarray(encode({}, examples))
    return np.concatenate(list(in_batches(
      jit(encode), {role: weights[role] for role in space.networks}, examples, mesh=self.mesh,
      batch_size=self.batch_size,
    )))


def make_scorer(
  model: Diffusion, objective: Objective, names: Sequence[str], levels: int
) -> Callable[..., Params]:
  """The function (weights, z [b ...], key data [b k], places [b], columns) -> 'loss' [b levels].

  places: in [0, 1), within each of the `levels` ranges of times. columns: those of
  `Diffusion.rows` with these names.
  """

  @jit
  def score(weights: Weights, z: Latents, keys, places, *columns):
    rows = dict(zip(names, columns, strict=True))
    condition = model.condition(weights, rows) if rows else Condition()
    network = model.network(weights)
    keys = jax.random.wrap_key_data(keys)

    def one(number: jax.Array) -> jax.Array:
      own = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
      eps = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(own)
      # A variance that is predicted, too, is left out.
      predict = lambda x, t: network(x, t, condition)[..., : z.shape[-1]]
      return objective.losses_at(predict, z, eps, (number + places) / levels)

    return {'loss': jax.lax.map(one, jnp.arange(levels)).T}

  return score
