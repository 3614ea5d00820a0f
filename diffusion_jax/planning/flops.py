"""Floating-point operations of a program by formula, whatever machine will run it.

Counted are matrix products and convolutions, 2 for each multiply-add, as papers count the FLOPs of
a model (Chowdhery et al. 2022, appendix B, for MFU): no elementwise work, nothing that is computed
again to save memory, and the places in a convolution's window that lie in the padding like others.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

OPAQUE = ('pallas_call', 'ffi_call', 'custom_partitioning', 'dot_product_attention')
"""Parts of primitives' names inside which products cannot be seen."""

ATTENTION = 'scaled_dot_product_attention'
"""The jitted function of models.attention, which has more products within, or none to be seen."""


@dataclasses.dataclass(frozen=True)
class Flops:
  """forward: of the program itself. backward: of its gradient, one product more for each operand of
  a product that a gradient flows to. unseen: what may hold products that could not be counted.
  """

  forward: float = 0.0
  backward: float = 0.0
  unseen: frozenset[str] = frozenset()

  def __add__(self, other: 'Flops') -> 'Flops':
    return Flops(
      self.forward + other.forward, self.backward + other.backward, self.unseen | other.unseen
    )

  def times(self, count: int) -> 'Flops':
    """Of so many repetitions."""
    return Flops(self.forward * count, self.backward * count, self.unseen)

  @property
  def total(self) -> float:
    """Of the program and its gradient."""
    return self.forward + self.backward


class AttentionShape(NamedTuple):
  """Of one attention: heads of d channels, n queries of `dtype` against so many keys."""

  batch: int
  n: int
  keys: int
  heads: int
  d: int
  dtype: str
  masked: bool


def count_flops(function: Callable, *args, trained: int | None = None) -> Flops:
  """FLOPs of function(*args), arrays or shapes; nothing is computed.

  Args:
    trained: which argument the gradient is taken for, None for no gradient. What does not depend on
      it is forward only. For a network trained as a whole the sum is three times the forward pass,
      less what the gradients for its inputs would take.
  """
  closed = jax.make_jaxpr(function)(*args)
  jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  marks = [index == trained for index, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
  marks = [mark for mark, kept in zip(marks, used, strict=True) if kept]
  return _count(jaxpr, marks, [True] * len(jaxpr.outvars))[0]


def step_flops(task: Any, state: Any, frozen: dict, batch: dict) -> Flops:
  """Of one training step on a global batch; arguments as those of `train.step`, or their shapes."""
  return count_flops(*_loss(task, state, frozen, batch), trained=0)


def step_attentions(task: Any, state: Any, frozen: dict, batch: dict) -> Counter[AttentionShape]:
  """Those of the loss of one training step on a global batch."""
  return attentions(*_loss(task, state, frozen, batch))


def _loss(task: Any, state: Any, frozen: dict, batch: dict) -> tuple[Any, ...]:
  """Return (loss, shapes of its arguments)."""

  def loss(params, frozen, batch):
    memory = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.carry)
    return task.loss(params, frozen, memory, batch, jax.random.key(0), jnp.zeros((), jnp.int32))[0]

  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state.params, frozen, batch)
  )
  return loss, *shapes


def attentions(function: Callable, *args) -> Counter[AttentionShape]:
  """Count the attentions of function(*args), arrays or shapes, each as often as it is written."""
  found: Counter[AttentionShape] = Counter()

  def visit(jaxpr: Any) -> None:
    for equation in jaxpr.eqns:
      if equation.params.get('name') == ATTENTION:
        q, k = (equation.invars[i].aval for i in (0, 1))
        masked = len(equation.invars) > 3
        found[AttentionShape(*q.shape[:2], k.shape[1], *q.shape[2:], q.dtype.name, masked)] += 1
        continue
      for part in core.jaxprs_in_params(equation.params):
        visit(part)

  visit(jax.make_jaxpr(function)(*args).jaxpr)
  return found


def read_arguments(function: Callable, arg: Any) -> list[Any]:
  """The leaves of a pytree of shapes that the result of function(arg) depends on."""
  closed = jax.make_jaxpr(function)(arg)
  _, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return [leaf for leaf, kept in zip(jax.tree.leaves(arg), used, strict=True) if kept]


class _Part(NamedTuple):
  """A program within an equation.

  jaxpr: it takes the equation's inputs from number `skip` on, in order. carried: so many of its
  first outputs come back as its inputs from number `carry` on. times: how often it runs. unknown:
  whether that is not known, so that it is counted once.
  """

  jaxpr: Any
  skip: int = 0
  carry: int = 0
  carried: int = 0
  times: int = 1
  unknown: bool = False

  def marks(self, ins: Sequence[bool]) -> tuple[list[bool], list[bool]]:
    """(inputs, outputs) that depend on a marked input of the equation, at any time."""
    ins = list(ins[self.skip :])
    while True:
      outs = _marks(self.jaxpr, ins)[1]
      back = slice(self.carry, self.carry + self.carried)
      grown = [a or b for a, b in zip(ins[back], outs, strict=False)]
      if grown == ins[back]:
        return ins, outs
      ins[back] = grown

  def count(self, ins: Sequence[bool], wanted: Sequence[bool]) -> tuple[Flops, list[bool]]:
    """(FLOPs, inputs of the equation to which a gradient flows) for gradients of `wanted`."""
    ins, wanted = self.marks(ins)[0], list(wanted)
    while True:
      flops, flows = _count(self.jaxpr, ins, wanted)
      back = flows[self.carry : self.carry + self.carried]
      grown = [a or b for a, b in zip(wanted, back, strict=False)]
      if grown == wanted[: self.carried]:
        break
      wanted[: self.carried] = grown
    unseen = flops.unseen | ({'while'} if self.unknown and flops.forward else set())
    return dataclasses.replace(flops.times(self.times), unseen=frozenset(unseen)), [
      *[False] * self.skip, *flows
    ]


