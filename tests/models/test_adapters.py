"""Kinds of adapters: known answers, starts that change nothing, and merges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.models.adapters import KINDS, Rank, cayley, change, factors, published
from diffusion_jax.models.layers import Conv, Linear
from diffusion_jax.models.lora import TRAINED_KINDS, LoRAConfig, merge_lora, start_of, with_lora
from tests.models.test_lora import X, network_of

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
LAYERS = {
  'dense': lambda rngs: Linear(5, 6, rngs=rngs),
  'window': lambda rngs: Conv(5, 6, stride=2, padding=((0, 1), (0, 1)), rngs=rngs),
}
SIZES = [Rank(5 if kind == 'oft' else 2, 0.0 if 'oft' in kind else 3.0, kind) for kind in KINDS]
SIZES += [Rank(2, 3.0, kind, dora=True) for kind in ('lora', 'loha', 'lokr')]


@pytest.mark.parametrize('size', SIZES, ids=lambda s: s.kind + '-dora' * s.dora)
@pytest.mark.parametrize('layer', LAYERS)
def test_each_kind_starts_as_nothing_and_merges_to_what_it_computes(layer, size, random_params):
  plain = network_of(LAYERS[layer])
  adapted = with_lora(plain, {'layer': size})
  fresh = adapted.initialize(jax.random.key(0))
  base = {name: fresh[name] for name in plain.shapes}
  fresh |= start_of(base, {'layer': size})
  np.testing.assert_allclose(adapted.bind(fresh)(X), plain.bind(base)(X), atol=1e-6)

  params = random_params(adapted.shapes)
  y, before = adapted.bind(params)(X), plain.bind({name: params[name] for name in base})(X)
  assert np.abs(y - before).max() > 0.05
  merged = merge_lora(params, {'layer': size})
  np.testing.assert_allclose(plain.bind(merged)(X), y, atol=5e-5)
  half = merge_lora(params, {'layer': size}, 0.5)['layer.kernel']
  np.testing.assert_allclose(half, (params['layer.kernel'] + merged['layer.kernel']) / 2, atol=1e-5)


def test_lokr_is_the_kronecker_product_and_loha_the_hadamard_product():
  kernel = np.zeros((6, 8), np.float32)
  w1, a, b = draw(2, 3), draw(4, 2), draw(2, 2)
  found = change({'w1': w1, 'w2_a': a, 'w2_b': b}, kernel, Rank(2, 3.0, 'lokr'))
  np.testing.assert_allclose(published(found), 1.5 * np.kron(w1, a @ b), atol=1e-5)
  a1, b1, a2, b2 = draw(8, 2), draw(2, 6), draw(8, 2), draw(2, 6)
  parts = {'w1_a': a1, 'w1_b': b1, 'w2_a': a2, 'w2_b': b2}
  found = change(parts, kernel, Rank(2, 3.0, 'loha'))
  np.testing.assert_allclose(published(found), 1.5 * (a1 @ b1) * (a2 @ b2), atol=1e-5)


@pytest.mark.parametrize(('kind', 'parts'), [
  ('oft', {'skew': draw(3, 3)}), ('oft', {'skew': draw(1, 3)}),
  ('diag_oft', {'blocks': draw(2, 4, 4)}),
])
def test_rotations_are_orthogonal_and_keep_norms(kind, parts):
  kernel = draw(9, 8)
  turned = kernel + change(parts, kernel, Rank(1, 0.0, kind))
  # Norms by the side that is rotated; and the singular values of the whole.
  axis = 0 if kind == 'oft' else 1
  norms = lambda w: np.linalg.norm(w, axis=axis)
  np.testing.assert_allclose(norms(turned), norms(kernel), rtol=1e-4)
  np.testing.assert_allclose(
    np.linalg.svd(turned, compute_uv=False), np.linalg.svd(kernel, compute_uv=False), rtol=1e-4
  )
  assert np.abs(turned - kernel).max() > 0.1
  raw = draw(4, 4)
  turn = cayley(jnp.asarray(raw - raw.T))
  np.testing.assert_allclose(turn @ turn.T, np.eye(4), atol=1e-5)


@pytest.mark.parametrize('shape', [(8, 1), (1, 6)])
def test_dora_sets_the_norms_of_columns_or_rows(shape):
  kernel, norms = draw(6, 8), np.abs(draw(*shape)) + 1
  parts = {'a': draw(6, 2), 'b': draw(2, 8), 'magnitude': norms}
  weight = published(kernel + change(parts, kernel, Rank(2, 2.0, 'lora', dora=True)))
  found = np.linalg.norm(weight, axis=int(shape[0] > 1), keepdims=True)
  np.testing.assert_allclose(found, norms, rtol=1e-5)


def test_the_norm_of_the_skew_part_is_limited_by_alpha():
  kernel, blocks = draw(3, 4), 100 * draw(2, 2, 2)
  q = blocks - blocks.swapaxes(1, 2)
  wanted = change({'blocks': blocks * (0.4 / np.linalg.norm(q))}, kernel, Rank(1, 0, 'diag_oft'))
  found = change({'blocks': blocks}, kernel, Rank(1, 0.1, 'diag_oft'))
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  grad = jax.grad(lambda b: change({'blocks': b}, kernel, Rank(1, 0.1, 'diag_oft')).sum())
  assert np.isfinite(grad(jnp.zeros((2, 2, 2)))).all()


def test_factors_are_those_of_lycoris():
  assert [factors(n) for n in (127, 128, 250, 360, 512, 1024)] == [
    (1, 127), (8, 16), (10, 25), (18, 20), (16, 32), (32, 32)
  ]
  assert [factors(n, 4) for n in (128, 250, 360, 512)] == [(4, 32), (2, 125), (4, 90), (4, 128)]
  assert factors(512, 256) == (2, 256) and factors(7, 7) == (1, 7)


def test_ranks_and_alphas_by_pattern():
  layers = ('mid.attn1.to_q', 'mid.attn2.to_q', 'mid.attn2.to_k')
  config = typed(LoRAConfig, {
    'rank': 4, 'alpha': 2.0, 'ranks': (('attn2.to_q', 16), (r'attn\d.to_q', 9)),
    'alphas': (('to_k', 8.0),), 'rank_stabilized': True,
  }, 'lora.')
  sizes = config.sizes(layers)
  assert [size.rank for size in sizes.values()] == [9, 16, 4]
  np.testing.assert_allclose([size.scale for size in sizes.values()], [2 / 3, 2 / 4, 8 / 2])
  with pytest.raises(UserError, match=r"lora.ranks has 'to_v', but no adapted layer fits it"):
    typed(LoRAConfig, {'ranks': (('to_v', 2),)}, 'lora.').sizes(layers)


@pytest.mark.parametrize(('change', 'words'), [
  ({'kind': 'lora', 'factor': 4}, 'lora.factor has no effect on the kind lora'),
  ({'kind': 'oft', 'dora': True}, 'lora.dora has no effect on the kind oft'),
  ({'kind': 'diag_oft', 'alphas': (('to_q', 2.0),)}, 'lora.alphas has no effect'),
  ({'kind': 'lorb'}, 'lora.kind'),
  ({'kind': 'full'}, 'lora.kind'), ({'kind': 'lokr', 'factor': 0}, 'lora.factor is 0'),
])
def test_settings_without_effect_are_refused(change, words):
  with pytest.raises(UserError, match=words):
    typed(LoRAConfig, change, 'lora.')
  assert 'full' not in TRAINED_KINDS


def test_blocks_of_oft_must_divide_the_inputs(random_params):
  with pytest.raises(UserError, match='must be at least 2 and divide the inputs'):
    _ = with_lora(network_of(LAYERS['dense']), {'layer': Rank(2, 0.0, 'oft')}).shapes
