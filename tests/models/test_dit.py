"""Diffusion transformers: sizes, beginnings, positions, labels, types and errors.

PyTorch: tests/parity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.errors import UserError
from diffusion_jax.formats.dit import DIT as DIT_FORMAT
from diffusion_jax.formats.dit import MMDIT as MMDIT_FORMAT
from diffusion_jax.formats.dit import TRANSFORMERS
from diffusion_jax.models import network
from diffusion_jax.models.dit import DiT, DiTConfig, grid_positions, sincos_positions
from diffusion_jax.models.mmdit import MMDiT, MMDiTConfig
from diffusion_jax.models.network import Compute
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, shard_params
from diffusion_jax.train.optimizer import decay_mask
from diffusion_jax.types import Condition

DIT = DiTConfig(
  num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=6, num_layers=2,
  sample_size=4, num_embeds_ada_norm=5,
)
MMDIT = MMDiTConfig(
  sample_size=4, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=4,
  num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5,
  pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm='rms_norm',
)
X, T = np.ones((2, 4, 6, 3), np.float32), np.array([3.0, 500.0], np.float32)
TEXT, POOLED = np.ones((2, 5, 6), np.float32), np.ones((2, 5), np.float32)


def run_dit(net, x=X, t=T, labels=(1, 5)):
  return net(jnp.asarray(x), jnp.asarray(t), Condition(labels=jnp.array(labels)))


def run_mmdit(net, x=X, t=T, text=TEXT, pooled=POOLED):
  return net(*jax.tree.map(jnp.asarray, (x, t, Condition(text, pooled))))


NETWORKS = {'dit': (DiT, DIT, run_dit), 'mmdit': (MMDiT, MMDIT, run_mmdit)}


def test_published_size():
  """Their code counts the fixed table of 256 positions too. Other networks: tests/parity."""
  config = TRANSFORMERS['dit_xl_2_256']
  _, shapes = network.abstract(lambda rngs: DiT(config, rngs=rngs))
  assert network.count(shapes) == 675_129_632 - 256 * 1152


@pytest.mark.parametrize('name', NETWORKS)
def test_a_fresh_network_gives_zero_and_learns(name, quick_jit):
  module, config, run = NETWORKS[name]
  graphdef, params = network.split(module(config, rngs=nnx.Rngs(0)))

  def loss(params):
    y = run(network.merge(graphdef, params))
    return (y - 1).sum(), y

  gradients, y = quick_jit(jax.grad(loss, has_aux=True))(params)
  assert y.shape == (2, 4, 6, 3 if name == 'mmdit' else 6) and not np.any(y)
  moved = {n for n, g in gradients.items() if np.any(g)}
  last = 'proj_out' if name == 'mmdit' else 'proj_out_2'
  assert moved == {f'{last}.kernel', f'{last}.bias'}


@pytest.mark.parametrize('name', NETWORKS)
def test_gradient_reaches_every_parameter_and_bfloat16_computes(name, random_params, quick_jit):
  module, config, run = NETWORKS[name]
  graphdef, shapes = network.abstract(lambda rngs: module(config, rngs=rngs))
  params = random_params(shapes)
  if name == 'dit':
    table = 'transformer_blocks.0.norm1.emb.class_embedder.embedding_table.embedding'
    labels = np.arange(6)
    more = dict(x=np.repeat(X[:1], 6, 0), t=np.repeat(T[:1], 6, 0), labels=labels)
  else:
    table, more = 'pos_embed.pos_embed', {}
  # The last block's text asks for nothing, as nothing comes after it.
  unused = {'pos_embed.pos_embed'} | {
    f'transformer_blocks.1.attn.{n}'
    for n in ('add_q_proj.bias', 'add_q_proj.kernel', 'norm_added_q.scale')
  }

  def loss(params):
    y = run(network.merge(graphdef, params), **more)
    return jnp.square(y).mean(), y

  gradients, full = quick_jit(jax.grad(loss, has_aux=True))(params)
  unmoved = {n for n, g in gradients.items() if not np.any(g)}
  assert unmoved == (unused if name == 'mmdit' else set())
  assert decay_mask(params)[table] == (name == 'dit')
  shard_params(shapes, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))

  half = network.abstract(lambda rngs: module(config, compute=Compute(jnp.bfloat16), rngs=rngs))[0]
  low = quick_jit(lambda params: run(network.merge(half, params), **more))(params)
  assert full.dtype == jnp.float32 and low.dtype == jnp.bfloat16
  error = np.sqrt(np.square(full - np.asarray(low, np.float32)).mean() / np.square(full).mean())
  assert 0 < error < 0.1


def test_labels_matter_and_the_null_label_is_a_row_of_its_own(random_params, quick_jit):
  graphdef, shapes = network.abstract(lambda rngs: DiT(DIT, rngs=rngs))
  x, t = np.repeat(X[:1], 6, 0), np.repeat(T[:1], 6, 0)
  params = random_params(shapes)
  y = quick_jit(lambda p: run_dit(network.merge(graphdef, p), x, t, range(6)))(params)
  gaps = [np.abs(y[i] - y[j]).max() for i in range(6) for j in range(i)]
  assert min(gaps) > 1e-3


def test_positions_have_the_known_values():
  found = sincos_positions(np.array([0.0, 2.0]), np.array([0.0, 1.0, 5.0]), 8)
  assert found.shape == (2, 3, 8)
  along = lambda p: [np.sin(p), np.sin(p / 100), np.cos(p), np.cos(p / 100)]
  np.testing.assert_allclose(found[1, 2], [*along(5.0), *along(2.0)], atol=1e-6)
  # Twice as many patches as in training lie half as far apart.
  np.testing.assert_allclose(grid_positions(6, 3), [0, 0.5, 1, 1.5, 2, 2.5])


@pytest.mark.parametrize(('make', 'words'), [
  (lambda: DiTConfig(attention_head_dim=3, num_attention_heads=2), 'multiple of 4 .*, not 6'),
  (lambda: DiTConfig(sample_size=33), 'sample_size is 33; it must be a multiple of patch_size=2'),
  (lambda: DiTConfig(num_layers=0), 'num_layers is 0; give a number from 1 to 512'),
  (lambda: MMDiTConfig(num_attention_heads=24), 'caption_projection_dim is 1152; .* = 1536'),
  (lambda: MMDiTConfig(qk_norm='layer_norm'), "qk_norm is 'layer_norm'"),
  (lambda: MMDiTConfig(dual_attention_layers=(18,)), 'some of the blocks 0 to 17'),
  (
    lambda: DIT_FORMAT.parse({'norm_elementwise_affine': True}, 'here'),
    'norm_elementwise_affine=True',
  ),
  (lambda: DIT_FORMAT.parse({'activation_fn': 'geglu'}, 'here'), "activation_fn='geglu'"),
  (lambda: MMDIT_FORMAT.parse({'guidance_embeds': True}, 'here'), 'guidance_embeds=True'),
])
def test_impossible_configs_are_refused(make, words):
  with pytest.raises(UserError, match=words):
    make()


def test_out_channels_that_a_file_leaves_out_are_those_in():
  assert DIT_FORMAT.parse({'_class_name': 'DiTTransformer2DModel'}, 'here').out_channels is None
  assert DIT_FORMAT.parse(DIT_FORMAT.describe(DIT), 'here') == DIT


@pytest.mark.parametrize(('name', 'changes', 'words'), [
  ('dit', {'x': X[:, :3]}, '3x6 cannot be divided .* multiples of 2; the nearest such size is 4x6'),
  ('dit', {'x': X[..., :2]}, 'must have 3 channels'),
  ('dit', {'t': T[:1]}, r'times must have shape \[2\]'),
  ('dit', {'labels': (1,)}, r'`labels` must have shape \[2\]'),
  ('mmdit', {'x': np.ones((2, 4, 10, 3))}, '4x10 .* of 2 up to 8; the nearest such size is 4x8'),
  ('mmdit', {'text': TEXT[..., :4]}, r'`text` must have shape \[2 n 6\]'),
  ('mmdit', {'pooled': POOLED[:, :4]}, r'`pooled` must have shape \[2 5\]'),
])
def test_impossible_inputs_are_refused(name, changes, words):
  module, config, run = NETWORKS[name]
  with pytest.raises(UserError, match=words):
    nnx.eval_shape(lambda: run(module(config, rngs=nnx.Rngs(0)), **changes))
