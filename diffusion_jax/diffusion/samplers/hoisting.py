"""What a denoiser computes alike at every step, such as keys and values of the text, made once.

XLA takes such work out of a loop, but not out of a `lax.cond` within it, as samplers have them for
steps to skip and for second calls. So it is done here, before the loop.
"""

import jax
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
  closed = jax.make_jaxpr(lambda *args: _run(closed.jaxpr, closed.consts, args))(x, alpha, sigma)
  jaxpr = closed.jaxpr
  once, kept = _invariant(jaxpr)
  if not once:
    return denoise
  rest = [eqn for i, eqn in enumerate(jaxpr.eqns) if i not in once]
  first = _function(jaxpr, jaxpr.constvars, kept, [jaxpr.eqns[i] for i in sorted(once)])
  then = _function(jaxpr, [*jaxpr.constvars, *kept, *jaxpr.invars], jaxpr.outvars, rest)
  values = first(*closed.consts)
  types = [(value.shape, value.dtype) for value in map(jax.typeof, (x, alpha, sigma))]

  def denoise_with(*arguments):
    if [(value.shape, value.dtype) for value in map(jax.typeof, arguments)] != types:
      return denoise(*arguments)
    out = then(*closed.consts, *values, *arguments)
    return jax.tree.unflatten(jax.tree.structure(shapes), out)

  return denoise_with


def _run(jaxpr, consts, args) -> list:
  """The results of a jaxpr, computed without the calls of jitted functions that it is made of."""
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('jit', 'pjit'):
      inner = eqn.params['jaxpr']
      out = _run(inner.jaxpr, inner.consts, map(read, eqn.invars))
    else:
      needed = list(dict.fromkeys(_variables(eqn.invars)))
      out = _function(jaxpr, needed, eqn.outvars, [eqn])(*map(read, needed))
    values.update(zip(eqn.outvars, out, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _invariant(jaxpr) -> tuple[set[int], list]:
  """Numbers of the equations to compute once, and those of their results that others need."""
  moving = set(jaxpr.invars)
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
