"""convert: refusals, what is copied and what is left out. Exactness: tests/parity."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.networks import load_params, save_params
from diffusion_jax.models import network
from diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion_jax.models.text.clip import CLIPTextConfig, CLIPTextModel
from diffusion_jax.models.unet import UNet, UNetConfig

VAE = AutoencoderKLConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2)
TEXT = CLIPTextConfig(
  vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
UNET = UNetConfig(
  block_out_channels=(8,), down_block_types=('CrossAttnDownBlock2D',), attention_head_dim=1,
  up_block_types=('CrossAttnUpBlock2D',), layers_per_block=1, norm_num_groups=2,
  cross_attention_dim=8,
)
PARTS = {
  'unet': (UNet, UNET, ['diffusers', 'UNet2DConditionModel']),
  'vae': (AutoencoderKL, VAE, ['diffusers', 'AutoencoderKL']),
  'text_encoder': (CLIPTextModel, TEXT, ['transformers', 'CLIPTextModel']),
}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A pipeline with a safety checker, a scheduler and a tokenizer."""
  folder = tmp_path_factory.mktemp('pipeline')
  rng = np.random.default_rng(0)
  index = {'_class_name': 'StableDiffusionPipeline', 'requires_safety_checker': False}
  for name, (module, config, entry) in PARTS.items():
    shapes = network.abstract(lambda rngs, m=module, c=config: m(c, rngs=rngs))[1]
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
    save_params(folder / name, config, jax.tree.map(draw, shapes))
    index[name] = entry
  files = {
    'scheduler': {'scheduler_config.json': {'prediction_type': 'epsilon'}},
    'tokenizer': {'vocab.json': {}, 'tokenizer_config.json': {'x': 1}},
    'feature_extractor': {'preprocessor_config.json': {'size': 224}},
    'safety_checker': {'config.json': {'model_type': 'safety'}, 'model.safetensors': {}},
  }
  for name, texts in files.items():
    (folder / name).mkdir()
    for file, values in texts.items():
      (folder / name / file).write_text(json.dumps(values))
    index[name] = ['library', 'Class']
  (folder / 'safety_checker' / 'pytorch_model.bin').write_bytes(b'code')
  (folder / 'model_index.json').write_text(json.dumps(index))
  return folder


@pytest.fixture
def pipeline(written, tmp_path):
  return shutil.copytree(written, tmp_path / 'pipeline')


def edit_index(pipeline, **entries):
  path = pipeline / 'model_index.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize('layout', ['diffusers', 'native'])
def test_parts_without_a_network_are_copied(written, tmp_path, layout):
  assert convert(written, tmp_path / 'out', layout) == []
  for name in ('scheduler', 'tokenizer', 'feature_extractor', 'safety_checker'):
    copied = {p.name: p.read_bytes() for p in (tmp_path / 'out' / name).iterdir()}
    wanted = {p.name: p.read_bytes() for p in (written / name).iterdir() if p.suffix != '.bin'}
    assert copied == wanted
  index = json.loads((tmp_path / 'out' / 'model_index.json').read_text())
  assert index == json.loads((written / 'model_index.json').read_text())
  for name, (_, config, _) in PARTS.items():
    kind = {'vae': 'autoencoder', 'text_encoder': 'clip_text'}.get(name, name)
    found, params = load_params(kind, tmp_path / 'out' / name)
    wanted = load_params(kind, written / name)[1]
    assert found == config and params.keys() == wanted.keys()
    assert all(np.array_equal(params[key], wanted[key]) for key in params)


def test_a_single_file_leaves_them_out_and_says_so(written, tmp_path, command, capsys):
  out = tmp_path / 'new' / 'one.safetensors'
  assert command('convert', '--from', written, '--to', out, '--layout', 'single-file') == 0
  printed = capsys.readouterr().out.splitlines()
  assert sum(line.endswith('is left out: a single file has no place for it.') for line in printed
             ) == 2
  assert any(line.startswith('safety_checker is left out') for line in printed)
  assert any('norm_num_groups 2' in line for line in printed)
  assert printed[-1] == f'written to {out}' and out.is_file()


def test_a_part_that_has_only_a_pickle_is_left_out(pipeline, tmp_path):
  (pipeline / 'safety_checker' / 'model.safetensors').unlink()
  notes = convert(pipeline, tmp_path / 'out', 'diffusers')
  assert len(notes) == 1 and 'pytorch_model.bin' in notes[0] and 'pickle' in notes[0]
  assert not (tmp_path / 'out' / 'safety_checker').exists()
  index = json.loads((tmp_path / 'out' / 'model_index.json').read_text())
  assert index['safety_checker'] == [None, None]


