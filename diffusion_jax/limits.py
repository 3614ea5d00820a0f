"""Limits of what people choose, as types of config values: `Annotated[float, Range(0, 1)]`."""

import dataclasses
import importlib
import math
import operator
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from diffusion_jax import registry
from diffusion_jax.errors import UserError

MOST_SEED = 2**32 - 1
"""The largest seed: JAX would cut a longer one to 32 bits and draw what another seed draws."""


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from low to high, without low if `above` and high if `below`; never NaN.

  text: the allowed values in words, where limits do not suffice.
  """

  low: float = -math.inf
  high: float = math.inf
  above: bool = False
  below: bool = False
  text: str = ''

  def check(self, value: float, where: str) -> None:
    """Raise UserError, which names the key `where`, for a value outside."""
    low = value > self.low if self.above else value >= self.low
    high = value < self.high if self.below else value <= self.high
    if not (low and high):
      raise UserError(f'{where} is {_shown(value)}; give {self.text or self._text()}.')

  def _text(self) -> str:
    if self.high == math.inf:
      return f'{"more than" if self.above else "at least"} {self.low:g}'
    high = f'{"below " * self.below}{self.high:.10g}'
    return f'a number from {"above " * self.above}{self.low:g} to {high}'


@dataclasses.dataclass(frozen=True)
class Length:
  """Tuples or texts of low to high entries or letters."""

  low: int
  high: int

  def check(self, value: Collection, where: str) -> None:
    """UserError, which names the key `where`, for one of another length."""
    if not self.low <= len(value) <= self.high:
      raise UserError(f'{where} has a length of {len(value):,}; give {self.low} to {self.high}.')


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
  """A name of a table or tuple of names, or of one that is imported when used: 'module:NAME'."""

  names: Collection[str] | str

  def check(self, value: str, where: str) -> None:
    """Raise UserError, with the nearest known name, for one that is not in the table."""
    names = self.names
    if isinstance(names, str):
      module, _, attribute = names.partition(':')
      names = getattr(importlib.import_module(module), attribute)
    registry.check(names, value, where)


@dataclasses.dataclass(frozen=True, eq=False)
class ByType:
  """A section whose key `type` names the part of a registry that it configures.

  The part is a dataclass, or has one as `Config`, or `of` returns it. default: the implicit type,
  not written down.
  """

  table: registry.Table
  default: str = ''
  of: Callable[[Any], type] | None = None

  def section(self, name: str, where: str) -> type:
    """Return the dataclass of that type. UserError for an unknown one."""
    part = registry.load(self.table, name, f'{where}.type')
    return self.of(part) if self.of else getattr(part, 'Config', part)

  def name(self, section: Any) -> str:
    """Return the type that a section is of, '' for the default."""
    names = [self.default, *self.table] if self.default else list(self.table)
    own = (name for name in names if self.section(name, '') is type(section))
    found = next(own, self.default)  # The default first: each name imports its part.
    return '' if found == self.default else found


@dataclasses.dataclass(frozen=True)
class Help:
  """The command line's description of a field, which is then an option (`cli.options`)."""

  text: str
  metavar: str = ''
  flag: str = ''
  """The option's name where it is not the field's."""


Fraction = Annotated[float, Range(0, 1)]
Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
"""0 is often 'never' or 'none'."""
Seconds = Annotated[float, Range(0, text='seconds, or 0 for no limit')]
Seed = Annotated[int, Range(0, MOST_SEED, text=f'a whole number from 0 to {MOST_SEED}')]

FileDtype = Literal['float32', 'float16', 'bfloat16']
"""Of the weights in a file."""


def check_seed(seed: int, name: str = 'seed') -> int:
  """The seed; UserError, calling it `name`, unless a whole number up to MOST_SEED."""
  try:
    number = operator.index(seed)
  except TypeError:
    number = -1
  if not 0 <= number <= MOST_SEED:
    raise UserError(f'{name} is {_shown(seed)}; give a whole number from 0 to {MOST_SEED}.')
  return number


def _shown(value: Any) -> str:
  if isinstance(value, int) and abs(value) >= 10**20:
    return f'a number of {value.bit_length()} bits'
  return f'{value!r:.40}'


MOST_EDGE = 2**13
"""Pixels of an edge of what is drawn or trained on."""


def parse_size(text: str, name: str = '--size') -> tuple[int, int]:
  """Return (height, width) of '96x64', or of '96', a square. UserError, calling it `name`, else."""
  parts = re.fullmatch(r'(\d{1,9})(?:[xX×](\d{1,9}))?', text.strip())
  size = (int(parts[1]), int(parts[2] or parts[1])) if parts else (0, 0)
  if not all(1 <= edge <= MOST_EDGE for edge in size):
    raise UserError(
      f'{name} is {_shown(text)}; give height x width in pixels, such as 96x64, or one number for '
      f'a square, up to {MOST_EDGE}.'
    )
  return size


@dataclasses.dataclass(frozen=True)
class EdgeRule:
  """What heights and widths networks can take: multiples, of at most `most`, None for any."""

  multiple: int
  most: int | None = None

  def fits(self, *size: int) -> bool:
    """Return whether all edges are such."""
    most = self.most or max(size)
    return all(0 < edge <= most and edge % self.multiple == 0 for edge in size)

  def near(self, *size: int) -> tuple[int, ...]:
    """Return the nearest edges that are such."""
    whole = [max(1, round(edge / self.multiple)) for edge in size]
    most = max(whole) if self.most is None else max(1, self.most // self.multiple)
    return tuple(min(edge, most) * self.multiple for edge in whole)

  def __str__(self) -> str:
    return f'multiples of {self.multiple}' + (f' up to {self.most}' if self.most else '')


def check_edges(size: int | tuple[int, int], rule: EdgeRule, key: str = 'data.size') -> None:
  """Raise UserError, with the nearest size, unless both edges are as the rule says."""
  pair = size if isinstance(size, tuple) else (size, size)
  if not rule.fits(*pair):
    near = rule.near(*pair)
    raise UserError(
      f'{key} is {size}, which cannot be halved as the networks do: height and width must be '
      f'{rule}; the nearest such size is {near if isinstance(size, tuple) else near[0]}.'
    )


def same_size(key: str, value: Any, size: Any) -> None:
  """Raise UserError unless what a key of the config says agrees with `data.size`."""
  if isinstance(size, tuple) and isinstance(value, int) and size != (value, value):
    raise UserError(
      f'data.size is {size}, but {key} is {value}, the edge of squares; set data.size to one '
      'number and both alike.'
    )
  if value != size and (value, value) != size:
    raise UserError(f'data.size is {size}, but {key} is {value}; set both alike.')
