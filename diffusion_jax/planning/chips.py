"""The table of chips: memory, peak speeds and links, each as its maker publishes it."""

import dataclasses
import re

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of device by a pattern of its name in JAX; speeds are of one device, dense.

  bfloat16, float32: FLOP/s of products, float32 as XLA multiplies it by default: TF32 on GPUs that
  have it, one pass in bfloat16 on TPUs. name: in a target, '' where it is none. memory: bytes.
  bandwidth: bytes/s of the memory. link: bytes/s that it sends to its neighbours over all links,
  one way. network: the same to other machines of GPUs. clock: Hz in which the compiler counts
  cycles, 0 where it counts none. description: of a GPU, for its compiler.
  """

  pattern: str
  bfloat16: float
  float32: float
  source: str
  name: str = ''
  memory: float = 0.0
  bandwidth: float = 0.0
  link: float = 0.0
  network: float = 0.0
  clock: float = 0.0
  description: str = ''

  @property
  def platform(self) -> str:
    """The platform of JAX's that compiles for it."""
    return 'tpu' if self.pattern.startswith('TPU') else 'cuda'

  def peak(self, dtype: str) -> float:
    """FLOP/s of products in 'bfloat16' or 'float32'."""
    return getattr(self, dtype)


def _gpu(name: str, cores: int, lanes: int, shared: int, clock: float, memory: float, cache: int,
         size: int, capability: tuple[int, int]) -> str:
  """Describe a GPU to XLA, which compiles for it without one; what all of them share is here."""
  return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {memory:.0f} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {size}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 }} device_description_str: "{name}" """


_H100 = _gpu('NVIDIA H100 80GB HBM3', 132, 128, 233472, 1.98, 3352.32e9, 50 * 2**20, 84942979072,
             (9, 0))
_A100 = _gpu('NVIDIA A100-SXM4-80GB', 108, 64, 167936, 1.41, 2039e9, 40 * 2**20, 84987740160,
             (8, 0))

CHIPS = (
  Chip(r'\bH100.*PCIe', 756 * TERA, 378 * TERA,
       'NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 PCIe, without sparsity'),
  Chip(r'\bH[12]00 NVL', 835.5 * TERA, 417.5 * TERA,
       'NVIDIA H100 NVL and H200 NVL data sheets, half of the figures with sparsity'),
  Chip(r'\bH[12]00\b|\bGH200\b', 989.4 * TERA, 494.7 * TERA,
       'NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5, without sparsity; the '
       'H200 data sheet gives the same. Memory of 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways; '
       'between machines a port of 400 Gb/s for each GPU, as in DGX H100',
       'h100', 84942979072, 3352.32 * GIGA, 450 * GIGA, 50 * GIGA, description=_H100),
  Chip(r'\bA100\b', 312 * TERA, 156 * TERA,
       'NVIDIA A100 Tensor Core GPU data sheet, without sparsity; SXM of 80 GB at 2.039 TB/s, '
       'NVLink 600 GB/s both ways; between machines a port of 200 Gb/s for each GPU, as in DGX '
       'A100',
       'a100', 84987740160, 2039 * GIGA, 300 * GIGA, 25 * GIGA, description=_A100),
  Chip(r'\bL4\b', 121 * TERA, 60 * TERA,
       'NVIDIA L4 Tensor Core GPU data sheet, half of the figures with sparsity'),
  Chip(r'\bT4\b', 65 * TERA, 8.1 * TERA,
       'NVIDIA T4 data sheet; it has no bfloat16 and no TF32: the figures are of float16 and of '
       'float32'),
  Chip(r'TPU v4\b', 275 * TERA, 275 * TERA, 'Google Cloud TPU v4 documentation, a chip'),
  # Clocks: the peak over the multiply-adds of a cycle, 4, 8 and 4 units of 128 x 128, 128 x 128 and
  # 256 x 256. Memory: what is left to programs, of 16 GB by the compiler's own word.
  Chip(r'TPU v5 ?(lite|e)', 197 * TERA, 197 * TERA,
       'Google Cloud TPU v5e documentation, a chip: 16 GB at 819 GB/s, ICI of 1600 Gb/s',
       'v5e', 15.75 * GIB, 819 * GIGA, 200 * GIGA, clock=1.5 * GIGA),
  Chip(r'TPU v5p?$', 459 * TERA, 459 * TERA,
       'Google Cloud TPU v5p documentation, a chip: 95 GiB at 2765 GB/s, ICI of 1200 GB/s both '
       'ways',
       'v5p', 95 * GIB, 2765 * GIGA, 600 * GIGA, clock=1.75 * GIGA),
  Chip(r'TPU v6 ?(lite|e)', 918 * TERA, 918 * TERA,
       'Google Cloud TPU v6e documentation, a chip: 32 GB at 1640 GB/s, ICI of 3584 Gb/s',
       'v6e', 31.25 * GIB, 1640 * GIGA, 448 * GIGA, clock=1.75 * GIGA),
)
"""The first that fits counts."""

NAMED = {chip.name: chip for chip in CHIPS if chip.name}


def chip_of(kind: str) -> Chip | None:
  """Return the row of a device by the name that JAX has for it, None where there is none."""
  found = (chip for chip in CHIPS if re.search(chip.pattern, kind, flags=re.IGNORECASE))
  return next(found, None)
