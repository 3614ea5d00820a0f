"""The ways to compute attention by name, what each can serve, and which suits where.

Each takes q [b n h d], k and v [b l h d] to [b n h d] and has a gradient.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.layout import on_each_device
from diffusion_jax.models.attend_chunked import chunked
from diffusion_jax.models.attend_splash import splash
from diffusion_jax.xla import Capability

SHORT, LONG, LARGE = 128, 4096, 2**26
"""Lengths up to which, and from which, a kernel does not pay or does; logits of one head."""


def xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """All logits at once, softmax in float32; XLA splits it over a mesh by itself."""
  return jax.nn.dot_product_attention(q, k, v, implementation='xla')


def cudnn(
  q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = 'cudnn'
) -> jax.Array:
  """FlashAttention (Dao 2023) as cuDNN has it.

  JAX gives it a gradient for even lengths alone, so that odd ones are filled up by one; the key
  that this adds has no weight.
  """
  n, keys = q.shape[1], k.shape[1]
  even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
  y = jax.nn.dot_product_attention(
    even(q), even(k), even(v), implementation=implementation,
    key_value_seq_lengths=jnp.full(len(k), keys, jnp.int32) if keys % 2 else None,
  )
  return y[:, :n]


WAYS = {'xla': xla, 'cudnn': cudnn, 'splash': splash, 'chunked': chunked}

ATTENTION = ('auto', *WAYS)
"""What a config may say; auto is `choose`."""


def compute(name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attention by that way, on a mesh by each device of what it holds unless XLA splits it."""
  if name == 'xla':
    return xla(q, k, v)
  # XLA cannot split the programs within kernels; cuDNN's have a rule, but not for split queries.
  kernel = name != 'chunked'
  return on_each_device(WAYS[name], ('queries', 'keys', 'keys'), 'queries', whole=kernel)(q, k, v)


def refusal(
  name: str, platform: str, capability: Capability, dtype: jnp.dtype, d: int | None = None
) -> str:
  """Why that way cannot serve, and what to do; '' where it can. None as d: whatever the heads."""
  if name == 'splash':
    if platform != 'tpu':
      return f'it needs a TPU, and here is {platform}; set attention to auto'
    # As far as JAX tests it: blocks of wider heads may not fit into a core.
    if d is not None and d > 256:
      return f'it takes heads of up to 256 channels, not {d}; set attention to auto'
  if name == 'cudnn':
    if capability is None or capability < (8, 0):
      found = '.'.join(map(str, capability or (platform,)))
      return (
        f'it needs an NVIDIA GPU of compute capability 8.0 or more, and here is {found}; set '
        'attention to auto'
      )
    if dtype not in (jnp.bfloat16, jnp.float16):
      return f'it does not compute in {jnp.dtype(dtype).name}; set dtype to bfloat16'
    largest = 256 if capability >= (9, 0) else 128
    if d is not None and (d % 8 or d > largest):
      return (
        f'it takes heads of a multiple of 8 channels up to {largest}, not {d}; set attention to '
        'auto'
      )
  return ''


def choose(
  platform: str, capability: Capability, dtype: jnp.dtype, n: int, keys: int, d: int
) -> str:
  """The name of the way for n queries and so many keys, both of d channels."""
  serves = lambda name: not refusal(name, platform, capability, dtype, d)
  # At the sizes of the recipes here up to five times as fast as XLA, which writes all logits to
  # memory (docs/speed.md).
  if platform == 'cpu':
    return 'chunked'
  # Against so few, such as the 77 tokens of a text, logits are about as large as the inputs, and
  # kernels, which take 128 at a time, would compute much that is thrown away.
  if min(n, keys) <= SHORT:
    return 'xla'
  # 12 bytes of memory for each logit and weight, written and read, take an A100 or later several
  # times as long as the 4 d FLOPs.
  if serves('cudnn'):
    return 'cudnn'
  # The limit that MaxDiffusion gives for TPUs (flash_min_seq_length): at short lengths what the
  # kernel takes beside its products counts.
  if min(n, keys) >= LONG and serves('splash'):
    return 'splash'
  # No kernel serves, as in an autoencoder, whose one head is as wide as its channels. The logits
  # of each image would take 256 MB or more, some times over: memory counts before speed.
  if n * keys >= LARGE:
    return 'chunked'
  return 'xla'
