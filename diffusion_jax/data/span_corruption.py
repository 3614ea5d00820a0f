"""Span corruption, what T5 is trained on (Raffel et al. 2020, section 3.1.4).

Random spans of a text are left out, each replaced by a sentinel of its own; the target is what was
left out, span after span, each after its sentinel.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np


def packed(texts: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
  """Join whole texts, int32 [n] each, as long as they fit into `length` tokens; cut longer ones."""
  return list(_packed(texts, length))


def _packed(texts: Sequence[np.ndarray], length: int) -> Iterator[np.ndarray]:
  group, room = [], length
  for text in texts:
    text = text[:length]
    if len(text) > room:
      yield np.concatenate(group)
      group, room = [], length
    group.append(text)
    room -= len(text)
  if group:
    yield np.concatenate(group)


def spans_of(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """(tokens that are left out, in how many spans) of a text of `length` >= 2 tokens."""
  noise = min(max(round(length * density), 1), length - 1)
  return noise, min(max(round(noise / mean_span), 1), length - noise)


def noise_mask(
  length: int, density: float, mean_span: float, rng: np.random.Generator
) -> np.ndarray:
  """Which of `length` >= 2 tokens are left out, bool [length]: `density` of them, in random spans.

  All ways to divide both kinds of tokens into so many spans are equally likely, on a ring that is
  opened at a random place: so every token is as likely, and one span may become two.
  """
  noise, spans = spans_of(length, density, mean_span)
  lengths = np.empty(2 * spans, int)
  lengths[::2], lengths[1::2] = (_divided(n, spans, rng) for n in (length - noise, noise))
  return np.roll(np.repeat(np.arange(2 * spans) % 2 == 1, lengths), rng.integers(length))


def _divided(count: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """Lengths of at least 1 whose sum is `count`."""
  borders = np.sort(rng.choice(count - 1, parts - 1, replace=False)) + 1
  return np.diff(np.concatenate([[0], borders, [count]]))


def corrupted(tokens: np.ndarray, mask: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
  """(what is seen, what is to be said): the spans of `mask` by sentinels first, first - 1, ..."""
  starts = mask & ~np.concatenate([[False], mask[:-1]])
  sentinels = first + 1 - np.cumsum(starts)
  seen = np.where(starts, sentinels, tokens)[~mask | starts]
  return seen, np.insert(tokens[mask], np.flatnonzero(starts[mask]), sentinels[starts])


def lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """The longest (input, target) of a text of up to `length` tokens, the end token included."""
  longest = [0, 0]
  for n in range(2, length + 1):
    noise, spans = spans_of(n, density, mean_span)
    # One span more where the ring is opened within one.
    longest = np.maximum(longest, [n - noise + spans + 2, noise + spans + 2])
  return int(longest[0]), int(longest[1])


@dataclasses.dataclass(frozen=True)
class CorruptSpans:
  """A record's 'tokens', int32 [n], 2 <= n <= length -> 'inputs', 'mask' [l], 'targets' [t].

  mask is 1 where `inputs` are no padding, and targets are `pad` where nothing is to be said. Both
  end with `end`.

  Attributes:
    sentinel: id of the first sentinel; those of later spans count downwards.
    density: fraction of the tokens that is left out; mean_span: of so many tokens on average.
  """

  length: int
  sentinel: int
  end: int = 1
  pad: int = 0
  density: float = 0.15
  mean_span: float = 3.0
  random: ClassVar[bool] = True

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    tokens = record['tokens']
    mask = noise_mask(len(tokens), self.density, self.mean_span, rng)
    longest = lengths(self.length, self.density, self.mean_span)
    pair = corrupted(tokens, mask, self.sentinel)
    inputs, targets = (self._ended(each, n) for each, n in zip(pair, longest, strict=True))
    seen = (np.cumsum(inputs == self.end) - (inputs == self.end) == 0).astype(np.int32)
    return {'inputs': inputs, 'mask': seen, 'targets': targets}

  def _ended(self, tokens: np.ndarray, length: int) -> np.ndarray:
    out = np.full(length, self.pad, np.int32)
    out[: len(tokens)], out[len(tokens)] = tokens, self.end
    return out
