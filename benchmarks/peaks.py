"""Peak speeds of chips: what a utilisation is a fraction of."""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Peak:
  """FLOP/s of matrix products on one device, dense, and where the figure is from."""

  flops: float
  source: str


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of device by a pattern of its name; dense FLOP/s by the type of the computation.

  float32 is what XLA multiplies float32 with by default: TF32 on GPUs that have it, one pass in
  bfloat16 on TPUs.
  """

  pattern: str
  bfloat16: float
  float32: float
  source: str


CHIPS = (
  Chip(r'\bH100.*PCIe', 756 * TERA, 378 * TERA,
       'NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 PCIe, without sparsity'),
  Chip(r'\bH[12]00 NVL', 835.5 * TERA, 417.5 * TERA,
       'NVIDIA H100 NVL and H200 NVL data sheets, half of the figures with sparsity'),
  Chip(r'\bH[12]00\b|\bGH200\b', 989.4 * TERA, 494.7 * TERA,
       'NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5, without sparsity; the '
       'H200 data sheet gives the same'),
  Chip(r'\bA100\b', 312 * TERA, 156 * TERA,
       'NVIDIA A100 Tensor Core GPU data sheet, without sparsity'),
  Chip(r'\bL4\b', 121 * TERA, 60 * TERA,
       'NVIDIA L4 Tensor Core GPU data sheet, half of the figures with sparsity'),
  Chip(r'\bT4\b', 65 * TERA, 8.1 * TERA,
       'NVIDIA T4 data sheet; it has no bfloat16 and no TF32: the figures are of float16 and of '
       'float32'),
  Chip(r'TPU v4\b', 275 * TERA, 275 * TERA, 'Google Cloud TPU v4 documentation, a chip'),
  Chip(r'TPU v5 ?(lite|e)', 197 * TERA, 197 * TERA, 'Google Cloud TPU v5e documentation, a chip'),
  Chip(r'TPU v5p?$', 459 * TERA, 459 * TERA, 'Google Cloud TPU v5p documentation, a chip'),
  Chip(r'TPU v6 ?(lite|e)', 918 * TERA, 918 * TERA, 'Google Cloud TPU v6e documentation, a chip'),
)
"""The first that fits counts."""


def listed_peak(kind: str, dtype: str) -> Peak | None:
  """Of a device by the name that JAX has for it; None where the table does not have it.

  Args:
    dtype: 'bfloat16' or 'float32'.
  """
  for chip in CHIPS:
    if re.search(chip.pattern, kind, flags=re.IGNORECASE):
      return Peak(getattr(chip, dtype), chip.source)
  return None


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
