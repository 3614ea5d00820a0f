"""What the one train loop and the one step ask of a task."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.types import Params

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Sums and counts by name; adding them up over microbatches and steps keeps means exact."""

Memory = dict[str, jax.Array]
"""Arrays that training carries beside the parameters, such as past losses."""

Seen = Any
"""A pytree of arrays [b ...], what `remember` wants to know of each example."""

Frozen = dict[str, Params]
"""Parameters of the networks that are used but not trained, by role."""

Scores = dict[str, Any]
"""Metric values by column, such as {'generated': {...}, 'real': {...}}; beside them 'settings', and
sentences in 'measured', on what they were measured, and 'warnings'. The first is a column."""


class Task:
  """One thing to train. Holds networks without weights; all methods are free of hidden state.

  What most tasks do alike is done here: they begin with fresh parameters, carry no memory beside
  them, and let an update stand as it is. The rest has no default.
  """

  name: str
  frozen: Frozen
  """Host arrays of the frozen networks; the loop puts them onto the mesh."""
  batch_fields: tuple[str, ...]
  """Fields of a record that the loss reads; the rest never reaches a device."""
  shows: str
  """A sentence: what the pictures of `preview` and their captions are."""

  def initialize(self, key: jax.Array) -> Params:
    """Fresh trainable parameters; pure."""
    raise NotImplementedError

  def start(self, mesh: Mesh) -> Params | None:
    """Parameters on the mesh to begin with, such as pretrained ones; None for fresh ones."""
    del mesh
    return None

  def memory(self) -> Memory:
    """What training begins to carry beside the parameters; replicated and checkpointed."""
    return {}

  def loss(
    self, params: Params, frozen: Frozen, memory: Memory, batch: dict, key: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, tuple[Metrics, Seen]]:
    """Mean loss over the batch, metrics, and what `remember` wants of each example; pure."""
    raise NotImplementedError

  def remember(self, memory: Memory, seen: Seen) -> Memory:
    """The memory after a step that has seen these examples of the global batch; pure."""
    del seen
    return memory

  def constrain(self, params: Params) -> Params:
    """Projects parameters after an update, such as a clamp; pure."""
    return params

  def preview(self, params: Params, frozen: Frozen, mesh: Mesh) -> tuple[np.ndarray, list[str]]:
    """A fixed set of pictures, uint8 [n h w 3], with their captions, to compare over time."""
    raise NotImplementedError

  def evaluate(
    self, params: Params, frozen: Frozen, mesh: Mesh, *, samples: int, final: bool
  ) -> Scores:
    """Scores on the test split; `final` adds the columns to compare with."""
    raise NotImplementedError

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Writes the trained model as safetensors with its configuration and model card."""
    raise NotImplementedError


def answer(given: str, true: str) -> str:
  """The caption of a test image that a network has named: its answer, and whether it is right."""
  return f'right: {true}' if given == true else f'says {given}; is {true}'


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
