"""Two-way rules between the tensors of diffusers and transformers and those of a single file.

A table of rules is made from a network's structure and is total in both directions: a missing or
unused tensor is an error that names it. Nothing is computed; tensors are renamed, reshaped,
transposed, and stacked or taken apart.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax.formats.published import same_names
from diffusion_jax.formats.tensors import NewTensor


class Rule(NamedTuple):
  """How one tensor of a single file, `stored`, relates to the `published` one or ones.

  change: 'same'; 'pointwise': a matrix [o i] is stored as a convolution [o i 1 1]; 'transposed';
  'stacked': several along the first axis.
  """

  published: tuple[str, ...]
  stored: str
  change: str = 'same'


def same(published: str, stored: str, leaves: Iterable[str] = ('weight', 'bias')) -> list[Rule]:
  """Rules for the leaves of one module that differ in its name only."""
  return [Rule((f'{published}.{leaf}',), f'{stored}.{leaf}') for leaf in leaves]


def to_stored(
  rules: Iterable[Rule], tensors: Mapping[str, NewTensor], where: str
) -> dict[str, NewTensor]:
  """Published tensors -> those of a single file. UserError where the names do not agree."""
  rules = list(rules)
  same_names(set(tensors), {name for rule in rules for name in rule.published}, where)
  return {rule.stored: _store(rule, [tensors[name] for name in rule.published]) for rule in rules}


def from_stored(
  rules: Iterable[Rule], tensors: Mapping[str, NewTensor], where: str
) -> dict[str, NewTensor]:
  """Tensors of a single file -> published ones. UserError where the names do not agree."""
  rules = list(rules)
  same_names(set(tensors), {rule.stored for rule in rules}, where)
  return {
    name: tensor for rule in rules for name, tensor in _publish(rule, tensors[rule.stored]).items()
  }


def _store(rule: Rule, tensors: list[NewTensor]) -> NewTensor:
  first = tensors[0]
  if rule.change == 'pointwise':
    return _reshaped(first, (*first.shape, 1, 1))
  if rule.change == 'transposed':
    return _transposed(first)
  if rule.change == 'stacked':
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    return NewTensor(first.dtype, shape, lambda: np.concatenate([t.make() for t in tensors]))
  return first


def _publish(rule: Rule, tensor: NewTensor) -> dict[str, NewTensor]:
  name = rule.published[0]
  if rule.change == 'pointwise':
    return {name: _reshaped(tensor, tensor.shape[:2])}
  if rule.change == 'transposed':
    return {name: _transposed(tensor)}
  if rule.change == 'stacked':
    rows = tensor.shape[0] // len(rule.published)
    return {
      name: NewTensor(
        tensor.dtype, (rows, *tensor.shape[1:]),
        lambda start=i * rows: tensor.make()[start : start + rows],
      )
      for i, name in enumerate(rule.published)
    }
  return {name: tensor}


def _reshaped(tensor: NewTensor, shape: tuple[int, ...]) -> NewTensor:
  return NewTensor(tensor.dtype, shape, lambda: tensor.make().reshape(shape))


def _transposed(tensor: NewTensor) -> NewTensor:
  return NewTensor(tensor.dtype, tensor.shape[::-1], lambda: tensor.make().T)
