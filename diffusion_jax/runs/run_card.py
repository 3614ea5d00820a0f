"""What a run was made of, and digests of how it went: to be told later from any other.

run_card.json holds the config, digests of it, of the package's files and of the data, versions and
seeds, at each start that changed any; digests.jsonl has a line for each logged step and each
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.config import flatten
from diffusion_jax.errors import UserError
from diffusion_jax.files import MOST_BYTES, bounded_bytes, parse_json
from diffusion_jax.runs.directory import RunDirectory, normalise, versions
from diffusion_jax.runs.trained_on import DATA

CARD, DIGESTS = 'run_card.json', 'digests.jsonl'
LOSS, NORM, PARAMS = 'loss', 'gradient_norm', 'params'
PACKAGE = Path(__file__).resolve().parents[1]
_MOST_EARLIER = 20
_MADE_OF = ('config', 'code', 'data', 'versions', 'weights')


def digest_of(value: Any) -> str:
  """Return the SHA-256 of a JSON value, or of bytes, in hexadecimal digits."""
  data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
  return hashlib.sha256(data).hexdigest()


def code_digests(package: Path = PACKAGE) -> dict[str, str]:
  """Return {file of the package: the first 16 digits of its digest}."""
  return {
    path.relative_to(package).as_posix(): digest_of(path.read_bytes())[:16]
    for path in sorted(package.rglob('*.py'))
  }


def described(directory: RunDirectory, config: Mapping[str, Any]) -> dict[str, Any]:
  """Return what a run that starts now is made of."""
  try:
    data = directory.read_json(DATA)
  except UserError:  # Points and random numbers have none.
    data = {}
  config, code = normalise(dict(config)), code_digests()
  return {
    'digests': {'config': digest_of(config), 'code': digest_of(code), 'data': digest_of(data)},
    'seeds': {'loop.seed': config['loop']['seed']}, 'config': config, 'data': data,
    'versions': versions(), 'code': code,
  }


def begin(directory: RunDirectory, config: Mapping[str, Any], step: int) -> None:
  """Write the card of a start at that step; what earlier starts were made of, stays in it."""
  card = described(directory, config) | {'started_at_step': step}
  before = _known(directory)
  earlier = _cards(before)[:-1]
  before = {key: before[key] for key in before if key not in ('earlier', 'finished', 'weights')}
  if before and differences(before, card):
    earlier = [*earlier, before][-_MOST_EARLIER:]
  elif before:
    card['started_at_step'] = before.get('started_at_step', step)
  directory.write_json(CARD, card | ({'earlier': earlier} if earlier else {}))


def finish(directory: RunDirectory, config: Mapping[str, Any], step: int) -> None:
  """Add the last digests, and those of the model's weights, to the card."""
  card = _known(directory) or described(directory, config)
  last = read_digests(directory).get(step, {}) if (directory.path / DIGESTS).is_file() else {}
  directory.write_json(CARD, card | {
    'finished': {'step': step, **last}, 'weights': weight_digests(directory.model),
  })


def _known(directory: RunDirectory) -> dict[str, Any]:
  """Return the card that is there, empty for none or a damaged one."""
  try:
    return directory.read_json(CARD)
  except UserError:
    return {}


def _cards(card: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Return the cards of all starts that a card tells of, in order, its own last."""
  earlier = card.get('earlier')
  known = earlier if isinstance(earlier, list) else []
  return [one for one in known if isinstance(one, dict)] + [card]


def weight_digests(model: Path) -> dict[str, str]:
  """Return {file of weights below a folder: the first 16 digits of its digest}."""
  found = {}
  for path in sorted(model.rglob('*.safetensors')):
    with path.open('rb') as file:
      found[path.relative_to(model).as_posix()] = hashlib.file_digest(file, 'sha256').hexdigest()
  return {name: digest[:16] for name, digest in found.items()}


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """Return sentences on what two cards say differently of what a run is made of.

  What a card does not say is left out.
  """
  found = []
  for part in _MADE_OF:
    if not isinstance(first.get(part), dict) or not isinstance(other.get(part), dict):
      continue
    was, now = (flatten(card[part]) for card in (first, other))
    found += [_sentence(part, key, was.get(key), now.get(key))
              for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
  return found


def card_at(card: Mapping[str, Any], step: int) -> Mapping[str, Any]:
  """Return what made the steps after that one, of a run that was perhaps changed and resumed."""
  cards = _cards(card)
  first = lambda one: one['started_at_step'] if type(one.get('started_at_step')) is int else 0
  return next((one for one in reversed(cards) if first(one) <= step), cards[0])


def _sentence(part: str, key: str, was: Any, now: Any) -> str:
  if part in ('config', 'versions'):
    return f'{part}: {key} was {was!r:.80} and is now {now!r:.80}'
  what = 'is gone' if now is None else 'is new' if was is None else 'is not what it was'
  return f'{part}: {key} {what}'


def window_digests(totals: Mapping[str, Any]) -> dict[str, str]:
  """Return exact bytes of the loss and the gradient's norm since the last line, in hexadecimal.

  Each as float32: the sum, and the number of values in it.
  """
  return {
    name: np.asarray([totals[name].total, totals[name].count], '<f4').tobytes().hex()
    for name in (LOSS, NORM) if name in totals
  }


def mean_of(digest: str) -> float:
  """Return the mean that is written in a digest of `window_digests`."""
  total, count = np.frombuffer(bytes.fromhex(digest), '<f4')
  return float(total / count) if count else float('nan')


def add_digests(directory: RunDirectory, lines: Iterable[Mapping[str, Any]]) -> None:
  """Append lines, each with a step. OSError where they cannot be written."""
  with (directory.path / DIGESTS).open('ab+') as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      if file.read() != b'\n':  # Torn, where the disk was full.
        file.write(b'\n')
    file.write(''.join(json.dumps(line) + '\n' for line in lines).encode())


def read_digests(directory: RunDirectory) -> dict[int, dict[str, str]]:
  """Return {step: digests}; of lines of one step the last counts, and torn ones are left out.

  UserError: there is no such file, or it is too large.
  """
  path = directory.path / DIGESTS
  if not path.is_file():
    raise UserError(f'{directory.path} has no {DIGESTS}: its training recorded none; train anew.')
  found: dict[int, dict[str, str]] = {}
  for line in _lines(path):
    step = line.pop('step', None)
    if type(step) is int and all(isinstance(value, str) for value in line.values()):
      found[step] = found.get(step, {}) | line
  return dict(sorted(found.items()))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
  for text in bounded_bytes(path, MOST_BYTES).splitlines():
    try:
      line = parse_json(text)
    except (ValueError, UserError):
      continue
    if isinstance(line, dict):
      yield line
