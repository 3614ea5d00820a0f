"""Tokenizers: byte-level BPE (Sennrich et al. 2016) trained here, or any of transformers' applied.

Texts are framed, padded to a fixed length, or cut, counted and reported. Ours has CLIP's frame,
<|startoftext|> ... <|endoftext|>, padded with <|endoftext|>; T5's ends with </s> and has a padding
token. Files are those of transformers, so published tokenizers load.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from diffusion_jax.errors import UserError, require
from diffusion_jax.files import MOST_BYTES, inside, read_object, reading

CHARACTERS = 256
"""The most that are read of a text for each token of the model; English has about 4 a token."""


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text)


class Cut:
  """A count of the different texts that were cut, reported by the first process.

  After the first, tenth, hundredth ... of them, so rarely for millions. Several threads may count.
  reader: the name of what reads them.
  """

  def __init__(self, say: Callable[[str], None] = _say, reader: str = 'the model'):
    self._say, self._reader, self._lock = say, reader, threading.Lock()
    self._known: set[int] = set()
    self._tokens, self._next = 0, 1

  def count(self, texts: list[tuple[str, int]], room: int, rest: str = '') -> None:
    """Take note of texts, each with the tokens that were left out of what was looked at.

    Args:
      room: tokens of a text that are read.
      rest: what was left out of the first text, where that is known.
    """
    with self._lock:
      for text, over in texts:
        if hash(text) not in self._known:
          self._known.add(hash(text))
          self._tokens += over
      if len(self._known) < self._next:
        return
      self._next = 10 ** len(str(len(self._known)))
      many = len(self._known)
      self._say(
        f'note: {many:,} text{"s" * (many > 1)} so far, such as {shortened(texts[0][0])!r}, '
        f'{"are" if many > 1 else "is"} longer than the {room} tokens that {self._reader} '
        f'reads; at least {self._tokens:,} tokens are left out.'
        + f' Of this one that is {shortened(rest.strip())!r}.' * bool(rest.strip())
      )


def shortened(text: str, length: int = 60) -> str:
  """The text, or its beginning and three points."""
  return text if len(text) <= length else text[: length - 3] + '...'


if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

BOS, EOS = '<|startoftext|>', '<|endoftext|>'
DIRECT = ('CLIPTokenizer', 'TokenizersBackend')
"""Classes of transformers that read their files by themselves: CLIP's, and that of ours."""
_FILES = ('.json', '.txt', '.model', '.jinja')

SMALLEST = 256 + 2
"""Every byte is a token, so that any text can be written; and the two frame tokens."""

AT_A_TIME = 256
"""Texts that are tokenized together, so that memory stays bounded."""


def _transformers():
  """transformers, imported where it is first needed: it takes seconds, and toys do without."""
  try:
    import transformers
  except ImportError as error:
    raise UserError(
      f'texts need the package transformers, which cannot be imported ({error}); '
      "pip install 'transformers>=5'."
    ) from error
  return transformers


def train_tokenizer(
  captions: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerBase:
  """A byte-level BPE of at most `vocab_size` tokens; ids 0 and 1 are BOS and EOS.

  Text is lowercased. max_length includes the two frame tokens; of each caption CHARACTERS times
  that are learned from. UserError if either number is too small.
  """
  require(vocab_size >= SMALLEST, f'vocab_size must be at least {SMALLEST}, not {vocab_size}.')
  require(max_length >= 3, f'max_length must be at least 3, not {max_length}.')
  fast = _transformers().PreTrainedTokenizerFast
  import tokenizers as parts

  bpe = parts.Tokenizer(parts.models.BPE())
  bpe.normalizer = parts.normalizers.Lowercase()
  bpe.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = parts.decoders.ByteLevel()
  most = CHARACTERS * max_length
  bpe.train_from_iterator((caption[:most] for caption in captions), parts.trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=[BOS, EOS], show_progress=False,
    initial_alphabet=sorted(parts.pre_tokenizers.ByteLevel.alphabet()),
  ))
  bpe.post_processor = parts.processors.TemplateProcessing(
    single=f'{BOS} $A {EOS}', special_tokens=[(BOS, 0), (EOS, 1)]
  )
  return fast(
    tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token=EOS,
    model_max_length=max_length, clean_up_tokenization_spaces=False, split_special_tokens=True,
  )


SENTINELS = 100
"""Tokens that stand for left out spans: <extra_id_0> has the last number, as in T5."""


