"""What a denoiser computes alike at every step, such as keys and values of the text, made once.

XLA takes such work out of a loop, but not out of a `lax.cond` within it, as samplers have them for
steps to skip and for second calls, and guidance for its interval. So it is done here, before the
loop.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun, jaxprs_in_params

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.types import Latents

PRODUCTS = ('dot_general', 'conv_general_dilated')


def hoisted(denoise: Denoiser, x: Latents, alpha: jax.Array, sigma: jax.Array) -> Denoiser:
  """The same denoiser, its products that depend on none of its arguments computed at once.

  Products are matrix products, convolutions, and casts of arrays to fewer bytes; all else is
  cheaper to repeat than to keep. For arguments of another shape or dtype it is `denoise` itself.

  Args:
    x, alpha, sigma: arguments of the shapes and dtypes to come; their values do not matter.
  """
  closed, shapes = jax.make_jaxpr(denoise, return_shape=True)(x, alpha, sigma)
  closed = _flat(closed, (x, alpha, sigma), [True] * 3)
  made, rest = _parted(closed, [True] * 3, [])
  if not made:
    return denoise
  types = [(value.shape, value.dtype) for value in map(jax.typeof, (x, alpha, sigma))]

  def denoise_with(*arguments):
    if [(value.shape, value.dtype) for value in map(jax.typeof, arguments)] != types:
      return denoise(*arguments)
    return jax.tree.unflatten(jax.tree.structure(shapes), rest(*made, *arguments))

  return denoise_with


def _flat(closed: ClosedJaxpr, args: Sequence, moving: Sequence[bool]) -> ClosedJaxpr:
  """The same program, of which `_run` has taken calls and branches apart."""
  run = lambda *args: [value for value, _ in _run(closed, zip(args, moving, strict=True))]
  return jax.make_jaxpr(run)(*args)


def _parted(
  closed: ClosedJaxpr, moving: Sequence[bool], fixed: Sequence
) -> tuple[list, Callable[..., list]]:
  """(what is made once, the function of that and of all arguments that computes the rest).

  Args:
    moving: whether each argument changes from call to call.
    fixed: the values of those that do not.
  """
  jaxpr = closed.jaxpr
  once, kept = _invariant(jaxpr, itertools.compress(jaxpr.invars, moving))
  still = [var for var, moves in zip(jaxpr.invars, moving, strict=True) if not moves]
  some = lambda wanted: [eqn for i, eqn in enumerate(jaxpr.eqns) if (i in once) == wanted]
  first = _function(jaxpr, [*jaxpr.constvars, *still], kept, some(True))
  then = _function(jaxpr, [*jaxpr.constvars, *kept, *jaxpr.invars], jaxpr.outvars, some(False))
  return first(*closed.consts, *fixed), partial(then, *closed.consts)


def _run(closed: ClosedJaxpr, inputs: Iterable[tuple]) -> list[tuple]:
  """The results of a program, without its calls of jitted functions, and branches `_parted`.

  Inputs and results are pairs: a value, and whether it changes from call to call.
  """
  jaxpr = closed.jaxpr
  values = dict(zip(jaxpr.invars, inputs, strict=True))
  values |= {var: (const, False) for var, const in zip(jaxpr.constvars, closed.consts, strict=True)}
  read = lambda atom: (atom.val, False) if isinstance(atom, Literal) else values[atom]
  for eqn in jaxpr.eqns:
    given = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name in ('jit', 'pjit'):
      out = _run(eqn.params['jaxpr'], given)
    else:
      moves = bool(eqn.effects) or any(moves for _, moves in given)
      if eqn.primitive.name == 'cond':
        made = _switch(eqn.params['branches'], given)
      else:
        needed = list(dict.fromkeys(_variables(eqn.invars)))
        made = _function(jaxpr, needed, eqn.outvars, [eqn])(*(values[var][0] for var in needed))
      out = [(value, moves) for value in made]
    values.update(zip(eqn.outvars, out, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _switch(branches: Sequence[ClosedJaxpr], inputs: Sequence[tuple]) -> list:
  """The branch of that number, where what each of them can have made before is made before."""
  (number, _), *operands = inputs
  args, moving = [value for value, _ in operands], [moves for _, moves in operands]
  fixed = [value for value, moves in operands if not moves]
  parts = [_parted(_flat(branch, args, moving), moving, fixed) for branch in branches]
  # Each branch takes its own of what was made.
  choices = [lambda made, args, i=i, rest=rest: rest(*made[i], *args)
             for i, (_, rest) in enumerate(parts)]
  return lax.switch(number, choices, [made for made, _ in parts], args)


def _invariant(jaxpr, moving: Iterable) -> tuple[set[int], list]:
  """Numbers of the equations to compute once, and those of their results that others need."""
  moving = set(moving)
  fixed = []
  for i, eqn in enumerate(jaxpr.eqns):
    if eqn.effects or not moving.isdisjoint(_variables(eqn.invars)):
      moving.update(eqn.outvars)
    else:
      fixed.append(i)
  once, needed = set(), set()
  for i in reversed(fixed):
    eqn = jaxpr.eqns[i]
    if _is_product(eqn) or not needed.isdisjoint(eqn.outvars):
      once.add(i)
      needed.update(_variables(eqn.invars))
  made = {var: None for i in sorted(once) for var in jaxpr.eqns[i].outvars}
  others = [eqn for i, eqn in enumerate(jaxpr.eqns) if i not in once]
  used = {var for eqn in others for var in _variables(eqn.invars)} | set(_variables(jaxpr.outvars))
  return once, [var for var in made if var in used]


def _variables(atoms) -> list:
  return [atom for atom in atoms if not isinstance(atom, Literal)]


def _is_product(eqn) -> bool:
  """Whether the equation, or one within it, is worth keeping the result of."""
  if eqn.primitive.name in PRODUCTS:
    return True
  if eqn.primitive.name == 'convert_element_type':
    (source,), (result,) = eqn.invars, eqn.outvars
    return bool(source.aval.ndim) and result.aval.dtype.itemsize < source.aval.dtype.itemsize
  return any(_is_product(inner) for sub in jaxprs_in_params(eqn.params)
             for inner in sub.eqns)


def _function(jaxpr, arguments, results, eqns):
  """Some of a jaxpr's equations as a function of flat arguments."""
  part = jaxpr.replace(constvars=[], invars=[*arguments], outvars=[*results], eqns=eqns)
  return jaxpr_as_fun(ClosedJaxpr(part, []))
