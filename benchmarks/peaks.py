"""Peak speeds of chips: what a utilisation is a fraction of."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.planning.chips import chip_of


@dataclasses.dataclass(frozen=True)
class Peak:
  """FLOP/s of matrix products on one device, dense, and where the figure is from."""

  flops: float
  source: str


def listed_peak(kind: str, dtype: str) -> Peak | None:
  """Of a device by the name that JAX has for it; None where the table does not have it.

  Args:
    dtype: 'bfloat16' or 'float32'.
  """
  chip = chip_of(kind)
  return chip and Peak(chip.peak(dtype), chip.source)


def measured_peak(dtype: str, edge: int = 2048, repeats: int = 5) -> Peak:
  """The best of a few products of square matrices on the default device, after one to warm up."""
  x = jax.random.normal(jax.random.key(0), (edge, edge), jnp.dtype(dtype))
  product = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    seconds.append(time.perf_counter() - start)
  return Peak(2 * edge**3 / min(seconds[1:]), f'{dtype} product of {edge} x {edge}, measured')


def peak_of(device: Any, dtype: str, edge: int = 2048) -> Peak:
  """Of one device: from the table, else measured, as for every CPU.

  Simulated devices share the machine's cores; each has its part of the peak. CPUs are measured in
  float32, in which they compute bfloat16, too, with products of `edge` x `edge`.
  """
  if device.platform != 'cpu':
    return listed_peak(device.device_kind, dtype) or measured_peak(dtype, 4 * edge)
  peak = measured_peak('float32', edge)
  count = jax.local_device_count()
  return peak if count == 1 else Peak(peak.flops / count, f'{peak.source}; of {count} on one CPU')