def train_unigram(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
  """A unigram model (Kudo 2018) of at most `vocab_size` tokens with the frame of T5.

  Ids 0, 1 and 2 are <pad>, </s> and <unk>; the last SENTINELS are <extra_id_99> to <extra_id_0>.
  UserError if there is no room for them.
  """
  require(vocab_size >= SMALLEST + SENTINELS,
          f'vocab_size must be at least {SMALLEST + SENTINELS}, not {vocab_size}.')
  fast = _transformers().PreTrainedTokenizerFast
  import tokenizers as parts

  model = parts.Tokenizer(parts.models.Unigram())
  model.normalizer = parts.normalizers.Sequence([
    parts.normalizers.NFKC(), parts.normalizers.Replace(parts.Regex(r'\s+'), ' '),
    parts.normalizers.Strip(),
  ])
  model.pre_tokenizer = parts.pre_tokenizers.Metaspace()
  model.decoder = parts.decoders.Metaspace()
  model.train_from_iterator(texts, parts.trainers.UnigramTrainer(
    vocab_size=vocab_size - SENTINELS, special_tokens=['<pad>', '</s>', '<unk>'],
    unk_token='<unk>', show_progress=False,
  ))
  model.post_processor = parts.processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  sentinels = [f'<extra_id_{number}>' for number in reversed(range(SENTINELS))]
  model.add_special_tokens(sentinels)
  return fast(
    tokenizer_object=model, eos_token='</s>', pad_token='<pad>', unk_token='<unk>',
    additional_special_tokens=sentinels, clean_up_tokenization_spaces=False,
    split_special_tokens=True,
  )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike) -> None:
  """Write the tokenizer's files as transformers does; tokenizer.json comes last, so marks all."""
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=directory) as draft:
    tokenizer.save_pretrained(draft)
    for file in sorted(Path(draft).iterdir(), key=lambda path: path.name == 'tokenizer.json'):
      file.replace(directory / file.name)


def _class_of(directory: Path) -> type:
  """The tokenizer class of a directory's config, else AutoTokenizer.

  AutoTokenizer imports an installed PyTorch, for seconds and 300 MB.
  """
  try:
    name = read_object(directory / 'tokenizer_config.json').get('tokenizer_class')
  except UserError:
    name = None
  return getattr(_transformers(), name if name in DIRECT else 'AutoTokenizer')


def load_tokenizer(directory: str | os.PathLike) -> PreTrainedTokenizerBase:
  """Read a tokenizer that we, or transformers, saved in a local directory; never the network."""
  _transformers()
  directory = Path(directory)
  require(directory.is_dir(), f'There is no tokenizer directory {directory}; check the path.')
  remedy = 'give a directory with tokenizer.json, or with vocab.json and merges.txt'
  with reading(directory, 'holds no tokenizer that can be read', remedy):
    for file in directory.iterdir():
      if file.suffix in _FILES:
        inside(file, directory)
        require(file.is_file(), f'{file} is no file; leave it out.')
        size = file.stat().st_size
        require(size <= MOST_BYTES, f'{file} has {size:,} bytes, which no tokenizer needs.')
    # Code that a tokenizer brings is never run, nor asked for.
    return _class_of(directory).from_pretrained(
      os.fspath(directory), local_files_only=True, trust_remote_code=False
    )


def add_placeholder(tokenizer: PreTrainedTokenizerBase, token: str, count: int = 1) -> list[int]:
  """Add a token for `count` learned embeddings (Gal et al. 2022); return their ids.

  They follow the vocabulary; later ones are token_1, token_2 ..., as in diffusers, and `Tokenize`
  writes all of them for `token`. UserError where one exists.
  """
  require(count >= 1, f'A placeholder needs at least one embedding, not {count}.')
  require(
    bool(token) and not any(c.isspace() for c in token),
    f'A placeholder must be one word without spaces, not {token!r}.',
  )
  names = [token, *(f'{token}_{number}' for number in range(1, count))]
  known = tokenizer.get_vocab()
  taken = [name for name in names if name in known]
  require(
    not taken,
    f'The tokenizer already has the token {", ".join(taken)}; choose another placeholder.',
  )
  tokenizer.add_tokens(names)
  return tokenizer.convert_tokens_to_ids(names)


