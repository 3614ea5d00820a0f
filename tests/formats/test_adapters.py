"""Files of LoRA: names with known answers, and errors. Libraries: tests/parity."""

import json
import re
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.formats.adapters import LoRAWeights, read_lora, write_lora
from diffusion_jax.formats.tensors import metadata
from diffusion_jax.pipelines.adapters import add_lora
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.pipelines.text_conditioners import EXTRA, embedding_table

NETWORKS = {
  'unet': {
    'down_blocks.0.resnets.0.conv1.kernel': np.zeros((3, 3, 4, 5)),
    'down_blocks.0.attentions.0.proj_in.kernel': np.zeros((1, 1, 4, 6)),
    'mid_block.attentions.0.to_q.kernel': np.zeros((4, 7)),
    'down_blocks.0.resnets.0.conv1.bias': np.zeros(5),
  },
  'text_encoder': {'text_model.encoder.layers.0.mlp.fc1.kernel': np.zeros((3, 8))},
  'text_encoder_2': {'text_model.encoder.layers.0.mlp.fc1.kernel': np.zeros((3, 8))},
}
FC = 'text_model.encoder.layers.0.mlp.fc1'


def weights(kernel, rank=2, alpha=1.5, dtype=np.float32):
  rng = np.random.default_rng(0)
  *window, i, o = kernel
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  return LoRAWeights(draw(*window, i, rank), draw(*(1 for _ in window), rank, o), alpha)


@pytest.fixture
def lora():
  return {
    role: {
      name.removesuffix('.kernel'): weights(value.shape, rank=1 + n, alpha=2.0**n)
      for n, (name, value) in enumerate(params.items()) if name.endswith('kernel')
    } for role, params in NETWORKS.items()
  }


def assert_same(found, wanted):
  assert {r: set(w) for r, w in found.items()} == {r: set(w) for r, w in wanted.items() if w}
  for role, layers in found.items():
    for name, one in layers.items():
      for part, other in zip(one, wanted[role][name], strict=True):
        np.testing.assert_array_equal(part, other)
      assert one.a.dtype == wanted[role][name].a.dtype


@pytest.mark.parametrize('layout', ['kohya', 'peft'])
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(layout, dtype, lora, tmp_path):
  lora = {
    role: {n: LoRAWeights(one.a.astype(dtype), one.b.astype(dtype), one.alpha)
           for n, one in layers.items()} for role, layers in lora.items()
  }
  write_lora(tmp_path / 'x.safetensors', lora, layout)
  found = read_lora(tmp_path / 'x.safetensors', NETWORKS)
  assert sorted(len(layers) for layers in found.values()) == [1, 1, 3]
  assert_same(found, lora)


def test_names_of_kohya(lora, tmp_path):
  path = tmp_path / 'x.safetensors'
  write_lora(path, lora)
  tensors = load_file(path)
  assert tensors['lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight'].shape == (1, 4, 3, 3)
  assert tensors['lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight'].shape == (5, 1, 1, 1)
  assert tensors['lora_unet_mid_block_attentions_0_to_q.lora_down.weight'].shape == (3, 4)
  assert tensors['lora_unet_mid_block_attentions_0_to_q.alpha'] == 4
  for stem in ('lora_te1_', 'lora_te2_'):
    assert f'{stem}text_model_encoder_layers_0_mlp_fc1.lora_up.weight' in tensors
  one = {role: lora[role] for role in ('unet', 'text_encoder')}
  write_lora(path, one)
  assert 'lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight' in load_file(path)
  assert_same(read_lora(path, NETWORKS | {'text_encoder_3': {}}), one)


def test_alpha_without_a_tensor_or_metadata_is_the_rank(lora, tmp_path):
  path = tmp_path / 'x.safetensors'
  for layout in ('kohya', 'peft'):
    write_lora(path, lora, layout)
    assert ('lora_adapter_metadata' in metadata(path)) == (layout == 'peft')
    save_file({n: t for n, t in load_file(path).items() if not n.endswith('alpha')}, path)
    for layers in read_lora(path, NETWORKS).values():
      assert all(one.alpha == one.a.shape[-1] for one in layers.values())


