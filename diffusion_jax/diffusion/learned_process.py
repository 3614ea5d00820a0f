"""A noising process whose log-SNR is learned with the network (Kingma et al. 2021, VDM)."""

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.processes import Process, from_log_snr
from diffusion_jax.types import Params


def init_monotone(key: jax.Array, width: int = 1024) -> Params:
  """Parameters of `monotone`: dense layers 1 -> 1, 1 -> width, width -> 1."""
  inner, outer = jax.random.split(key)
  return {
    'l1.kernel': jnp.ones(()),
    'l1.bias': jnp.zeros(()),
    'l2.kernel': jax.random.normal(inner, (width,)),
    'l2.bias': jnp.zeros((width,)),
    'l3.kernel': jax.random.normal(outer, (width,)) / width**0.5,
  }


def monotone(params: Params, t: jax.Array) -> jax.Array:
  """l1(t) + l3(sigmoid(l2(l1(t)))), kernels taken absolute (Kingma et al. 2021, appendix H).

  Grows with t for any parameters. The constant that l3 could add drops out of `learned`.
  """
  first = jnp.abs(params['l1.kernel']) * t + params['l1.bias']
  hidden = jax.nn.sigmoid(first[..., None] * jnp.abs(params['l2.kernel']) + params['l2.bias'])
  return first + hidden @ jnp.abs(params['l3.kernel'])


def learned(params: Params, gamma_min: jax.Array, gamma_max: jax.Array) -> Process:
  """VDM with a learned gamma: `monotone`, scaled to run from gamma_min to gamma_max.

  The end points may be parameters too (Kingma et al. 2021, appendix H).
  """
  low, high = monotone(params, jnp.zeros(())), monotone(params, jnp.ones(()))

  def log_snr(t):
    return -(gamma_min + (gamma_max - gamma_min) * (monotone(params, t) - low) / (high - low))

  return from_log_snr(log_snr)