def placeholders(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
  """The first id of every placeholder of several embeddings -> all its ids."""
  added = tokenizer.get_added_vocab()
  found = {}
  for token, first in added.items():
    ids = [first]
    while (name := f'{token}_{len(ids)}') in added:
      ids.append(added[name])
    if len(ids) > 1:
      found[first] = ids
  return found


@dataclasses.dataclass(frozen=True)
class Tokenize:
  """Text -> framed and padded token ids of one length.

  max_length includes the frame. on_long: 'truncate' cuts, keeps the end token and counts it in
  `cut`; 'error' raises a UserError. Only CHARACTERS * max_length characters are read. Empty or
  blank text is the null caption. Padding is the tokenizer's pad token, or else its end token.
  """

  tokenizer: PreTrainedTokenizerBase
  max_length: int
  on_long: str = 'truncate'
  cut: Cut = dataclasses.field(default_factory=Cut, compare=False)

  def __post_init__(self):
    least = self._frame() + 1
    require(
      self.max_length >= least, f'max_length must be at least {least}, not {self.max_length}.'
    )
    require(
      self.on_long in ('truncate', 'error'),
      f"on_long must be 'truncate' or 'error', not {self.on_long!r}.",
    )

  def __call__(self, text: str) -> np.ndarray:
    """One text -> int32 [l]."""
    return self.batch([text])[0]

  def batch(self, texts: Sequence[str]) -> np.ndarray:
    """Texts -> int32 [b l]."""
    return self.batch_and_mask(texts)[0]

  def batch_and_mask(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> (ids, mask), int32 [b l] each; the mask is 1 at the text and its frame."""
    out = np.full((len(texts), self.max_length), self.pad, np.int32)
    mask = np.zeros_like(out)
    several, long, rest = placeholders(self.tokenizer), [], ''
    for first in range(0, len(texts), AT_A_TIME):
      bounded = [self.bounded(text) for text in texts[first : first + AT_A_TIME]]
      encoded = self.tokenizer(bounded, verbose=False)['input_ids']
      for number, ids in enumerate(encoded, first):
        ids = [every for one in ids for every in several.get(one, [one])]
        fitting = self._fit(ids, texts[number])
        if len(ids) > len(fitting) or len(texts[number]) > CHARACTERS * self.max_length:
          rest = rest if long else self._rest(ids)
          long.append((texts[number], len(ids) - len(fitting)))
        out[number, : len(fitting)] = fitting
        mask[number, : len(fitting)] = 1
    if long:
      self.cut.count(long, self.max_length - self._frame(), rest)
    return out, mask

  @property
  def pad(self) -> int:
    """The number of padding."""
    pad = self.tokenizer.pad_token_id
    return self.tokenizer.eos_token_id if pad is None else pad

  @property
  def frame(self) -> tuple[list[int], list[int]]:
    """The numbers that begin a text, and the one that ends it."""
    ids = self.tokenizer('', verbose=False)['input_ids']
    return ids[:-1], ids[-1:]

  def unframed(self, text: str) -> list[int]:
    """One text of any length -> its numbers without the frame."""
    several = placeholders(self.tokenizer)
    ids = self.tokenizer(text, add_special_tokens=False, verbose=False)['input_ids']
    return [every for one in ids for every in several.get(one, [one])]

  def _rest(self, ids: list[int]) -> str:
    """What is cut off a framed text."""
    return self.tokenizer.decode(ids[self.max_length - 1 : -1])

  def bounded(self, text: str) -> str:
    """The beginning of a text that may matter; UserError for no text, or one too long to read."""
    require(isinstance(text, str), f'A prompt must be text, not {type(text).__name__}.')
    most = CHARACTERS * self.max_length
    if len(text) > most and self.on_long == 'error':
      raise UserError(
        f'The prompt {shortened(text)!r} has {len(text):,} characters, but only '
        f'{self.max_length - self._frame()} tokens fit; shorten it.'
      )
    text = '' if text.isspace() else text[:most]
    try:
      text.encode()
    except UnicodeEncodeError as error:  # What the shell hands over of bytes that are no text.
      raise UserError(
        f'The prompt {shortened(text)!r} is not UTF-8 ({error.reason}); write it as UTF-8 text.'
      ) from error
    return text

  def _frame(self) -> int:
    """Return how many tokens begin and end a text."""
    return self.tokenizer.num_special_tokens_to_add()

  def _fit(self, ids: list[int], text: str) -> list[int]:
    if len(ids) <= self.max_length:
      return ids
    if self.on_long == 'error':
      raise UserError(
        f'The prompt {shortened(text)!r} has {len(ids) - self._frame()} tokens, but only '
        f'{self.max_length - self._frame()} fit; shorten it by '
        f'{shortened(self._rest(ids).strip())!r}.'
      )
    return [*ids[: self.max_length - 1], ids[-1]]
