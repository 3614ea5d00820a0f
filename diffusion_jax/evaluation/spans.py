"""Scores a T5 by how well it fills in spans of held-out texts."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import jit
from diffusion_jax.data.span_corruption import CorruptSpans
from diffusion_jax.data.unreadable import first_readable
from diffusion_jax.evaluation.evaluator import EVALUATE, TEST, Cached, Value, named
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.t5_decoder import token_losses
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.types import Params, Source


@dataclasses.dataclass(frozen=True, eq=False)
class SpanCorruption(Cached):
  """Loss in nats and accuracy of the tokens that were left out; the spans are always the same.

  With baselines an answer that knows nothing but how common each token is in the test, too.
  """

  test: Source
  tokens: Callable[[Sequence[str]], list[np.ndarray]]
  corrupt: CorruptSpans
  pad: int
  mesh: Mesh
  samples: int = 256
  baselines: bool = True
  name = 'span_corruption'
  when = EVALUATE

  def run(self, model: Network, params: Params, key) -> Iterator[tuple[str, Value]]:
    examples = self._examples()
    count = self.once('losses', lambda: _counted(model, self.pad))
    fields = ('inputs', 'mask', 'targets')
    columns = [np.stack([each[name] for each in examples]) for name in fields]
    sums = np.concatenate(list(in_batches(count, params, *columns, mesh=self.mesh)))
    yield from named({TEST: _scores(*sums.sum(0, dtype=np.float64), len(examples))})
    if self.baselines:
      targets = columns[2][columns[2] != self.pad]
      _, counts = np.unique(targets, return_counts=True)
      entropy = -(counts * np.log(counts / counts.sum())).sum()
      yield from named({'commonest': _scores(entropy, counts.max(), counts.sum(), len(examples))})

  def _examples(self) -> list[dict[str, np.ndarray]]:
    records = first_readable(self.test, self.samples)
    tokens = self.tokens([record['captions'][0] for record in records])
    return [
      self.corrupt({'tokens': each[: self.corrupt.length]}, np.random.default_rng(number))
      for number, each in enumerate(tokens) if len(each) > 1
    ]


def _scores(loss: float, right: float, real: float, texts: int) -> dict[str, float]:
  loss = float(loss / real)
  return {
    'token_loss': loss, 'perplexity': math.exp(loss), 'token_accuracy': float(right / real),
    'texts': float(texts),
  }


def _counted(network: Network, pad: int) -> Callable:
  """Return a compiled (params, inputs, mask, targets) -> sums over each example, float32 [b 3]."""
  def count(params, inputs, mask, targets):
    loss, right, real = token_losses(network.bind(params), inputs, mask, targets, pad)
    return jnp.stack([loss.sum(1), right.sum(1), real.sum(1)], axis=1)

  return jit(count)
