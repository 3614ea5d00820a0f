"""Pictures that cannot be read end no run: they are named once, and others take their place."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.build import build
from tests import tiny

GOOD, EDGE = 20, tiny.SIZE
REASONS = {'bomb.png': '268,435,456', 'cut.png': 'truncated', 'empty.jpg': 'it is empty',
           'text.webp': 'like no picture', 'half.jpg': 'runcated'}


def bomb(edge):
  """A PNG that says that it is so large, and holds nothing."""
  chunk = lambda kind, data: (
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  )
  header = struct.pack('>IIBBBBB', edge, edge, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')


def write_pictures(folder, edge=EDGE):
  """GOOD pictures of several modes, and those of REASONS, which cannot be read."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  draw = lambda: rng.integers(0, 256, (edge, edge, 3), np.uint8)
  for i in range(GOOD - 3):
    Image.fromarray(draw()).save(folder / f'{i:02d}.png')
  Image.fromarray(draw()[..., 0].astype(np.uint16) * 257).save(folder / 'sixteen.png')
  Image.fromarray(draw()).convert('CMYK').save(folder / 'cmyk.jpg')
  Image.fromarray(draw()).save(folder / 'exif.jpg', exif=b'Exif\0\0II*\0' + b'\xff' * 30)
  (folder / 'bomb.png').write_bytes(bomb(100_000))
  for name in ('cut.png', 'half.jpg'):
    Image.fromarray(draw()).save(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:600])
  (folder / 'empty.jpg').touch()
  (folder / 'text.webp').write_text('no picture')
  for path in list(folder.iterdir()):
    path.with_suffix('.txt').write_text('a picture\none more')


def check_told(workdir, said, names=REASONS):
  """Each by name and reason, once; and counted."""
  lines = [line for line in said.splitlines() if 'left out: the image' in line]
  found = {name: [line for line in lines if name in line] for name in names}
  assert all(len(lines) == 1 for lines in found.values()), said
  assert all(REASONS[name] in lines[0] for name, lines in found.items()), said
  assert len(lines) == len(names)
  report = (workdir / 'report.html').read_text()
  assert all(name in report for name in names)
  status = json.loads((workdir / 'status.json').read_text())
  assert status['state'] == 'finished'
  assert status['unreadable']['records'] == len(names)
  if names is REASONS:
    assert status['unreadable']['causes'] == {
      'truncated': 2, 'too large': 1, 'empty': 1, 'no picture': 1,
    }
  assert all(any(name in text for text in status['unreadable']['first']) for name in names)
  assert tiny.metrics(workdir)[max(tiny.metrics(workdir))]['unreadable'] == len(names)


LOOP = {'total_steps': 4, 'batch_size': 8, 'evaluate_samples': 16, 'log_every_steps': 1}


def config_of(task, folder, parts):
  data = {'dataset': f'folder:{folder}', 'test_fraction': 0.0, 'most_unreadable': 0.5}
  more = {'data': data, 'loop': dict(LOOP)}
  if task == 'autoencoder':
    settings = {'adversarial_weight': 0.0, 'autoencoder': tiny.ONE_LEVEL}
    return tiny.autoencoder_config(settings, **more)
  if task == 'clip':
    return tiny.clip_config(**more)
  if task == 'diffusion':
    return tiny.diffusion_config(parts, **more)
  more['data']['transforms'] = tiny.WITH_TEXT
  return tiny.diffusion_config(parts, settings={'cache': False}, **more)


@pytest.fixture(scope='module')
def pictures(once):
  """A folder with good pictures and bad ones."""
  return once('unreadable_pictures', lambda folder: write_pictures(folder / 'all')) / 'all'


slow = lambda name: pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize('task', ['autoencoder', slow('clip'), 'diffusion', slow('uncached')])
def test_runs_finish_without_them(task, pictures, parts, command, tmp_path, capsys):
  config = tiny.write_config(tmp_path / 'recipe.py', config_of(task, pictures, parts))
  run = tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', run, '--quiet') == 0
  check_told(run, capsys.readouterr().err)
  scores = json.loads((run / 'scores.json').read_text())
  if task == 'clip':
    assert scores['test']['images'] == 16
  if task in ('diffusion', 'uncached'):
    assert scores['settings']['reference_images'] == GOOD
    assert scores['settings']['samples'] == 16
  if task == 'uncached':
    out = tmp_path / 'scores.json'
    how = ('--samples', 16, '--steps', 1, '--metrics', 'fd')
    assert command('evaluate', 'model', '--workdir', run, '--out', out, *how) == 0
    assert json.loads(out.read_text())['settings']['reference_images'] in (GOOD, GOOD + 5)


