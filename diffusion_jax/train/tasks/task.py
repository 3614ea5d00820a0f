"""What the one train loop and the one step ask of a task."""

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation.evaluator import Evaluator, Scores
from diffusion_jax.types import Params, Weights

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Sums and counts by name; adding them up over microbatches and steps keeps means exact."""

Carry = dict[str, jax.Array]
"""Arrays that training carries beside the parameters, such as past losses."""

Observed = Any
"""A pytree of arrays [b ...], what `next_carry` needs of each example."""

Frozen = dict[str, Params]
"""Parameters of the networks that are used but not trained, by role."""


class Task(abc.ABC):
  """One thing to train. Holds networks without weights; all methods are free of hidden state.

  A task has a loss and a way to initialise its parameters. All else has a default: nothing is
  carried beside the parameters, and an update stands as it is.
  """

  Config: ClassVar[type]
  """The dataclass of its `settings` in a config."""
  name: ClassVar[str]
  title: ClassVar[str]
  """What is trained, for a model card."""
  frozen: Frozen
  """Host arrays of the frozen networks; the loop puts them onto the mesh."""
  batch_fields: tuple[str, ...]
  """Fields of a record that the loss reads; the rest never reaches a device."""
  model: Any = None
  """What evaluators are given with its weights."""

  @abc.abstractmethod
  def initialize(self, key: jax.Array) -> Params:
    """Return fresh trainable parameters; pure."""

  @abc.abstractmethod
  def loss(
    self, params: Params, frozen: Frozen, carry: Carry, batch: dict, key: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, tuple[Metrics, Observed]]:
    """Return the mean loss over the batch, (metrics, what `next_carry` needs); pure."""

  def start(self, mesh: Mesh) -> Params | None:
    """Return parameters on the mesh to begin with, such as pretrained ones; None for fresh ones."""
    del mesh
    return None

  def carry(self) -> Carry:
    """Return what training begins to carry; replicated and checkpointed."""
    return {}

  def next_carry(self, carry: Carry, observed: Observed) -> Carry:
    """Return the carry after a step on these examples of the global batch; pure."""
    del observed
    return carry

  def constrain(self, params: Params) -> Params:
    """Project parameters after an update, such as by a clamp; pure."""
    return params

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    """Return all weights of `model`, of what is trained and of what is not."""
    del frozen
    return params

  def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
    """Return what shows and scores `model` on the test split; nothing heavy is loaded here."""
    del mesh
    return ()

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the trained model as safetensors with its configuration and model card."""
    raise NotImplementedError


def mean_metric(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sum, count) of a scalar or of one value per example."""
  return values.sum(), jax.numpy.asarray(values.size, jax.numpy.float32)


def combine(totals: Metrics, new: Metrics) -> Metrics:
  """Adds the sums and counts of two dictionaries with the same names; an empty one is neutral."""
  return jax.tree.map(lambda a, b: a + b, totals, new) if totals else new


def averages(metrics: Metrics) -> dict[str, float | list[float | None]]:
  """Sums and counts on the host -> means; vectors become lists with None where nothing fell."""
  out = {}
  for name, (total, count) in metrics.items():
    total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    out[name] = (
      float(mean) if not mean.ndim else [None if np.isnan(m) else float(m) for m in mean]
    )
  return out