def test_windows_of_one_may_be_left_out_or_added(tmp_path):
  path = tmp_path / 'x.safetensors'
  wanted = {
    'down_blocks.0.attentions.0.proj_in': weights((1, 1, 4, 6)),
    'mid_block.attentions.0.to_q': weights((4, 7)),
  }
  write_lora(path, {'unet': wanted})
  tensors = {
    n: t if not t.ndim else t[..., None, None] if t.ndim == 2 else t[..., 0, 0]
    for n, t in load_file(path).items()
  }
  save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)
  found = read_lora(path, NETWORKS)
  assert found['unet']['mid_block.attentions.0.to_q'].a.shape == (4, 2)
  assert_same(found, {'unet': wanted})


def test_all_that_does_not_fit_is_named_at_once(lora, tmp_path):
  path = tmp_path / 'x.safetensors'
  write_lora(path, lora)
  tensors = load_file(path)
  tensors.pop('lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight')
  tensors['lora_unet_mid_block_attentions_0_to_q.lora_down.weight'] = np.zeros((3, 5), np.float32)
  tensors['lora_unet_mid_block_attentions_9_to_q.alpha'] = np.zeros((), np.float32)
  tensors['lora_unet_mid_block_attentions_1_to_q.ia3_l'] = np.zeros(7, np.float32)
  save_file(tensors, path)
  with pytest.raises(UserError) as error:
    read_lora(path, NETWORKS)
  for words in (
    'lora_unet_mid_block_attentions_9_to_q.alpha',
    'lora_unet_mid_block_attentions_1_to_q.ia3_l',
    f'without its other matrix: text_encoder {FC}',
    'of a wrong shape: unet mid_block.attentions.0.to_q ([3, 5] and [7, 3] for a kernel [4, 7])',
  ):
    assert words in str(error.value)


def bare(path, **config):
  one = weights((3, 8))
  save_file({
    f'base_model.model.{FC}.lora_A.weight': np.ascontiguousarray(one.a.T),
    f'base_model.model.{FC}.lora_B.weight': np.ascontiguousarray(one.b.T),
  }, path / 'adapter_model.safetensors')
  (path / 'adapter_config.json').write_text(json.dumps({'r': 2, 'lora_alpha': 8} | config))
  return path


@pytest.mark.parametrize(('config', 'alpha'), [
  ({}, 8), ({'alpha_pattern': {'mlp.fc1': 3}}, 3),
  ({'alpha_pattern': {'^encoder.layers.0.mlp.fc1': 7}}, 7),  # As transformers 5 names it.
  ({'alpha_pattern': {'lp.fc1': 3}}, 8),
  ({'alpha_pattern': {r'layers\.\d.mlp.*': 5, 'fc1': 3}}, 5),
  ({'alpha_pattern': {'fc1': 3, r'layers\.\d.mlp.*': 5}}, 3),
  ({'alpha_pattern': {'encoder.layers.1.mlp.fc1': 3, r'.*\.(fc2|fc\d)$': 4}}, 4),
  ({'alpha_pattern': {'^mlp.fc1': 3, '^fc[1-2]': 4, '[a-e]*fc1': 5}, 'rank_pattern': {'fc1': 2},
    'r': 9}, 5),
  ({'use_rslora': True}, 8 * 2**0.5),
])
def test_adapter_config_of_peft(config, alpha, tmp_path):
  network = {'text_encoder': NETWORKS['text_encoder']}
  found = read_lora(bare(tmp_path, **config), network)['text_encoder'][FC]
  assert found.alpha == pytest.approx(alpha)


KEY = 'lora_unet_mid_block_attentions_0_to_q'
TO_Q = 'unet mid_block.attentions.0.to_q'


def changed(path, lora, **changes):
  """A file of kohya whose tensors of one layer, by their ends, are others or gone (None)."""
  write_lora(path, lora)
  tensors = load_file(path)
  for end, value in changes.items():
    tensors.pop(f'{KEY}.{end}', None)
    if value is not None:
      tensors[f'{KEY}.{end}'] = np.asarray(value)
  save_file(tensors, path)
  return path


F32 = np.float32
DOWN, UP = 'lora_down.weight', 'lora_up.weight'


