"""Devices that need not be here, by names such as v5e:4x4, h100:8 or cpu:4."""

import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from diffusion_jax.errors import UserError
from diffusion_jax.planning.chips import NAMED, Chip

CPU = 'cpu'
MOST = 16_384
"""Devices of a target."""
PLUGINS = {'tpu': ('libtpu',), 'cuda': ('jax-cuda13-plugin', 'jax-cuda12-plugin')}
"""Wheels with a compiler for each platform; any of them serves."""
INSTALL = {'tpu': "pip install 'jax[tpu]=={}'", 'cuda': "pip install 'jax[cuda13]=={}'"}


_SQUARES = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16',
            256: '16x16'}
_CUBES = {8: '2x2x1', 16: '2x2x2', 32: '2x2x4', 64: '2x4x4', 128: '4x4x4', 256: '4x4x8',
          512: '4x8x8', 1024: '8x8x8'}
TYPES = {
  **{f'v5litepod-{n}': f'v5e:{shape}' for n, shape in _SQUARES.items()},
  **{f'v6e-{n}': f'v6e:{shape}' for n, shape in _SQUARES.items()},
  **{f'v5p-{n}': f'v5p:{shape}' for n, shape in _CUBES.items()},
}
"""Google Cloud's accelerator types, which count chips, or cores of v5p, and the usual slices."""


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices of one kind. shape: of a TPU slice; GPUs of a machine, and machines; CPU devices."""

  name: str
  shape: tuple[int, ...]

  @classmethod
  def of(cls, text: str) -> 'Target':
    """Read NAME:SHAPE, or one of TYPES. UserError: an unknown name, or a shape it cannot have."""
    name, _, shape = TYPES.get(text.strip(), text.strip()).partition(':')
    if name not in (CPU, *NAMED):
      raise UserError(f'there is no target {text!r}; known chips are {", ".join((*NAMED, CPU))}.')
    fits = re.fullmatch(r'\d{1,5}(x\d{1,5}){0,2}', shape)
    sizes = tuple(map(int, shape.split('x'))) if fits else ()
    dimensions = {'v5e': (2,), 'v6e': (2,), 'v5p': (3,), CPU: (1,)}.get(name, (1, 2))
    if len(sizes) not in dimensions or not 0 < math.prod(sizes) <= MOST:
      examples = {2: f'{name}:4x4', 3: f'{name}:2x2x2', 1: f'{name}:8'}
      raise UserError(
        f'target {text!r} has no shape of {name}; give {examples[dimensions[0]]} or the like.'
      )
    return cls(name, sizes)

  def __str__(self) -> str:
    return f'{self.name}:{"x".join(map(str, self.shape))}'

  @property
  def count(self) -> int:
    """Number of devices."""
    return math.prod(self.shape)

  @property
  def chip(self) -> Chip | None:
    """The row of its chip; None for CPUs, whose speed is not in a table."""
    return NAMED.get(self.name)

  @property
  def platform(self) -> str:
    """The platform that compiles for it."""
    return self.chip.platform if self.chip else CPU

  def devices(self) -> Sequence[Any]:
    """Return the devices. UserError: the wheel that compiles for them is not installed, or it does
    not know such a slice."""
    if self.platform == CPU:
      found = jax.devices(CPU)
      if len(found) < self.count:
        raise UserError(
          f'{self} needs {self.count} CPU devices, and this process has {len(found)}; start it '
          f'with XLA_FLAGS=--xla_force_host_platform_device_count={self.count}.'
        )
      return found[: self.count]
    if not plugin_versions(self.platform):
      command = INSTALL[self.platform].format(jax.__version__)
      raise UserError(f'nothing here compiles for {self}: {command}')
    try:
      return self._topology().devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
      raise UserError(f'the compiler knows no {self}: {sentence(error)}') from error

  def _topology(self) -> Any:
    if self.platform == 'tpu':
      # Else libtpu asks the cloud's service which machine this is, and a second process is refused.
      for name, value in (
        ('TPU_SKIP_MDS_QUERY', '1'), ('TPU_WORKER_HOSTNAMES', 'localhost'),
        ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
      ):
        os.environ.setdefault(name, value)
      small = {'chips_per_host_bounds': [1] * 3, 'num_slices': 1} if self.count == 1 else {}
      return topologies.get_topology_desc(platform='tpu', topology_name=str(self), **small)
    a_machine, machines = (*self.shape, 1)[:2]
    return topologies.get_topology_desc(
      str(self), 'cuda', target_config=self.chip.description, topology=f'1x{machines}x{a_machine}'
    )


def plugin_versions(platform: str) -> dict[str, str]:
  """Return the versions of the installed wheels that compile for a platform."""
  found = {}
  for name in PLUGINS.get(platform, ()):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def sentence(error: BaseException) -> str:
  """Return the first sentence of what a compiler says, without the code in front; of a program that
  is too large what it needs."""
  text = ' '.join(str(error).split())
  if found := re.search(r'[Uu]sed ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?)(?: \w+)?', text):
    return f'out of memory: it needs {found[1]} of a device that has {found[2]}'
  text = re.sub(r'^([A-Z_]+: )+', '', text) or type(error).__name__
  return re.split(r'(?<=\w)\. |; |\s\[\w*\]', text)[0][:300]
