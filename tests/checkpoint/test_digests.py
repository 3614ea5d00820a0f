"""A digest changes with any bit and any exchange, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.checkpoint.digests import add_up, digests, local_digests


def _tree():
  key = jax.random.key(0)
  return {
    'kernel': jax.random.normal(key, (16, 24)),
    'half': jax.random.normal(key, (8, 3)).astype(jnp.bfloat16),
    'step': jnp.asarray(7, jnp.int32),
    'mask': jnp.arange(16) % 3 == 0,
  }


def _known(x: np.ndarray) -> list[int]:
  """The definition, word by word, with Python's integers."""
  kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
  sums = [0, 0]
  for place, word in enumerate(x.reshape(-1).view(kind).tolist()):
    scattered = (place + 1) * 2654435761 % 2**32
    scattered ^= scattered >> 15
    sums[0] += word * (2 * place + 1)
    sums[1] += word * (2 * scattered + 1)
  return [total % 2**32 for total in sums]


def test_known_answers():
  for path, found in digests(_tree()).items():
    assert found == _known(np.asarray(_tree()[path[2:-2]])), path


def test_any_bit_and_any_exchange_changes_the_digest():
  tree, before = _tree(), digests(_tree())
  words = np.asarray(tree['kernel']).view(np.uint32)
  for place in ((0, 0), (15, 23), (7, 11)):
    for bit in range(32):
      flipped = words.copy()
      flipped[place] ^= np.uint32(1 << bit)
      after = digests({**tree, 'kernel': jnp.asarray(flipped.view(np.float32))})
      # A NaN keeps its bits on the way to the device, so every bit counts.
      assert after["['kernel']"] != before["['kernel']"]
      assert after["['half']"] == before["['half']"]
  exchanged = tree['kernel'].at[0].set(tree['kernel'][1]).at[1].set(tree['kernel'][0])
  assert digests({'kernel': exchanged})["['kernel']"] != before["['kernel']"]
  assert digests({'half': -tree['half']})["['half']"] != before["['half']"]
  assert digests({'mask': ~tree['mask']})["['mask']"] != before["['mask']"]


@pytest.mark.parametrize('spec', [
  PartitionSpec(), PartitionSpec('a', 'b'), PartitionSpec(None, 'a'), PartitionSpec(('b', 'a')),
  PartitionSpec('b', ('a',)), PartitionSpec(None, ('a', 'b')),
], ids=str)
def test_the_digest_does_not_depend_on_the_sharding(spec):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  x = _tree()['kernel']
  assert digests({'x': jax.device_put(x, NamedSharding(mesh, spec))}) == digests({'x': x})


def test_arrays_may_be_donated_before_their_digests_are_asked_for():
  x = jnp.arange(1 << 20, dtype=jnp.float32)
  wanted = digests({'x': x})
  fetch = local_digests({'x': x})
  jax.jit(lambda x: x + 1, donate_argnums=0)(x)
  assert x.is_deleted() and fetch() == wanted


def test_shares_add_up_modulo_2_to_the_32():
  shares = [{'a': [2**32 - 1, 3], 'b': [1, 1]}, {'a': [2, 4], 'b': [0, 0]}]
  assert add_up(shares) == {'a': [1, 7], 'b': [1, 1]}
