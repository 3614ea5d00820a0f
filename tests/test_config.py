"""Nested dictionaries to dataclasses and back: what a type says is what is checked."""

import dataclasses
import math
from typing import Annotated, Literal

import pytest

from diffusion_jax.config import typed, untyped
from diffusion_jax.errors import UserError
from diffusion_jax.limits import ByType, Fraction, OneOf, Positive, Range, Seconds, Seed


@dataclasses.dataclass(frozen=True)
class Circle:
  radius: Annotated[float, Range(0, above=True)] = 1.0


class Wave:
  @dataclasses.dataclass(frozen=True)
  class Config:
    periods: Positive = 1


@dataclasses.dataclass(frozen=True)
class Flat:
  height: float = 0.0


PARTS = {'wave': Wave, 'flat': Flat}


@dataclasses.dataclass(frozen=True)
class Everything:
  must: int
  kind: Literal['a', 'b'] = 'a'
  count: Positive = 1
  part: Fraction = 0.5
  wait: Seconds = 0.0
  seed: Seed = 0
  name: Annotated[str, OneOf(('left', 'right'))] = 'left'
  high: float | None = None
  shape: Circle = Circle()
  piece: Annotated[Wave.Config | Flat, ByType(PARTS, 'flat')] = Flat()
  pairs: tuple[tuple[str, float], ...] = ()
  options: dict[str, int | str] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(('values', 'wanted'), [
  ({'part': 1}, {'part': 1.0}),
  ({'high': 2}, {'high': 2.0}),
  ({'high': None}, {'high': None}),
  ({'shape': {'radius': 2.0}}, {'shape': Circle(radius=2.0)}),
  ({'piece': {'height': 2}}, {'piece': Flat(2.0)}),
  ({'piece': {'type': 'wave', 'periods': 4}}, {'piece': Wave.Config(4)}),
  ({'pairs': [['x', 1]]}, {'pairs': (('x', 1.0),)}),
  ({'options': {'a': 1, 'b': 'c'}}, {'options': {'a': 1, 'b': 'c'}}),
])
def test_values_become_what_their_types_say_and_go_back(values, wanted):
  found = typed(Everything, {'must': 1, **values})
  assert found == Everything(1, **wanted)
  written = untyped(found)
  assert typed(Everything, written) == found and untyped(typed(Everything, written)) == written


def test_a_type_is_written_where_it_is_not_the_default():
  assert untyped(typed(Everything, {'must': 1}))['piece'] == {'height': 0.0}
  wave = typed(Everything, {'must': 1, 'piece': {'type': 'wave'}})
  assert untyped(wave)['piece'] == {'type': 'wave', 'periods': 1}


@pytest.mark.parametrize(('values', 'words'), [
  ({}, r'config\.must is missing; set it'),
  ({'must': 1, 'cuont': 2}, r'config\.cuont is not a known key; did you mean config\.count\?'),
  ({'must': True}, r'config\.must is True, a bool; it must be int'),
  ({'must': '1'}, r"config\.must is '1', a str; it must be int"),
  ({'must': 1, 'kind': 'c'}, r"config\.kind is 'c'; choose one of a, b\."),
  ({'must': 1, 'count': 0}, r'config\.count is 0; give at least 1\.'),
  ({'must': 1, 'part': 1.5}, r'config\.part is 1.5; give a number from 0 to 1\.'),
  ({'must': 1, 'part': math.nan}, r'config\.part is nan; give a number from 0 to 1\.'),
  ({'must': 1, 'wait': -1.0}, r'config\.wait is -1.0; give seconds, or 0 for no limit\.'),
  ({'must': 1, 'seed': 2**32}, r'config\.seed is 4294967296; give a whole number from 0 to 42949'),
  ({'must': 1, 'name': 'rihgt'}, r"config\.name is 'rihgt'; did you mean right\?"),
  ({'must': 1, 'shape': {'radius': 0.0}}, r'config\.shape\.radius is 0.0; give more than 0\.'),
  ({'must': 1, 'shape': {'edge': 1}}, r'config\.shape\.edge is not a known key; known: radius'),
  ({'must': 1, 'shape': 3}, r'config\.shape is 3; it must be a section of keys'),
  ({'must': 1, 'piece': {'type': 'wav'}}, r"config\.piece\.type is 'wav'; did you mean wave\?"),
  ({'must': 1, 'piece': {'type': 'wave', 'periods': 0}}, r'config\.piece\.periods is 0; give at'),
  ({'must': 1, 'pairs': [['x']]}, r"config\.pairs\[0\] is \['x'\], a list; it must be tuple"),
  ({'must': 1, 'options': {'a': None}}, r'config\.options\.a is None'),
  (3, 'config is 3; it must be a section of keys'),
])
def test_what_does_not_fit_is_named_with_what_would(values, words):
  with pytest.raises(UserError, match=words):
    typed(Everything, values)
