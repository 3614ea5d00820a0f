"""What the backward pass computes again instead of keeping it (Chen et al. 2016).

A block is a residual block, a transformer block or one of the few layers between such. A network
whose class is a `Blocks` runs its blocks by `run`, and all of itself by `run_all`; what
they then do is said by `remat`, which `Network.of` sets.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

REMAT = ('none', 'block', 'offload')
"""none: all results are kept. block: only those of blocks, each of which is computed again.
offload: those, too, wait for the backward pass in the host's memory."""

RESULT = 'block'


@partial(jax.jit, static_argnums=0)
def _once(graphdef: Any, state: Any, *args) -> Any:
  return nnx.merge(graphdef, state)(*args)


class Blocks(nnx.Module):
  """A module that has blocks. `remat` is one of REMAT."""

  remat = 'none'

  def run(self, call: Callable[..., Any], *args) -> Any:
    """call(*args), of which the backward pass finds the arguments alone.

    A module that is like another, with arguments like those of the other, is traced once.
    """
    if isinstance(call, nnx.Module):
      graphdef, state = nnx.split(call)
      call, args = partial(_once, graphdef), (state, *args)
    if self.remat == 'none':
      return call(*args)
    result = jax.checkpoint(lambda *args: call(*args))(*args)
    return jax.tree.map(lambda y: checkpoint_name(y, RESULT), result)

  def run_all(self, call: Callable[..., Any], *args) -> Any:
    """call(*args), in which `run` is used; results of blocks move to the host if so wished."""
    if self.remat != 'offload':
      return call(*args)
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[], names_which_can_be_offloaded=[RESULT],
      offload_src='device', offload_dst='pinned_host',
    )
    # The blocks within keep XLA from merging both computations of anything that is large.
    return jax.checkpoint(lambda *args: call(*args), policy=policy, prevent_cse=False)(*args)
