"""One plan after another, each kept on the disk by all that it depends on."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, read_object
from diffusion_jax.formats.networks import resolve
from diffusion_jax.planning.estimate import Estimate, estimate
from diffusion_jax.planning.programs import compile_for
from diffusion_jax.planning.targets import Target, plugin_versions, sentence

CACHE = Path.home() / '.cache' / 'diffusion_jax' / 'plans'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')
FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_DEFAULT_MATMUL_PRECISION')
"""What changes programs besides versions: variables of the environment."""
EVERY = 15.0
"""Seconds between two signs of life while a compiler works."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """Of one target: facts of `programs.compile_for`, or why there are none. kept: from the disk."""

  target: Target
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)
  error: str = ''
  kept: bool = False

  @functools.cached_property
  def estimate(self) -> Estimate | None:
    """Its time; None without a program, or on CPUs."""
    chip = self.target.chip
    return estimate(self.facts, chip) if self.facts and chip else None

  @property
  def bytes(self) -> int:
    """Memory of one device: state, batch and temporaries, as `train` says it, or what the program
    says where that is more."""
    f = self.facts
    program = f['arguments'] + f['outputs'] - f['aliased'] + f['step']['temporary'] + f['code']
    return max(f['step']['bytes'], program)

  def as_json(self, price: float | None = None) -> dict[str, Any]:
    """Return all that is known, with money at a price of a chip's hour."""
    found, chip = self.estimate, self.target.chip
    more = {} if found is None else {
      'estimate': dataclasses.asdict(found), 'chip': {'memory': chip.memory, 'source': chip.source}
    }
    if found and price is not None:
      more['cost'] = found.chip_hours * price
    error = {'error': self.error} if self.error else {}
    return {'target': str(self.target), **self.facts, **more, **error}


def make_plan(config: dict[str, Any], target: Target, folder: Path = CACHE) -> Plan:
  """Read the plan of a checked config from the disk, or compile; a failure is a plan, too."""
  try:
    file = folder / f'{fingerprint(config, target)}.json'
    if kept := _read(file):
      return _checked(Plan(target, kept, kept=True))
    with _signs_of_life(str(target)):
      facts = compile_for(config, target)
  except (UserError, jax.errors.JaxRuntimeError, NotImplementedError) as error:
    return Plan(target, error=str(error) if isinstance(error, UserError) else sentence(error))
  with contextlib.suppress(OSError):  # A plan is worth having on a full disk, too.
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
      out.write(json.dumps(facts).encode())
  return _checked(Plan(target, facts))


def _checked(plan: Plan) -> Plan:
  """Return the plan, as a failure where its memory is more than a device has: only the compilers of
  TPUs refuse that."""
  chip = plan.target.chip
  if chip is None or plan.bytes <= chip.memory:
    return plan
  needs, has = (f'{size / 1e9:.3g} GB' for size in (plan.bytes, chip.memory))
  why = f'out of memory: it needs {needs} of a device that has {has}'
  return dataclasses.replace(plan, error=why)


def _read(file: Path) -> dict[str, Any]:
  if file.exists():
    with contextlib.suppress(UserError, OSError):
      return read_object(file)
  return {}


def fingerprint(config: dict[str, Any], target: Target) -> str:
  """Return a digest of all that a program depends on: config, parts, code, versions, target."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  about = {
    'config': config, 'target': str(target), 'chip': target.chip and target.chip.description,
    'versions': {**versions, **plugin_versions(target.platform)}, 'code': _code(),
    'parts': _parts(config), 'flags': [os.environ.get(name, '') for name in FLAGS],
  }
  return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
  root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
  for file in sorted(root.rglob('*.py')):
    found.update(str(file.relative_to(root)).encode() + b'\0' + file.read_bytes())
  return found.hexdigest()


def _parts(config: Any) -> list[str]:
  """Return digests of the JSON files of every folder that the settings name."""
  out = []
  for text in sorted(set(_texts(config.get('settings', {})))):
    with contextlib.suppress(UserError, OSError, ValueError):
      folder = resolve(text)
      files = [*folder.glob('*.json'), *folder.glob('*/*.json')] if folder.is_dir() else []
      out += [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
  return out


def _texts(value: Any) -> Iterator[str]:
  if isinstance(value, str) and value:
    yield value
  elif isinstance(value, Mapping):
    for part in value.values():
      yield from _texts(part)
  elif isinstance(value, Sequence) and not isinstance(value, str):
    for part in value:
      yield from _texts(part)


@contextlib.contextmanager
def _signs_of_life(what: str) -> Iterator[None]:
  """Within, say on stderr now and then for how long a compiler has worked."""
  done, start = threading.Event(), time.monotonic()

  def tell() -> None:
    while not done.wait(EVERY):
      print(f'{what}: compiling for {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)

  thread = threading.Thread(target=tell, name='signs of life', daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
