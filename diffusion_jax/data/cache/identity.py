"""What rows of a cache follow from: encoders with their weights, settings, and contents of records.

Each is a short hash by a name that people understand, so that a cache of something else can be
refused by that name.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax.data.cache.rows import DIGEST
from diffusion_jax.data.unreadable import about
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import to_host
from diffusion_jax.parallel.processes import A_DAY, gather_bytes, in_step
from diffusion_jax.types import Params, Source


def of_value(value: Any) -> str:
  """A hash of a description, see `described`."""
  return hashlib.sha256(json.dumps(described(value), sort_keys=True).encode()).hexdigest()[:32]


def described(value: Any) -> Any:
  """What an encoder, a tokenizer or a setting is, JSON-ready: its config, without its weights."""
  if isinstance(value, Network):
    return [described(value.config), np.dtype(value.compute.dtype).name]
  if dataclasses.is_dataclass(value):
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return [type(value).__name__, described(fields)]
  if hasattr(value, 'get_vocab'):
    return _tokenizer(value)
  if isinstance(value, Mapping):
    return {str(key): described(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [described(item) for item in value]
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, (str, int, float, type(None))):
    return value
  return (value if isinstance(value, type) else type(value)).__name__


def _tokenizer(tokenizer: Any) -> Any:
  """All that a tokenizer does, but for padding and cutting, which it keeps from its last use."""
  whole = getattr(getattr(tokenizer, 'backend_tokenizer', None), 'to_str', None)
  if whole is None:
    return sorted(tokenizer.get_vocab().items())
  return {k: v for k, v in json.loads(whole()).items() if k not in ('padding', 'truncation')}


def of_weights(params: Params) -> str:
  """A hash of the names, types and values of weights; all processes call it together."""
  found = hashlib.sha256()
  for name in sorted(params):
    array = np.ascontiguousarray(to_host(params[name]))
    found.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    found.update(array.reshape(-1).view(np.uint8))
  return found.hexdigest()[:32]


def of_pictures(source: Source, with_captions: bool) -> np.ndarray:
  """Digests of the pictures of all records, uint8 [n DIGEST], with their captions if asked; all
  processes call it together.

  Of a source that knows none of its own every record is read.
  """

  def some(records: np.ndarray) -> np.ndarray:
    if not hasattr(source, 'hashes'):
      return of_rows(_picture(source, int(i), with_captions) for i in records)
    found = np.asarray(source.hashes(records), np.uint8)
    if not with_captions:
      return found
    texts = (of_rows([_texts(source, int(i), ())])[0] for i in records)
    return of_rows(row.tobytes() + text.tobytes() for row, text in zip(found, texts, strict=True))

  return _in_shares('pictures', len(source), some)


def of_looks(digests: np.ndarray, source: Source, looks: Mapping[str, Any]) -> np.ndarray:
  """Digests of pictures, uint8 [n DIGEST], that differ where their parts of a mixture make them
  look otherwise; looks: of each part, None where nothing is its own."""
  if not any(look is not None for look in looks.values()):
    return digests
  found, own = digests.copy(), {name: of_value(look) for name, look in looks.items()}
  parts = source.mixed.parts_of(np.arange(len(found)))
  for number, name in enumerate(source.mixed.parts):
    if looks.get(name) is not None:
      mine = np.flatnonzero(parts == number)
      found[mine] = of_rows(digests[i].tobytes() + own[name].encode() for i in mine)
  return found


def _picture(source: Source, index: int, with_captions: bool) -> bytes:
  try:
    record = source[index]
  except Unreadable:
    return b'unreadable'
  image = np.ascontiguousarray(record['image'])
  texts = json.dumps(record['captions']) if with_captions else ''
  return f'{image.shape}{texts}\n'.encode() + image.tobytes()


def of_texts(source: Source, prompts: Sequence[Any]) -> np.ndarray:
  """Digests of the texts of all records, uint8 [n DIGEST]; all processes call it together.

  prompts: functions of a record that give more of them, None for none.
  """
  some = lambda records: of_rows(_texts(source, int(i), prompts) for i in records)
  return _in_shares('texts', len(source), some)


def _in_shares(
  name: str, count: int, digests: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
  """Digests of all of so many records, of which each process finds a share; digests: of these
  records, uint8 [m DIGEST]. UserError, in all processes, of any."""
  share = np.array_split(np.arange(count), jax.process_count())[jax.process_index()]
  mine = in_step(f'cache/{name}/digests', lambda: digests(share), (UserError,), A_DAY)
  found = b''.join(gather_bytes(mine.tobytes()))
  return np.frombuffer(found, np.uint8).reshape(-1, DIGEST)


def _texts(source: Source, index: int, prompts: Sequence[Any]) -> bytes:
  try:
    record = about(source, index)
  except Unreadable:
    return b'unreadable'
  texts = [list(record['captions']), list(record.get('caption_weights', ()))]
  return json.dumps([texts, [prompt(record) for prompt in prompts]]).encode()


def of_rows(contents: Iterable[bytes]) -> np.ndarray:
  """Digests of contents, uint8 [n DIGEST]."""
  found = bytearray()  # Whose memory is all that grows with their number.
  for content in contents:
    found += hashlib.sha256(content).digest()[:DIGEST]
  return np.frombuffer(found, np.uint8).reshape(-1, DIGEST)
