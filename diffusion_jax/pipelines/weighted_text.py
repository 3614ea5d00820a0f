"""Prompts with weights as text encoders read them: chunks of tokens, each token with its weight.

What the text says is parsed by `prompts`; here it becomes numbers, and the hidden states of a chunk
become those of its weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.models.text.tokenizer import Cut, Tokenize, shortened
from diffusion_jax.pipelines.prompts import Piece, Token, chunks, parse

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

MOST_CHUNKS = 16
"""Chunks of a prompt; the denoiser attends to every token of all."""
MOST_WEIGHT = 100.0
LEAST_MEAN = 1e-4
ANY = 2**31
"""Tokens that no prompt has."""


class Weighted(NamedTuple):
  """tokens: int32 [n c l], the framed and padded tokens of c chunks of n prompts. weights: float32
  [n c l], 1 for the frame and for padding.
  """

  tokens: np.ndarray
  weights: np.ndarray

  def padded(self, count: int, other: 'Weighted') -> 'Weighted':
    """Return it with `count` chunks, by those of the first prompt of `other`, the empty one."""
    missing = count - self.tokens.shape[1]
    filled = lambda x, empty: np.concatenate(
      [x, np.tile(empty[:1, :1], (len(x), missing, 1))], axis=1
    )
    return Weighted(*map(filled, self, other)) if missing else self

  def widened(self, length: int) -> 'Weighted':
    """Return it with zeros up to `length` tokens a chunk."""
    missing = ((0, 0), (0, 0), (0, length - self.tokens.shape[2]))
    return Weighted(*(np.pad(x, missing) for x in self))


def weighted_tokens(
  tokenizer: 'PreTrainedTokenizerBase', prompts: Sequence[str], length: int, chunked: bool,
  cut: Cut,
) -> Weighted:
  """Prompts with weights -> chunks of `length` tokens, empty ones at the end of shorter prompts.

  Args:
    chunked: whether long prompts are divided; else they are cut after one chunk, and `cut` is told.

  Raises:
    UserError: a prompt of more than MOST_CHUNKS, or of weights beyond MOST_WEIGHT.
  """
  whole = Tokenize(tokenizer, length * MOST_CHUNKS, 'error')
  begin, end = whole.frame
  room, comma = length - len(begin) - len(end), _comma(tokenizer)
  found = []
  for prompt in prompts:
    sections = [_spaced(section) for section in parse(whole.bounded(prompt))]
    _check_weights(prompt, [piece.weight for section in sections for piece in section])
    if chunked:
      parts = chunks(sections, whole.unframed, room, comma)
    else:
      [tokens] = chunks([[piece for section in sections for piece in section]], whole.unframed, ANY)
      parts = [tokens[:room]]
      if rest := [token.id for token in tokens[room:]]:
        cut.count([(prompt, len(rest))], room, tokenizer.decode(rest))
    if len(parts) > MOST_CHUNKS:
      raise UserError(
        f'The prompt {shortened(prompt)!r} makes {len(parts)} chunks of {room} tokens, where '
        f'{MOST_CHUNKS} may be; shorten it.'
      )
    found.append(parts)
  count = max(map(len, found))
  framed = lambda part: (
    [Token(id) for id in begin] + part + [Token(id) for id in end]
    + [Token(whole.pad)] * (room - len(part))
  )
  every = [[framed(part) for part in parts + [[]] * (count - len(parts))] for parts in found]
  both = np.asarray(every)
  return Weighted(both[..., 0].astype(np.int32), both[..., 1].astype(np.float32))


def _spaced(section: Sequence[Piece]) -> list[Piece]:
  """Move spaces at the end of a piece to the next: byte-level tokens begin with theirs."""
  out: list[Piece] = []
  for text, weight in section:
    if out:
      kept = out[-1].text.rstrip()
      text = out[-1].text[len(kept) :] + text
      out[-1] = Piece(kept, out[-1].weight)
    out.append(Piece(text, weight))
  return out


def _comma(tokenizer: 'PreTrainedTokenizerBase') -> int | None:
  ids = tokenizer(',', add_special_tokens=False)['input_ids']
  return ids[0] if len(ids) == 1 and ids[0] not in tokenizer.all_special_ids else None


def _check_weights(prompt: str, weights: Sequence[float]) -> None:
  for weight in weights:
    if not abs(weight) <= MOST_WEIGHT:
      raise UserError(
        f'The prompt {shortened(prompt)!r} has a weight of {weight:g}; give weights of at most '
        f'{MOST_WEIGHT:g}, also where brackets nest.'
      )


def weigh(text: jax.Array, weights: jax.Array) -> jax.Array:
  """Hidden states [b l d] times the weights of their tokens [b l], with the mean that they had.

  The mean is over the tokens and features of a chunk, as the Stable Diffusion web UI has it for one
  prompt. Where it says nothing, because it is below LEAST_MEAN of the mean size, as after a norm
  that was never trained, nothing is rescaled.
  """
  mean = lambda x: x.mean((1, 2), keepdims=True)
  out = text * weights[..., None]
  before, after = mean(text), mean(out)
  least = LEAST_MEAN * mean(jnp.abs(text))
  known = (jnp.abs(before) > least) & (jnp.abs(after) > least)
  return out * jnp.where(known, before / jnp.where(known, after, 1.0), 1.0)
