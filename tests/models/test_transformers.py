"""Options of diffusion transformers that no published network has, by what they must compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.dit import DIT, MMDIT
from diffusion_jax.formats.networks import load_params, save_params
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.mmdit import MMDiT, MMDiTConfig
from diffusion_jax.models.network import Network
from diffusion_jax.models.rotary import in_plane, rotate
from diffusion_jax.planning.flops import count_flops
from diffusion_jax.types import Condition

SMALL = DiTConfig(
  num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=3, num_layers=3,
  sample_size=4, num_embeds_ada_norm=None, cross_attention_dim=6,
)
JOINT = MMDiTConfig(
  sample_size=4, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=4,
  num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8,
  pooled_projection_dim=None, pos_embed_max_size=2, positions='rotary', qk_norm='rms_norm',
)
change = dataclasses.replace
CONFIGS = {
  'text': SMALL,
  'rotary': change(SMALL, positions='rotary', qk_norm='rms_norm', long_skips=True),
  'learned': change(SMALL, positions='learned', num_embeds_ada_norm=4, num_layers=1),
  'unconditional': change(SMALL, cross_attention_dim=None, num_layers=1),
  'joint rotary': JOINT,
  'joint learned': change(JOINT, positions='learned', pooled_projection_dim=5, num_layers=1),
}
MASK = np.array([[1] * 5, [1] * 3 + [0] * 2])
RNG = np.random.default_rng(3)
X, TEXT = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 4, 6, 3), (2, 5, 6)))
T = np.array([3.0, 500.0], np.float32)


def made(config):
  return Network.of(DiT if isinstance(config, DiTConfig) else MMDiT, config)


def condition(config, text=TEXT, mask=MASK):
  names, n = config.conditions, len(text)
  return Condition(
    text=text if 'text' in names else None, mask=mask if 'text' in names else None,
    pooled=np.ones((n, 5), np.float32) if 'pooled' in names else None,
    labels=np.array([1, 4])[:n] if 'labels' in names else None,
  )


@pytest.mark.parametrize('name', CONFIGS)
def test_gradients_padding_sizes_and_files(name, random_params, quick_jit, tmp_path):
  """One program for all conditions of a shape, of latents that are oblong."""
  config = CONFIGS[name]
  net = made(config)
  params, given = random_params(net.shapes), condition(config)

  def loss(params, x, t, given):
    y = net.bind(params)(x, t, given)
    return jnp.square(y).mean(), y

  run = quick_jit(jax.grad(loss, has_aux=True))
  gradients, y = run(params, X, T, given)
  assert y.shape == X.shape
  nothing_after = ('add_q_proj.bias', 'add_q_proj.kernel', 'norm_added_q.scale')
  unmoved = {n for n, g in gradients.items() if not np.any(g)}
  assert all(n.endswith(nothing_after) and f'.{config.num_layers - 1}.' in n for n in unmoved)
  _, fresh = run(jax.jit(net.initialize)(jax.random.key(0)), X, T, given)
  assert not np.any(fresh)
  save_params(tmp_path, config, params)
  again, read = load_params('dit' if isinstance(config, DiTConfig) else 'mmdit', tmp_path)
  assert again == config and all(np.array_equal(v, params[n]) for n, v in read.items())
  if given.text is not None:
    other = TEXT.copy()
    other[1, 3:] = 7.0
    np.testing.assert_array_equal(y, run(params, X, T, condition(config, other))[1])
    other[1, 1] = 7.0
    assert np.abs(y - run(params, X, T, condition(config, other))[1])[1].max() > 1e-3
  assert run._cache_size() == 1


def test_keys_that_diffusers_does_not_have_are_written_where_they_are_set():
  published = DIT.describe(DiTConfig(shared_embedding=False))
  assert published['_class_name'] == 'DiTTransformer2DModel'
  added = {'cross_attention_dim', 'positions', 'qk_norm', 'long_skips', 'shared_embedding'}
  assert not added & published.keys()
  assert DIT.describe(CONFIGS['rotary'])['_class_name'] == 'DiT'
  assert DIT.describe(CONFIGS['text']).keys() & added == {'cross_attention_dim'}
  published = MMDIT.describe(MMDiTConfig())
  assert published['_class_name'] == 'SD3Transformer2DModel' and 'positions' not in published
  assert MMDIT.describe(JOINT)['_class_name'] == 'MMDiT'


def run(config, params, quick_jit, x=X):
  net = made(config)
  return np.asarray(quick_jit(lambda params, x: net.bind(params)(x, T, condition(config)))(
    {name: params[name] for name in net.shapes}, x
  ))


@pytest.fixture
def params(random_params):
  return random_params(made(CONFIGS['rotary']).shapes)


def test_long_skips_join_blocks_from_both_ends(params, quick_jit):
  """Where a block takes all of what is before it, or all of the skip, the answer is known."""
  config, joined = CONFIGS['rotary'], 'transformer_blocks.2.skip_linear'
  one, none = np.eye(8, dtype=np.float32), np.zeros((8, 8), np.float32)
  params[f'{joined}.bias'] = np.zeros(8, np.float32)
  before = params | {f'{joined}.kernel': np.concatenate([one, none])}
  plain = change(config, long_skips=False)
  np.testing.assert_allclose(
    run(config, before, quick_jit), run(plain, params, quick_jit), atol=1e-5
  )
  skipped = params | {f'{joined}.kernel': np.concatenate([none, one])}
  # Then the second block is not seen; both others are those of a network of two.
  rest = {n: v for n, v in params.items() if 'blocks.1.' not in n}
  short = {n.replace('blocks.2.', 'blocks.1.'): v for n, v in rest.items()}
  wanted = run(change(plain, num_layers=2), short, quick_jit)
  np.testing.assert_allclose(run(config, skipped, quick_jit), wanted, atol=1e-5)


def test_attention_to_a_text_adds_to_a_network_without(params, quick_jit):
  config, plain = CONFIGS['rotary'], change(CONFIGS['rotary'], cross_attention_dim=None)
  silent = {n: np.zeros_like(v) if 'attn2.to_out' in n else v for n, v in params.items()}
  np.testing.assert_allclose(
    run(config, silent, quick_jit), run(plain, params, quick_jit), atol=1e-6
  )
  assert np.abs(run(config, params, quick_jit) - run(plain, params, quick_jit)).max() > 1e-3


def test_queries_have_no_scale_where_they_are_normalised(params, quick_jit):
  config = CONFIGS['rotary']
  larger = {n: 3 * v if '.to_q.' in n else v for n, v in params.items()}
  found = [run(config, p, quick_jit) for p in (params, larger)]
  np.testing.assert_allclose(*found, atol=1e-3)
  plain = change(config, qk_norm=None)
  found = [run(plain, p, quick_jit) for p in (params, larger)]
  assert np.abs(np.subtract(*found)).max() > 1e-2


def test_rotary_positions_are_relative_in_the_plane():
  """q k of two tokens depends on how far they lie apart, in rows and in columns."""
  q, k = (RNG.normal(size=8).astype(np.float32) for _ in range(2))
  everywhere = lambda v: rotate(jnp.broadcast_to(v, (1, 15, 1, 8)), in_plane(3, 5, 8))[0, :, 0]
  logits = np.asarray(everywhere(q) @ everywhere(k).T).reshape(3, 5, 3, 5)
  np.testing.assert_allclose(logits[0, 1, 1, 3], logits[1, 2, 2, 4], atol=1e-5)
  np.testing.assert_allclose(logits[1, 1, 1, 1], q @ k, atol=1e-5)
  apart = [logits[0, 0, 1, 0], logits[0, 0, 0, 1], logits[0, 0, 2, 0], logits[0, 0, 0, 0]]
  assert min(abs(a - b) for i, a in enumerate(apart) for b in apart[:i]) > 1e-3


@pytest.mark.parametrize('name', ['learned', 'joint learned'])
def test_learned_positions_are_interpolated(name):
  net = made(CONFIGS[name])
  params = net.initialize(jax.random.key(0))
  table = np.arange(4.0, dtype=np.float32).repeat(8).reshape(1, 4, 8)
  found = net.bind(params | {'pos_embed.pos_embed': table}).pos_embed.positions
  np.testing.assert_array_equal(found(2, 2, 8)[..., 0], [[0, 1], [2, 3]])
  rows = np.array([0, 0.5, 1.5, 2])[:, None]
  np.testing.assert_allclose(found(4, 2, 8)[..., 0], rows + np.array([0, 1]), atol=1e-6)


@pytest.mark.parametrize('name', ['text', 'joint rotary'])
def test_flops_are_counted_with_masked_attention(name):
  """Products of all layers of tokens, and two of each attention."""
  config = change(CONFIGS[name], num_layers=3)
  net, given, b, n, words, c = made(config), condition(config), 2, 6, 5, 8
  found = count_flops(lambda p: net.bind(p)(X, T, given), net.shapes, trained=0)
  assert not found.unseen and found.backward > 1.5 * found.forward
  many = change(config, num_layers=5)
  deeper = made(many)
  more = count_flops(lambda p: deeper.bind(p)(X, T, condition(many)), deeper.shapes)
  if name == 'text':
    layers = b * n * (6 * c**2 + 8 * c**2) + 2 * b * words * 6 * c + 6 * b * c**2
    attention = 2 * b * n * (n + words) * c
  else:
    layers = b * (n + words) * (4 + 8) * c**2 + 12 * b * c**2
    attention = 2 * b * (n + words) ** 2 * c
  assert more.forward - found.forward == 2 * 2 * (layers + attention)


@pytest.mark.parametrize(('changes', 'words'), [
  ({'long_skips': True, 'num_layers': 4}, 'num_layers is 4; it must with long_skips be odd'),
  ({'positions': 'rotary', 'attention_head_dim': 6}, 'with rotary positions be a multiple of 4'),
  ({'shared_embedding': False}, 'shared_embedding is False; it must be True where diffusers'),
  ({'positions': 'rope'}, "positions is 'rope'"),
])
def test_impossible_configs_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    change(SMALL, **changes)


@pytest.mark.parametrize(('given', 'words'), [
  (Condition(), 'needs `text`, by its config'),
  (Condition(text=TEXT[..., :4]), r'`text` must have shape \[2 n 6\]'),
  (Condition(text=TEXT, mask=MASK[:, :3]), r'`mask` is \[2, 3\]; it must have an entry'),
  (Condition(text=TEXT, labels=np.array([0, 1])), 'takes no `labels`'),
])
def test_impossible_conditions_are_refused(given, words):
  net = made(SMALL)
  with pytest.raises(UserError, match=words):
    jax.eval_shape(lambda p: net.bind(p)(X, T, given), net.shapes)
