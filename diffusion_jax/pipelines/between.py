"""Conditions on the way from one prompt to another: columns of rows, and what is mixed of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import require

TOWARD = 'toward'
"""Column of the fractions [n] of the way; the other end's columns are named 'toward.NAME'."""

Rows = Mapping[str, Any]


def way(here: Rows, there: Rows, fractions: np.ndarray) -> dict[str, np.ndarray]:
  """Return the columns that lead from rows to other rows; none where both are the same.

  UserError: texts of different numbers of chunks, whose places have nothing in common.
  """
  for name, value in there.items():
    require(
      value.shape == here[name].shape,
      'one of the prompts is read in more chunks than the other; shorten it, or leave '
      'prompt_syntax at plain.',
    )
  other = {name: v for name, v in there.items() if not np.array_equal(v, here[name])}
  found = {f'{TOWARD}.{name}': value for name, value in other.items()}
  return found and {TOWARD: np.asarray(fractions, np.float32), **found}


def ends(rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return the rows of both ends of a way."""
  start = f'{TOWARD}.'
  here = {name: v for name, v in rows.items() if name != TOWARD and not name.startswith(start)}
  return here, here | {n.removeprefix(start): v for n, v in rows.items() if n.startswith(start)}


def mixed(fractions: jax.Array, here: Any, there: Any) -> Any:
  """Return trees of arrays [n ...] at fractions [n] of the way from the one to the other.

  What is continuous is mixed in proportion; the rest, such as the number of a class, is that of the
  nearer end.
  """
  def mix(here: jax.Array, there: jax.Array) -> jax.Array:
    w = fractions.reshape(-1, *(1,) * (here.ndim - 1))
    if not jnp.issubdtype(here.dtype, jnp.floating):
      return jnp.where(w < 0.5, here, there)
    return (here + w.astype(here.dtype) * (there - here)).astype(here.dtype)

  return jax.tree.map(mix, here, there)