def test_a_cache_and_the_pictures_themselves_are_drawn_alike(parts, tmp_path):
  """The same record stands in at the same position: captions tell which it is."""
  write_pictures(tmp_path / 'all')
  files = sorted((tmp_path / 'all').glob('*.txt'))
  texts = [str(i) for i in range(len(files))]
  for file, text in zip(files, texts, strict=True):
    file.write_text(text)
  found = {}
  for task, field in (('diffusion', 'text'), ('uncached', 'tokens')):
    with tiny.few_devices():
      training = build(config_of(task, tmp_path / 'all', parts), str(tmp_path / task))
    model, batches = training.task.model, [next(training.loader)[field] for _ in range(8)]
    known = model.text.tokens(texts)
    if field == 'text':
      rows = {'tokens': known}
      known = np.asarray(model.text.encode(training.task.frozen, rows)['text'])
    rows, known = (np.reshape(x, (len(x), -1)) for x in (np.concatenate(batches), known))
    found[task] = np.abs(rows[:, None] - known).max(axis=-1).argmin(axis=1).tolist()
  assert found['diffusion'] == found['uncached'] and len(set(found['uncached'])) == GOOD


def test_a_classifier_learns_from_the_others(command, tmp_path, capsys):
  for name in ('a', 'b'):
    write_pictures(tmp_path / 'pictures' / name, 16)
  settings = {'classifier': {
    'image_size': 16, 'block_out_channels': [4], 'layers_per_block': 1, 'norm_num_groups': 2,
  }}
  config = tiny.write_config(tmp_path / 'recipe.py', {
    'task': 'classifier', 'settings': settings,
    'data': {'dataset': f'folder:{tmp_path / "pictures"}', 'size': 16, 'test_fraction': 0.0,
             'transforms': ['label', 'normalize']},
    'loop': {**LOOP, 'total_steps': 8, 'evaluate_samples': 50},
  })
  assert command('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet') == 0
  said = capsys.readouterr().err
  assert said.count('left out: the image') == 2 * len(REASONS)
  scores = json.loads((tmp_path / 'run' / 'scores.json').read_text())
  assert scores['test']['images'] == 2 * GOOD


@pytest.mark.parametrize('recipe', ['dreambooth', slow('controlnet'), slow('sdxl')])
def test_fine_tuning_goes_on_without_them(
  recipe, arguments, pipelines, command, tmp_path, capsys
):
  """With pictures of a class beside, with controls, and with sizes."""
  folder = tmp_path / 'pictures'
  shutil.copytree(pipelines / ('subject' if recipe == 'dreambooth' else 'pictures'), folder)
  (folder / 'bomb.png').write_bytes(bomb(100_000))
  (folder / 'bomb.txt').write_text('a cat')
  changes = {'data.dataset': f'folder:{folder}', 'loop.total_steps': 5}
  config, more = arguments(recipe, tmp_path / 'run', **changes)
  run = tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', run, '--quiet', *more) == 0
  check_told(run, capsys.readouterr().err, ['bomb.png'])


def test_too_many_end_a_run_with_a_sentence_and_more_may_be_allowed(
  pictures, command, fails, parts, tmp_path, capsys
):
  values = config_of('autoencoder', pictures, parts)
  values['data']['workers'] = 0  # Threads would find more than the one that is too many.
  values['loop'] |= {'batch_size': 2, 'total_steps': 16, 'checkpoint_every_steps': 100}
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  arguments = ('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet')
  capsys.readouterr()
  assert command(*arguments, '--config.data.most_unreadable=0.1') == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert '3 of 25' in line and 'the fraction of 0.1 that data.most_unreadable allows' in line
  assert sum(name in line for name in REASONS) == 3
  status = json.loads((tmp_path / 'run' / 'status.json').read_text())
  assert status['state'] == 'failed' and 'data.most_unreadable' in status['message']
  assert status['step'] > 0  # What was done until then is kept.
  assert (tmp_path / 'run' / 'checkpoints' / str(status['step'])).is_dir()
  assert command(*arguments) == 0
  assert 'data.most_unreadable is 2' in fails(*arguments, '--config.data.most_unreadable=2')


@pytest.mark.slow
def test_two_processes_count_together(pictures, parts, tmp_path, small_data):
  config = config_of('autoencoder', pictures, parts)
  config['loop'] |= {'total_steps': 12, 'evaluate_samples': 0, 'checkpoint_every_steps': 12}
  recipe = tiny.write_config(tmp_path / 'recipe.py', config)
  run = tmp_path / 'run'
  arguments = ('train', '--config', recipe, '--workdir', run, '--quiet')
  tiny.together(2, small_data, arguments)
  assert json.loads((run / 'status.json').read_text())['unreadable']['records'] == len(REASONS)