def _parts(equation: Any) -> list[_Part]:
  name, params = equation.primitive.name, equation.params
  if name == 'scan':
    return [_scanned(equation)]
  if name == 'while':
    consts, own = params['cond_nconsts'], params['body_nconsts']
    carried = len(equation.outvars)
    return [_Part(params['body_jaxpr'].jaxpr, consts, own, carried, unknown=True)]
  if name == 'cond':
    return [_Part(branch.jaxpr, 1) for branch in params['branches']]
  inner = [params[key] for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if key in params]
  return [] if _opaque(name) else [_Part(getattr(one, 'jaxpr', one)) for one in inner[:1]]


def _scanned(equation: Any) -> _Part:
  """Of constants, carry and rows, in this order, rows alone have a dimension less inside.

  Read from the shapes, as names of the numbers differ between versions of JAX.
  """
  body = equation.params['jaxpr'].jaxpr
  kept = lambda outer, inner: sum(
    a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True)
  )
  carried = kept(equation.outvars, body.outvars)
  consts = kept(equation.invars, body.invars) - carried
  return _Part(body, 0, consts, carried, equation.params['length'])


def _opaque(name: str) -> bool:
  return any(part in name for part in OPAQUE)


def _is(var: Any, known: set) -> bool:
  return not isinstance(var, core.Literal) and var in known


def _marks(jaxpr: Any, marks: Sequence[bool]) -> tuple[list[list[bool]], list[bool]]:
  """(inputs of each equation, outputs of all) that depend on a marked input and have gradients."""
  marked = {var for var, mark in zip(jaxpr.invars, marks, strict=True) if mark}
  seen = []
  for equation in jaxpr.eqns:
    ins = [_is(var, marked) for var in equation.invars]
    seen.append(ins)
    if not any(ins) or equation.primitive.name == 'stop_gradient':
      continue
    parts = [part.marks(ins)[1] for part in _parts(equation)]
    outs = [any(column) for column in zip(*parts, strict=True)] if parts else [True] * len(
      equation.outvars
    )
    for var, out in zip(equation.outvars, outs, strict=True):
      if out and jnp.issubdtype(var.aval.dtype, jnp.inexact):
        marked.add(var)
  return seen, [_is(var, marked) for var in jaxpr.outvars]


def _count(jaxpr: Any, marks: Sequence[bool], wanted: Sequence[bool]) -> tuple[Flops, list[bool]]:
  """(FLOPs, inputs to which a gradient flows) of a jaxpr whose `wanted` outputs have gradients."""
  seen, _ = _marks(jaxpr, marks)
  flowing = {v for v, want in zip(jaxpr.outvars, wanted, strict=True)
             if want and not isinstance(v, core.Literal)}
  total = Flops()
  for equation, ins in zip(reversed(jaxpr.eqns), reversed(seen), strict=True):
    outs = [var in flowing for var in equation.outvars]
    flops, flows = _equation(equation, ins, outs)
    total += flops
    for var, mark, flow in zip(equation.invars, ins, flows, strict=True):
      if mark and flow:
        flowing.add(var)
  return total, [mark and var in flowing for var, mark in zip(jaxpr.invars, marks, strict=True)]


def _equation(equation: Any, ins: list[bool], outs: list[bool]) -> tuple[Flops, list[bool]]:
  """(FLOPs, inputs to which a gradient may flow) of one equation."""
  name = equation.primitive.name
  flow = [any(outs) and name != 'stop_gradient'] * len(ins)
  if name in PRODUCTS:
    flops = 2.0 * PRODUCTS[name](equation)
    return Flops(flops, flops * sum(ins) * any(outs)), flow
  if equation.params.get('name') == ATTENTION:
    return _attention(equation, ins, any(outs)), flow
  if _opaque(name):
    return Flops(unseen=frozenset({name})), flow
  found = [part.count(ins, outs) for part in _parts(equation)]
  if not found:
    return Flops(), flow
  flows = [any(column) for column in zip(*(flows for _, flows in found), strict=True)]
  return max((flops for flops, _ in found), key=lambda flops: flops.total), flows


def _attention(equation: Any, ins: list[bool], wanted: bool) -> Flops:
  """Two products, whatever is made of them; queries and keys have gradients through the weights."""
  queries, keys, values = ins[:3]  # After them a mask, where there is one.
  b, n, h, d = equation.invars[0].aval.shape
  product = 2.0 * b * n * h * d * equation.invars[1].aval.shape[1]
  gradients = queries + keys + (queries or keys) + values
  return Flops(2 * product, product * gradients * wanted)


def _dot(equation: Any) -> int:
  ((contracted, _), _) = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
  """Output positions and channels, times what the window sees of the input."""
  kernel, numbers = equation.invars[1].aval.shape, equation.params['dimension_numbers'].rhs_spec
  seen = math.prod(kernel) // kernel[numbers[0]]
  # Between the inputs of a transposed convolution there is nothing to be multiplied.
  seen = seen / math.prod(equation.params['lhs_dilation'])
  return math.prod(equation.outvars[0].aval.shape) * seen


PRODUCTS = {'dot_general': _dot, 'conv_general_dilated': _convolution}
