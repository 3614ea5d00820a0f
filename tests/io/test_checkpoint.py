"""Damage to a checkpoint is noticed, down to one bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.errors import UserError
from diffusion_jax.io.checkpoint import Checkpoints
from diffusion_jax.io.digests import digests


def _tree():
  key = jax.random.key(0)
  return {
    'kernel': jax.random.normal(key, (16, 24)),
    'half': jax.random.normal(key, (8, 3)).astype(jnp.bfloat16),
    'step': jnp.asarray(7, jnp.int32),
  }


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


def test_the_digest_does_not_depend_on_the_sharding():
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  x = _tree()['kernel']
  for spec in (PartitionSpec('a', 'b'), PartitionSpec(None, 'a'), PartitionSpec(('b', 'a'))):
    assert digests({'x': jax.device_put(x, NamedSharding(mesh, spec))}) == digests({'x': x})


@pytest.fixture
def saved(tmp_path):
  state = {'params': _tree(), 'opt_state': {}, 'ema': {}, 'rest': {'step': jnp.asarray(3)}}
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  checkpoints.save(3, state, {'read': 5})
  checkpoints.close()
  return tmp_path / 'checkpoints', state


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def test_what_is_saved_comes_back(saved):
  directory, state = saved
  checkpoints = Checkpoints(directory, read_only=True)
  found, data = checkpoints.restore(3, _abstract(state))
  jax.tree.map(np.testing.assert_array_equal, found, state)
  assert data == {'read': 5}
  params = checkpoints.restore_params(3, _abstract(state['params']), ema=False)
  jax.tree.map(np.testing.assert_array_equal, params, state['params'])


def test_a_flipped_bit_never_passes_for_the_saved_state(saved):
  """Orbax alone restores most of these without a word."""
  directory, state = saved
  rng, noticed = np.random.default_rng(0), 0
  files = sorted(p for p in (directory / '3' / 'params').rglob('d/*') if p.is_file())
  for file in files:
    whole = file.read_bytes()
    for place in rng.integers(len(whole), size=12):
      damaged = bytearray(whole)
      damaged[place] ^= 1 << int(rng.integers(8))
      file.write_bytes(damaged)
      checkpoints = Checkpoints(directory, read_only=True)
      try:
        found, _ = checkpoints.restore(3, _abstract(state))
        jax.tree.map(np.testing.assert_array_equal, found, state)
      except UserError as error:
        assert str(directory / '3') in str(error)
        noticed += 1
    file.write_bytes(whole)
  assert noticed > 0