@pytest.mark.parametrize('name', ['..', '../unet', '/etc', 'unet/../../x', 'a.b', 'a\\b', ''])
def test_names_of_parts_cannot_leave_the_directory(pipeline, tmp_path, name):
  edit_index(pipeline, **{name: ['diffusers', 'UNet2DConditionModel']})
  with pytest.raises(UserError, match='names a part'):
    convert(pipeline, tmp_path / 'out', 'native')
  assert {p.name for p in tmp_path.iterdir()} == {'pipeline'}


def test_pickles_are_refused(tmp_path, fails):
  for name in ('model.ckpt', 'model.pt', 'model.bin'):
    (tmp_path / name).write_bytes(b'\x80\x04.')
    line = fails(
      'convert', '--from', tmp_path / name, '--to', tmp_path / 'out', '--layout', 'diffusers'
    )
    assert name in line and 'is a pickle' in line and 'never opened as a model' in line


def test_mistakes_are_sentences(pipeline, tmp_path, fails):
  run = lambda source=pipeline, target=tmp_path / 'out', layout='native', *more: fails(
    'convert', '--from', source, '--to', target, '--layout', layout, *more
  )
  assert 'There is no' in run(tmp_path / 'none')
  assert 'diffusers, single-file, native' in run(layout='other')
  assert 'float32, float16, bfloat16' in run(pipeline, tmp_path / 'out', 'native', '--dtype', 'f8')
  assert 'there already' in run(target=pipeline)
  assert 'ends in .safetensors' in run(layout='single-file')
  assert 'a whole pipeline' in run(pipeline / 'unet', layout='single-file')
  assert 'describes no network' in run(pipeline / 'safety_checker')
  unknown = run(pipeline / 'unet', tmp_path / 'out', 'native', '--type', 'x')
  assert "--type is 'x'; choose one of autoencoder" in unknown
  (pipeline / 'tokenizer' / 'vocab.json').unlink()
  edit_index(pipeline, tokenizer_2=['transformers', 'CLIPTokenizer'])
  assert 'names a part tokenizer_2' in run()
  (pipeline / 'model_index.json').write_text('{"_class_name": "X"}')
  assert 'names no parts' in run()


def test_a_single_file_needs_tokenizers(written, tmp_path, fails):
  one = tmp_path / 'one.safetensors'
  convert(written, one, 'single-file')
  arguments = ('convert', '--from', one, '--to', tmp_path / 'out', '--layout', 'diffusers')
  assert '--tokenizer DIR' in fails(*arguments)
  assert 'nor vocab.json and merges.txt' in fails(*arguments, '--tokenizer', written / 'unet')
  assert 'a single file already' in fails(
    'convert', '--from', one, '--to', tmp_path / 'two.safetensors', '--layout', 'single-file'
  )


def test_types_change_and_overflow_is_refused(pipeline, tmp_path):
  convert(pipeline, tmp_path / 'half', 'native', dtype='bfloat16')
  wanted = load_params('unet', pipeline / 'unet')[1]
  found = load_params('unet', tmp_path / 'half' / 'unet')[1]
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], np.asarray(jnp.asarray(value, jnp.bfloat16)))
  large = {name: value * 1e6 for name, value in wanted.items()}
  save_params(pipeline / 'unet', UNET, large)
  with pytest.raises(UserError, match='float16 cannot hold'):
    convert(pipeline, tmp_path / 'out', 'diffusers', dtype='float16')
  assert not (tmp_path / 'out').exists() and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_seen_first(written, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(1, 1, 1000))
  for source, target in ((written, 'a.safetensors'), (written / 'vae', 'vae')):
    with pytest.raises(UserError, match=r'needs .* GB, but .* has 0\.0 GB left'):
      convert(source, tmp_path / target, 'single-file' if '.' in target else 'native')
  assert not list(tmp_path.iterdir())


def test_one_network_there_and_back(written, tmp_path):
  convert(written / 'vae', tmp_path / 'native', 'native', kind='autoencoder')
  assert {p.name for p in (tmp_path / 'native').iterdir()} == {'config.json', 'params.safetensors'}
  convert(tmp_path / 'native', tmp_path / 'back', 'diffusers')
  name = 'diffusion_pytorch_model.safetensors'
  assert (tmp_path / 'back' / name).read_bytes() == (written / 'vae' / name).read_bytes()
