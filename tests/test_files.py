"""Reading of files from outside: JSON within bounds, and one sentence for whatever is raised.

Files that are whole or not there.

Links in folders of models: the hub's cache of links works, and no link leads out of a model.
"""

import json
import os
import shutil
import types

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.files import (
  MOST_DEPTH,
  atomic_write,
  bounded_bytes,
  parse_json,
  read_object,
  reading,
)
from diffusion_jax.formats.adapters import read_lora
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.networks import load_params, resolve
from diffusion_jax.formats.pipeline import save_changed
from diffusion_jax.formats.tensors import open_tensors, write_json, write_tensors
from diffusion_jax.formats.textual_inversion import read_textual_inversion
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.pipelines.directory import load_model

DEEP = b'[' * MOST_DEPTH + b']' * MOST_DEPTH


@pytest.mark.parametrize(('data', 'value'), [
  (b'{"a": [1, -2.5, true, null, "\xc3\xa9"]}', {'a': [1, -2.5, True, None, 'é']}),
  (b'\xef\xbb\xbf{"a": 1}', {'a': 1}),
  ('{"é": 1}'.encode('utf-16'), {'é': 1}),
  (rb'["\ud83e\udd8a", "\\ud800"]', ['🦊', '\\ud800']),
  (b'[18446744073709551615, -9223372036854775808]', [2**64 - 1, -2**63]),
  (b'[1000000000000000019884624838656]', [1000000000000000019884624838656]),
  (b'[-Infinity, 1e999]', [-float('inf'), float('inf')]),
  (DEEP, json.loads(DEEP)),
])
def test_sound_json_is_read_as_everybody_reads_it(data, value):
  assert parse_json(data) == value