@pytest.mark.parametrize(('changes', 'words'), [
  ({'alpha': [F32(np.nan)]}, f'{KEY}.alpha is nan for the rank 3'),
  ({'alpha': [F32(np.inf)]}, f'{KEY}.alpha is inf'),
  ({'alpha': [-F32(np.inf)]}, f'{KEY}.alpha is -inf'),
  ({'alpha': [F32(1e30)]}, f'{KEY}.alpha is 1e+30'),
  ({'alpha': [np.float64(-1e300)]}, f'{KEY}.alpha is -1e+300'),
  ({'alpha': np.ones(2, F32)}, f'{KEY}.alpha of shape [2] and type float32 is no number'),
  ({'alpha': np.ones(0, F32)}, f'{KEY}.alpha of shape [0]'),
  ({'alpha': np.ones(1, bool)}, 'type bool is no number'),
  ({DOWN: np.ones((0, 4), F32), UP: np.ones((7, 0), F32)}, f'of rank 0: {TO_Q}'),
  ({DOWN: np.ones((0, 4), F32)}, f'of rank 0: {TO_Q}'),
  ({UP: np.ones((0, 3), F32)}, f'of rank 0: {TO_Q}'),
  ({UP: np.ones((7, 2), F32)}, f'of a wrong shape: {TO_Q} ([3, 4] and [7, 2] for a kernel [4, 7])'),
  ({UP: np.ones(7, F32)}, f'of a wrong shape: {TO_Q}'),
  ({UP: F32([1])}, f'of a wrong shape: {TO_Q}'),
  ({UP: np.ones((1, 7, 3, 1, 1), F32)}, f'of a wrong shape: {TO_Q}'),
  ({UP: np.full((7, 3), np.nan, F32)}, f'{KEY}.{UP} has values that are not finite'),
  ({DOWN: np.full((3, 4), np.inf, np.float16)}, f'{KEY}.{DOWN} has values that are not finite'),
  ({DOWN: np.full((3, 4), 1e300)}, f'{KEY}.{DOWN} has values that are not finite'),
  ({UP: np.ones((7, 3), np.int32)}, f'{KEY}.{UP} is of type int32'),
  ({UP: None}, f'without its other matrix: {TO_Q}'),
  ({DOWN: None, UP: None}, f'without its other matrix: {TO_Q}'),
  ({'lora_mid.weight': np.ones((3, 3), F32)}, f'{KEY}.lora_mid.weight of shape [3, 3] stands'),
  ({'lora_A.weight': np.ones((3, 4), F32)}, 'which are one part of one layer'),
  ({'dora_scale': np.ones(6, F32)}, f'{KEY}.dora_scale of shape [6] is no norm of each output of'),
  ({'dora_scale': np.full(7, np.nan, F32)}, f'{KEY}.dora_scale has values that are not finite'),
  ({'lokr_w1': np.ones((7, 4), F32)}, f'of several kinds (lokr and lora): {TO_Q}'),
  ({DOWN: None, UP: None, 'lokr_w1': np.ones((7, 4), F32)},
   f'without one of its two factors: {TO_Q}'),
  ({DOWN: None, UP: None, 'lokr_w1': np.ones((7, 3), F32), 'lokr_w2': np.ones((1, 2), F32)},
   f'of a wrong shape: {TO_Q} (w1 [7, 3], w2 [1, 2] for a kernel [4, 7])'),
  ({DOWN: None, UP: None, 'hada_w1_a': np.ones((7, 4), F32)},
   f'without w1_b, w2_a, w2_b: {TO_Q}'),
  ({DOWN: None, UP: None, 'oft_blocks': np.ones((2, 4, 4), F32)}, f'of a wrong shape: {TO_Q}'),
  ({DOWN: None, UP: None, 'oft_blocks': np.ones((1, 7, 1, 1), F32)}, 'BOFT'),
  ({DOWN: None, UP: None, 'diff': np.ones((4, 7), F32)}, f'of a wrong shape: {TO_Q}'),
  ({'diff_b': np.ones(7, F32)}, f'{KEY}.diff_b changes a bias that the layer does not have'),
  ({'lora_B.bias': np.ones(7, F32)}, f'{KEY}.lora_B.bias changes a bias that the layer does not'),
  ({'w_norm': np.ones(7, F32)}, 'differences of norms, which is not implemented'),
  ({'lokr_t1': np.ones(7, F32)}, f'no part of a LoRA of the given networks: {KEY}.lokr_t1'),
  ({'other': np.ones(7, F32)}, f'no part of a LoRA of the given networks: {KEY}.other'),
])
def test_what_would_make_black_pictures_or_nothing_is_refused_by_name(
  changes, words, lora, tmp_path
):
  path = changed(tmp_path / 'x.safetensors', lora, **changes)
  with pytest.raises(UserError, match=re.escape(words)) as error:
    read_lora(path, NETWORKS)
  assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_the_sign_of_alpha_is_kept(lora, tmp_path):
  path = changed(tmp_path / 'x.safetensors', lora, alpha=[F32(-2)])
  assert read_lora(path, NETWORKS)['unet']['mid_block.attentions.0.to_q'].alpha == -2


