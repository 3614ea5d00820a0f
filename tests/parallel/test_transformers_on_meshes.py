"""Transformers on every kind of mesh: the same outputs and gradients as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.mmdit import MMDiT, MMDiTConfig
from diffusion_jax.models.network import Network
from diffusion_jax.models.pixart import PixArt, PixArtConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, put_params, to_host
from diffusion_jax.types import Condition

SHARED = dict(
  sample_size=8, in_channels=4, num_attention_heads=2, attention_head_dim=12, out_channels=4
)
NETWORKS = {
  'dit': Network.of(DiT, DiTConfig(
    **SHARED, num_layers=3, num_embeds_ada_norm=4, cross_attention_dim=16, positions='rotary',
    qk_norm='rms_norm', long_skips=True,
  )),
  'mmdit': Network.of(MMDiT, MMDiTConfig(
    **SHARED, num_layers=2, joint_attention_dim=16, caption_projection_dim=24, qk_norm='rms_norm',
    pooled_projection_dim=None, positions='learned', dual_attention_layers=(0,),
  )),
  'pixart': Network.of(PixArt, PixArtConfig(
    **SHARED, num_layers=2, cross_attention_dim=24, caption_channels=16,
    use_additional_conditions=True,
  )),
}
MESHES = {
  'data': MeshConfig(data=8), 'fsdp': MeshConfig(data=1, fsdp=8),
  'fsdp_tensor': MeshConfig(data=1, fsdp=4, tensor=2),
}
RNG = np.random.default_rng(0)
DRAW = lambda *shape: RNG.normal(size=shape).astype(np.float32)
X, T, TEXT = DRAW(8, 8, 8, 4), np.linspace(1, 999, 8, dtype=np.float32), DRAW(8, 6, 16)
MASK = (np.arange(6) < np.arange(1, 9)[:, None] % 7).astype(np.int32)
MASK[:, 0] = 1


def run(net, params, mesh):
  """Output and gradients on the mesh, and the share of the parameters that a device holds."""
  names = net.config.conditions
  given = {
    'text': TEXT, 'mask': MASK, 'labels': np.arange(8) % 5,
    'sizes': np.full((8, 6), 64, np.float32),
  }
  given = {n: v for n, v in given.items() if n in names or n == 'mask'}
  batch = put_batch({'x': X, 't': T, **given}, mesh)

  def loss(params, batch):
    batch = dict(batch)
    y = net.bind(params)(batch.pop('x'), batch.pop('t'), Condition(**batch))
    return jnp.square(y).mean(), y

  placed = put_params(params, mesh)
  held = sum(v.addressable_shards[0].data.size for v in placed.values())
  with jax.set_mesh(mesh):
    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(placed, batch)
  return to_host(gradients), to_host({'y': y})['y'], held / sum(v.size for v in params.values())


@pytest.mark.parametrize('name', NETWORKS)
def test_the_same_outputs_and_gradients(name):
  net, rng = NETWORKS[name], np.random.default_rng(1)
  params = {
    n: rng.normal(0, 0.1, s.shape).astype(np.float32) + n.endswith('scale')
    for n, s in net.shapes.items()
  }
  wanted, y, _ = run(net, params, make_mesh(MeshConfig(), jax.devices()[:1]))
  for mesh, config in MESHES.items():
    found, again, share = run(net, params, make_mesh(config))
    np.testing.assert_allclose(again, y, atol=2e-5, err_msg=mesh)
    for key, value in wanted.items():
      error = np.abs(found[key] - value).max()
      assert error <= 1e-4 * np.abs(value).max() + 1e-7, (mesh, key)
    ways = config.fsdp * config.tensor
    assert 1 / ways <= share < 1 / ways + 0.12, mesh