@pytest.mark.parametrize(('data', 'words'), [
  (b'[' * 10**5, 'nested more than 100 deep'),
  (b'[' + DEEP + b']', 'nested more than 100 deep'),
  (b'{"a":' * 5000 + b'1' + b'}' * 5000, 'nested more than 100 deep'),
  (b'1' * 10**6, 'a whole number of 1,000,000 digits'),
  (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
  (rb'{"a": ["\ud800"]}', 'half a character'),
  (rb'{"\udfff": 1}', 'half a character'),
  (b'"\xed\xa0\x80"', "can't decode"),
  (b'[' + b'[],' * 4_000_000 + b'0]', 'more than 4,000,000 values'),
  (b'{"a": 1', 'delimiter'),
  (b'', 'Expecting value'),
])
def test_json_that_could_do_harm_is_a_sentence(tmp_path, data, words):
  with pytest.raises(ValueError, match=words):
    parse_json(data)
  path = tmp_path / 'x.json'
  path.write_bytes(data)
  with pytest.raises(UserError, match=r'x\.json is not readable JSON \(.*; write or fetch'):
    read_object(path)


def test_only_regular_files_of_a_size_are_read(tmp_path):
  os.mkfifo(tmp_path / 'fifo')
  big = tmp_path / 'big'
  with big.open('wb') as file:
    file.truncate(2**40)
  for path, words in (
    (tmp_path / 'fifo', 'is not a file'), (tmp_path, 'is not a file'), (big, 'more than 67,108'),
    (tmp_path / 'none', 'There is no file'),
  ):
    with pytest.raises(UserError, match=words):
      read_object(path)
  big.write_bytes(b'[1]')
  assert bounded_bytes(big, 3) == b'[1]'
  with pytest.raises(UserError, match='must hold a JSON object'):
    read_object(big)


class PanicException(BaseException):
  """As parsers in Rust raise it."""


@pytest.mark.parametrize('error', [
  RecursionError(), MemoryError(), KeyError('a'), AssertionError(), StopIteration(),
  OverflowError('int too large'), PanicException('called unwrap\non nothing'), OSError(5, 'I/O'),
  UnicodeEncodeError('utf-8', '\ud800', 0, 1, 'surrogates'),
])
def test_whatever_a_parser_raises_is_one_line_that_names_the_file(error):
  sentence = r'^a\.bin cannot be read \(.+\); fetch it again\.$'
  with pytest.raises(UserError, match=sentence) as caught:
    with reading('a.bin', remedy='fetch it again'):
      raise error
  assert str(caught.value).isprintable()


def test_names_from_files_neither_break_the_line_nor_command_the_terminal():
  name = 'a\nb\x1b[2J\u2028\udcff'
  assert str(UserError(f'{name} é 🦊 is missing.')) == (
    r'a\nb\x1b[2J\u2028\udcff é 🦊 is missing.'
  )
  long = str(UserError('start ' + 'x' * 10**6 + ' end.'))
  assert len(long) < 5000 and long.startswith('start ') and long.endswith(' end.')


def test_what_is_no_fault_of_the_file_passes():
  for error in (KeyboardInterrupt(), SystemExit(3), UserError('as it is.')):
    with pytest.raises(type(error)) as caught, reading('a.bin'):
      raise error
    assert caught.value is error


def test_a_failure_leaves_what_was_there(tmp_path):
  path = tmp_path / 'new folder' / 'a.txt'
  with atomic_write(path, flushed=True) as file:
    file.write(b'whole')
  with pytest.raises(OSError, match='half'), atomic_write(path) as file:
    file.write(b'ha')
    raise OSError('half')
  assert path.read_bytes() == b'whole' and list(path.parent.iterdir()) == [path]


def test_several_may_write_one_file_at_once(tmp_path, monkeypatch):
  """Also in containers on one folder, whose processes have the same number."""
  monkeypatch.setattr(os, 'getpid', lambda: 1)
  path = tmp_path / 'plan.json'
  with atomic_write(path) as first:
    first.write(b'first')
    with atomic_write(path) as second:
      second.write(b'second')
    assert path.read_bytes() == b'second'
  assert path.read_bytes() == b'first' and list(tmp_path.iterdir()) == [path]


SOURCE = 'asset:text-to-image-openmoji-64'
PARTS = {'autoencoder': 'asset:autoencoder-openmoji-64', 'clip': 'asset:clip-openmoji-64'}
WEIGHTS = 'diffusion_pytorch_model.safetensors'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A model of text to images with all its parts in one folder, without links."""
  folder = tmp_path_factory.mktemp('whole') / 'model'
  shutil.copytree(resolve(SOURCE), folder)
  for role, asset in PARTS.items():
    shutil.copytree(resolve(asset), folder / role)
  index = json.loads((folder / 'model_index.json').read_text())
  write_json(folder / 'model_index.json', index | {role: role for role in PARTS})
  return folder


@pytest.fixture
def model(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / 'model')


@pytest.fixture
def hub(whole, tmp_path):
  """The same as the hub's client keeps it: every file a link to one under its hash."""
  repository = tmp_path / 'hub' / 'models--someone--model'
  snapshot, blobs = repository / 'snapshots' / '0123abcd', repository / 'blobs'
  blobs.mkdir(parents=True)
  for number, file in enumerate(sorted(p for p in whole.rglob('*') if p.is_file())):
    blob, link = blobs / f'{number:064x}', snapshot / file.relative_to(whole)
    shutil.copyfile(file, blob)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
  return snapshot


@pytest.fixture
def secret(tmp_path):
  """A file, and a folder, that no model should bring its reader to."""
  folder = tmp_path / 'elsewhere'
  folder.mkdir()
  (folder / 'secret.json').write_text('{"password": 1}')
  return folder / 'secret.json'


def replaced(path, target):
  path.unlink(missing_ok=True)
  path.symlink_to(target)
  return path


def pipeline(folder):
  """A pipeline of diffusers, of which only the names of the parts are looked at."""
  write_json(folder / 'model_index.json', {
    '_class_name': 'X', 'unet': ['diffusers', 'UNet2DConditionModel'], 'scheduler': ['d', 'S'],
  })
  return folder


def test_the_cache_of_the_hub_is_read_and_converted(hub, whole, tmp_path):
  _, weights, _ = load_model(str(hub))
  wanted = load_model(str(whole))[1]
  assert all(
    np.array_equal(weights[role][name], value)
    for role, params in wanted.items() for name, value in params.items()
  )
  assert load_tokenizer(hub / 'clip').get_vocab() == load_tokenizer(whole / 'clip').get_vocab()
  convert(pipeline(hub), tmp_path / 'out', 'diffusers')
  assert not any(p.is_symlink() for p in (tmp_path / 'out').rglob('*'))
  copied = tmp_path / 'out' / 'unet' / WEIGHTS
  assert open_tensors(copied).keys() == open_tensors(whole / 'unet' / WEIGHTS).keys()
  named = tmp_path / 'named'
  named.symlink_to(hub)  # Whoever names a link means it.
  load_params('unet', named / 'unet')
  unet = load_params('unet', hub / 'unet')
  save_changed(tmp_path / 'again', str(named), {'unet': unet}, 'float32')
  assert not any(p.is_symlink() for p in (tmp_path / 'again').rglob('*'))


def test_links_within_a_model_are_followed(model):
  _, before = load_params('unet', model / 'unet')
  (model / 'shared.safetensors').write_bytes((model / 'unet' / WEIGHTS).read_bytes())
  replaced(model / 'unet' / WEIGHTS, '../shared.safetensors')
  _, params = load_params('unet', model / 'unet')
  assert params.keys() == before.keys()
  assert all(np.array_equal(params[name], before[name]) for name in before)


@pytest.mark.parametrize('place', [
  'scheduler/notes.json', 'scheduler/scheduler_config.json', 'unet/notes.txt', 'unet/config.json',
  f'unet/{WEIGHTS}',
])
@pytest.mark.parametrize('way', ['absolute', 'relative', 'chain'])
def test_convert_copies_nothing_from_elsewhere(model, secret, tmp_path, place, way):
  target = secret if way == 'absolute' else os.path.relpath(secret, (model / place).parent)
  if way == 'chain':
    target = replaced(model / 'chain.json', secret)
  replaced(model / place, target)
  for layout in ('diffusers', 'native'):
    with pytest.raises(UserError, match=rf'{place} is a link that leads out of its model'):
      convert(pipeline(model), tmp_path / 'out', layout)
  assert not (tmp_path / 'out').exists()


def test_a_folder_elsewhere_is_no_part(model, secret, whole, tmp_path):
  shutil.rmtree(model / 'scheduler')
  replaced(model / 'scheduler', secret.parent)
  with pytest.raises(UserError, match='scheduler is a link that leads out'):
    convert(pipeline(model), tmp_path / 'out', 'diffusers')
  shutil.copytree(whole / 'scheduler', secret.parent / 'scheduler')
  (model / 'scheduler').unlink()
  replaced(model / 'scheduler', secret.parent / 'scheduler')
  shutil.copyfile(whole / 'model_index.json', model / 'model_index.json')
  with pytest.raises(UserError, match='scheduler is a link that leads out'):
    load_model(str(model))


def test_other_blobs_are_not_the_models_own(hub, secret, tmp_path):
  other = tmp_path / 'hub' / 'models--other--model' / 'blobs' / '00'
  other.parent.mkdir(parents=True)
  shutil.copyfile(secret, other)
  for target in (other, hub.parents[1] / 'refs' / 'main', hub.parents[2] / 'token'):
    replaced(hub / 'scheduler' / 'scheduler_config.json', target)
    target.parent.mkdir(exist_ok=True)
    target.write_text('{}')
    with pytest.raises(UserError, match='leads out of its model'):
      load_model(str(hub))


@pytest.mark.parametrize('place', [
  'model_index.json', 'unet/config.json', f'unet/{WEIGHTS}', 'scheduler/scheduler_config.json',
  'autoencoder/config.json', 'clip/tokenizer.json', 'clip/tokenizer_config.json',
  'clip/special_tokens_map.json', 'clip/model.safetensors',
])
def test_nothing_elsewhere_is_read(model, secret, place):
  replaced(model / place, secret)
  with pytest.raises(UserError, match=rf'{place} is a link that leads out of its model'):
    load_model(str(model))


def test_shards_and_adapters(tmp_path, secret):
  folder = tmp_path / 'sharded'
  write_tensors(secret.parent / 'x.safetensors', {'a': np.ones(2, np.float32)})
  write_json(folder / 'm.safetensors.index.json', {'weight_map': {'a': 'one.safetensors'}})
  replaced(folder / 'one.safetensors', secret.parent / 'x.safetensors')
  replaced(folder / 'pytorch_lora_weights.safetensors', secret.parent / 'x.safetensors')
  replaced(folder / 'learned_embeds.safetensors', secret.parent / 'x.safetensors')
  for read in (
    lambda: open_tensors(folder / 'm.safetensors.index.json'),
    lambda: read_lora(folder, {'unet': {}}), lambda: read_textual_inversion(folder),
  ):
    with pytest.raises(UserError, match='leads out of its model'):
      read()
  for name in ('m.safetensors.index.json', '.', '..', '', '../elsewhere/x.safetensors', 'a\0b'):
    write_json(folder / 'm.safetensors.index.json', {'weight_map': {'a': name}})
    with pytest.raises(UserError, match='must have a weight_map'):
      open_tensors(folder / 'm.safetensors.index.json')


def test_what_is_trained_is_not_written_beside_what_lies_elsewhere(model, secret, tmp_path):
  unet = load_params('unet', model / 'unet')
  cases = {
    'README.md': lambda path: replaced(path, secret), 'loop': lambda path: replaced(path, model),
    'pipe': os.mkfifo,
  }
  for name, make in cases.items():
    make(model / name)
    with pytest.raises(UserError, match=f'{name} is'):
      save_changed(tmp_path / 'out', str(model), {'unet': unet}, 'float32')
    (model / name).unlink()
    assert not (tmp_path / 'out').exists()


def test_a_folder_that_is_copied_at_the_end_is_looked_through_at_the_start(model, secret):
  from diffusion_jax.train.tasks.trainable import Full

  replaced(model / 'notes.md', secret)
  with pytest.raises(UserError, match=r'notes\.md is a link that leads out'):
    Full(types.SimpleNamespace(model=str(model)), object())


def test_a_pipe_is_no_tokenizer(model):
  (model / 'clip' / 'tokenizer.json').unlink()
  os.mkfifo(model / 'clip' / 'tokenizer.json')
  with pytest.raises(UserError, match='no file'):
    load_tokenizer(model / 'clip')