def test_float8_is_read_as_it_is(lora, tmp_path):
  half = lambda array: array.astype(ml_dtypes.float8_e4m3fn)
  layers = {n: LoRAWeights(half(o.a), half(o.b), o.alpha) for n, o in lora['unet'].items()}
  write_lora(tmp_path / 'x.safetensors', {'unet': layers})
  found = read_lora(tmp_path / 'x.safetensors', NETWORKS)
  assert_same(found, {'unet': layers})


@pytest.mark.parametrize(('config', 'words'), [
  ({'lora_alpha': float('nan')}, 'alpha of text_encoder .* is nan'),
  ({'lora_alpha': float('inf')}, 'is inf'), ({'lora_alpha': '8'}, "lora_alpha is '8'"),
  ({'lora_alpha': True}, 'lora_alpha is True'), ({'lora_alpha': 10**400}, '401 digits'),
  ({'lora_alpha': [8]}, 'must be a number'),
  ({'alpha_pattern': {'fc1': float('nan')}}, 'is nan'),
  ({'alpha_pattern': {'fc1': None}}, 'alpha_pattern has no number for fc1'),
  ({'alpha_pattern': {'fc1': {}}}, 'alpha_pattern of fc1 is {}'),
  ({'alpha_pattern': ['fc1']}, 'alpha_pattern must be a table'),
  ({'r': 4}, 'gives .*fc1 the rank 4, but its matrices have 2'), ({'r': 0}, 'r is 0; it must be a'),
  ({'rank_pattern': {'fc1': 3}}, 'the rank 3'), ({'rank_pattern': {'x': -1}}, 'rank_pattern of x'),
  ({'peft_type': 'VERA'}, "peft_type='VERA'"),
  ({'peft_type': 'LOHA'}, 'is of LOHA, not LORA'),
  ({'init_lora_weights': 'pissa_niter_4'}, 'changes the weights'),
  ({'init_lora_weights': 'loftq'}, 'changes the weights'),
  ({'lora_bias': True}, 'without the tensors of lora_bias in'),
  ({'alora_invocation_tokens': [1]}, 'alora_invocation_tokens'),
  ({'alpha_pattern': {'(?=a)fc1': 3}}, 'is more than names'),
  ({'alpha_pattern': {'fc{1,9}': 3}}, 'is more than names'),
  ({'alpha_pattern': {'(fc1': 3}}, 'is more than names'),
  ({'alpha_pattern': {'fc1)': 3}}, 'is more than names'),
  ({'alpha_pattern': {'[z-a]': 3}}, 'is more than names'),
  ({'alpha_pattern': {'(' * 100000: 3}}, 'over 2000 characters'),
  ({'alpha_pattern': {'(' * 1000: 3}}, 'is more than names'),
  ({'alpha_pattern': {f'a*{n}': 3 for n in range(1000)}}, 'over 2000 characters'),
])
def test_configs_that_say_nothing_sound(config, words, tmp_path):
  with pytest.raises(UserError, match=words) as error:
    read_lora(bare(tmp_path, **config), {'text_encoder': NETWORKS['text_encoder']})
  assert len(str(error.value)) < 500


@pytest.mark.parametrize('pattern', ['(a|a)?' * 150 + 'b', '.*' * 400 + 'b', 'f*' * 500 + '[^f]+x'])
def test_a_pattern_cannot_keep_the_reader_busy(pattern, tmp_path):
  """Each would take a backtracking matcher for ever on a layer of this name."""
  layer = 'f' * 60 + '.fc1'
  network = {'unet': {f'{layer}.kernel': np.zeros((3, 8))}}
  one = weights((3, 8))
  write_lora(tmp_path / 'adapter_model.safetensors', {'unet': {layer: one}}, 'kohya')
  tensors = {n: t for n, t in load_file(tmp_path / 'adapter_model.safetensors').items()
             if 'alpha' not in n}
  save_file(tensors, tmp_path / 'adapter_model.safetensors')
  config = {'lora_alpha': 5, 'alpha_pattern': {pattern: 3}}
  (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
  start = time.process_time()
  assert read_lora(tmp_path, network)['unet'][layer].alpha == 5
  assert time.process_time() - start < 2


@pytest.mark.parametrize('text', ['[1]', '{"r": ', '3', '{"a":' * 100000 + '1' + '}' * 100000])
def test_metadata_that_is_no_config(text, lora, tmp_path):
  path = tmp_path / 'x.safetensors'
  write_lora(path, lora, 'peft')
  save_file(load_file(path), path, {'lora_adapter_metadata': text})
  with pytest.raises(UserError, match=r'lora_adapter_metadata (is not readable JSON|must hold)'):
    read_lora(path, NETWORKS)


def test_a_learned_word_is_called_one(lora, tmp_path):
  path = tmp_path / 'x.safetensors'
  write_lora(path, lora)
  tensors, row = load_file(path), np.zeros((1, 3), np.float32)
  bundled = ('bundle_emb.cat.emb_params', 'bundle_emb.cat.clip_g')
  for name in (*bundled, 'emb_params', 'clip_l', '<cat>'):
    save_file(tensors | {name: row}, path)
    with pytest.raises(UserError, match=rf'holds a textual inversion \({re.escape(name)}\) with'):
      read_lora(path, NETWORKS)
    assert_same(read_lora(path, NETWORKS, inversions=True), lora)
    save_file({name: row}, path)
    with pytest.raises(UserError, match=r'which is no LoRA; give it as --textual_inversion'):
      read_lora(path, NETWORKS, inversions=True)


def test_a_lora_and_the_word_learned_with_it_are_added_together(tmp_path):
  source = 'asset:text-to-image-openmoji-64'
  model, params, _ = load_model(source)
  name = next(n for n in params['denoiser'] if n.endswith('attn2.to_q.kernel'))
  layer, path = name.removesuffix('.kernel'), tmp_path / 'x.safetensors'
  write_lora(path, {'unet': {layer: weights(params['denoiser'][name].shape)}})
  width = embedding_table(model.text.networks['text_encoder'])[1]
  rows = np.ones((2, width), np.float32)
  save_file(load_file(path) | {'bundle_emb.zyx.emb_params': rows}, path)
  before = model.text.tokens(['zyx'])
  added = add_lora(model, params, str(path))
  assert not np.array_equal(added['denoiser'][name], params['denoiser'][name])
  np.testing.assert_array_equal(added['text_encoder'][EXTRA], rows)
  known = embedding_table(model.text.networks['text_encoder'])[2]
  assert set(model.text.tokens(['zyx']).ravel()) - set(before.ravel()) == {known, known + 1}
  for scale in (float('nan'), float('inf')):
    with pytest.raises(UserError, match='give a finite number'):
      add_lora(model, params, str(path), scale)


def test_mistakes(lora, tmp_path):
  with pytest.raises(UserError, match='layout must be one of kohya, peft'):
    write_lora(tmp_path / 'x.safetensors', lora, 'a1111')
  with pytest.raises(UserError, match='not vae'):
    write_lora(tmp_path / 'x.safetensors', {'vae': {}})
  with pytest.raises(UserError, match='at least one network'):
    read_lora(tmp_path / 'x.safetensors', {})
  with pytest.raises(UserError, match='no file'):
    read_lora(tmp_path / 'x.safetensors', NETWORKS)
  with pytest.raises(UserError, match='neither pytorch_lora_weights'):
    read_lora(tmp_path, NETWORKS)
  with pytest.raises(UserError, match='for text_encoder or text_encoder_2; give one'):
    read_lora(bare(tmp_path), NETWORKS)
  with pytest.raises(UserError, match=r'no part of a LoRA .* base_model\.model\.text_model'):
    read_lora(tmp_path, {'unet': NETWORKS['unet']})
  with pytest.raises(UserError, match='without the tensors of use_dora in'):
    read_lora(bare(tmp_path, use_dora=True), {'text_encoder': NETWORKS['text_encoder']})
  write_lora(tmp_path / 'x.safetensors', {'unet': lora['unet'], 'text_encoder': {}}, 'peft')
  with pytest.raises(UserError, match='no part of a LoRA'):
    read_lora(tmp_path / 'x.safetensors', {'text_encoder': NETWORKS['text_encoder']})
