"""Training on pictures of several sizes: a step for each, none waited for twice, and resumed."""

import json
import re
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import build
from diffusion_jax.config import parse
from diffusion_jax.data.images import read_covering
from diffusion_jax.errors import UserError
from diffusion_jax.pixels import to_float
from diffusion_jax.recipe import load_config
from diffusion_jax.registry import TASKS, load
from diffusion_jax.runs.start import Start
from diffusion_jax.runs.status import read_status
from diffusion_jax.train import compile, loop
from tests import tiny

SHAPES = [[16, 24], [16, 16], [24, 16]]
DIT = {
  'type': 'dit', 'num_attention_heads': 2, 'attention_head_dim': 4, 'in_channels': 3,
  'out_channels': 3, 'num_layers': 1, 'sample_size': 16, 'patch_size': 8, 'num_embeds_ada_norm': 2,
}
BATCH, STEPS = 8, 12
LOOP = {
  'total_steps': STEPS, 'batch_size': BATCH, 'evaluate_samples': 0, 'checkpoint_every_steps': 1000,
}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """The section `data` of a config: pictures of which a half are wide and few tall."""
  folder, rng = tmp_path_factory.mktemp('buckets'), np.random.default_rng(0)
  for i in range(40):
    path = folder / ('red', 'blue')[i % 2] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (30, 50) if i < 20 else (33, 30) if i < 35 else (50, 31)
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
  return {'dataset': f'folder:{folder}', 'size': SHAPES, 'test_fraction': 0.0}


@pytest.fixture(scope='module')
def recipe(pictures, tmp_path_factory):
  """A transformer of classes on pixels."""
  values = tiny._config('diffusion', [['label', {}], ['random_flip', {}], *tiny.NORMALIZE], {
    'space': {'type': 'pixels'}, 'denoiser': DIT, 'conditioners': {'class': {}},
    'schedule': {'process': 'flow'}, 'objective': {'prediction': 'flow_prediction'},
    'sample': {'sampler': 'flow_euler', 'steps': 1}, 'preview_captions': ['red'],
    'export_dtype': 'float32', 'clip': '',
  }, data=pictures, loop=LOOP)
  return tiny.write_config(tmp_path_factory.mktemp('recipe') / 'recipe.py', values)


@pytest.fixture(scope='module')
def whole(recipe, tmp_path_factory, command):
  """(workdir of an uninterrupted run, the shape of each of its batches)."""
  run, seen, put = tmp_path_factory.mktemp('whole') / 'run', [], loop.put_batch
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'put_batch', lambda batch, mesh: (
      seen.append(batch['image'].shape[1:3]), put(batch, mesh))[1])
    assert command('train', '--config', recipe, '--workdir', run) == 0
  return run, seen


def test_a_step_is_compiled_for_each_size_and_none_again(whole):
  run, seen = whole
  assert {tuple(shape) for shape in SHAPES} == set(seen) and len(seen) == STEPS
  report = json.loads((run / 'step.json').read_text())
  assert sorted(one['size'] for one in report['sizes']) == ['16 x 16', '16 x 24', '24 x 16']
  assert report['size'] == ' x '.join(map(str, seen[0]))
  flops = {one['size']: one['flops'] for one in report['sizes']}
  assert flops['16 x 24'] > 1.2 * flops['16 x 16']
  lines = tiny.metrics(run)
  assert sorted(lines) == list(range(1, STEPS + 1))
  assert [line['recompilations'] for line in lines.values()] == [0] * STEPS
  status = json.loads((run / 'status.json').read_text())
  assert status['goodput']['compile'] > 0
  assert '3 sizes from 16 x 24 to 24 x 16 pixels' in (run / 'README.md').read_text()


def test_on_more_devices_only_the_rounding_differs(recipe, whole, command, tmp_path):
  """With the batch in parts."""
  arguments = ('train', '--config', recipe, '--workdir', tmp_path / 'meshes', '--quiet')
  assert command(*arguments, '--config.mesh.fsdp=2', devices=8) == 0
  wanted, found = tiny.metrics(whole[0]), tiny.metrics(tmp_path / 'meshes')
  assert wanted.keys() == found.keys()
  for step, line in found.items():
    assert line['loss'] == pytest.approx(wanted[step]['loss'], rel=1e-4)


@pytest.mark.parametrize('task', ['autoencoder', 'diffusion'])
def test_a_killed_run_goes_on_within_a_bucket(
  task, pictures, parts, command, tmp_path, monkeypatch
):
  """Of text to image from random crops in a cache on the disk, whose progress is in the status. It
  is killed after step 4 of 6, and goes on with other workers."""
  loop = LOOP | {'total_steps': 6, 'checkpoint_every_steps': 3, 'keep_checkpoints': 3}
  data = pictures | {'crop': 'random', 'size': SHAPES[:2], 'caption': 'a {folder} drawing'}
  if task == 'autoencoder':
    network = {'block_out_channels': [4], 'layers_per_block': 1, 'norm_num_groups': 2}
    values = tiny.autoencoder_config(
      {'adversarial_weight': 0.0, 'autoencoder': network}, data=data, loop=loop
    )
  else:
    values = tiny.diffusion_config(parts, {
      'cache': 'disk', 'cache_views': 2, 'caption_dropout': 0.3,
      'preview_sizes': SHAPES[:1],
    }, data=data, loop=loop)
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  train = lambda run, workers: command(
    'train', '--config', recipe, '--workdir', run, '--quiet', f'--config.data.workers={workers}'
  )
  said, report = [], Start.report
  monkeypatch.setattr(Start, 'report', lambda self, *args, **more: (
    report(self, *args, **more), said.append(read_status(self.directory))
  ))
  assert train(whole, 2) == 0
  if task == 'diffusion':
    assert 'looking for latents of 40 records in' in said[0]['message']
    (first, *_), states = [one for one in said if 'encoding' in one], {one['state'] for one in said}
    assert states == {'encoding'} and first['retry'] and first['encoding']['of'] == 40
    (grid,) = (whole / 'samples').glob('*.png')
    assert Image.open(grid).width == 2 * (8 * 24 + 4) + 4  # 8: 128 // 16.
  shutil.copytree(whole, killed)
  for gone in ('checkpoints/6', 'model'):
    shutil.rmtree(killed / gone)
  lines = (killed / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (killed / 'metrics.jsonl').write_text(''.join(x for x in lines if json.loads(x)['step'] < 5))
  assert train(killed, 0) == 0
  wanted, found = tiny.metrics(whole), tiny.metrics(killed)
  same = {'loss', 'gradient_norm', 'loss_by_timestep'} & wanted[1].keys()
  for step, line in wanted.items():
    assert {name: found[step][name] for name in same} == {name: line[name] for name in same}
  assert len({line['loss'] for line in wanted.values()}) == 6
  models = [{n: data for n, data in tiny.snapshot(run / 'model').items() if n.endswith('tensors')}
            for run in (whole, killed)]
  assert models[0] == models[1] and models[0]


def test_another_list_of_sizes_is_refused(recipe, whole, fails):
  sentence = fails('train', '--config', recipe, '--workdir', whole[0],
                   '--config.data.size=((16,24),(16,16))')
  assert 'data.size was [[16, 24], [16, 16], [24, 16]] and is now [[16, 24], [16, 16]]' in sentence


@pytest.mark.parametrize(('size', 'message'), [
  ('((16,24),(16,20))', 'multiples of 8; the nearest such size is (16, 16)'),
  ("{'area':256,'step':4}", 'data.size is'),
])
def test_every_size_is_checked_before_work(recipe, tmp_path, fails, size, message):
  sentence = fails('train', '--config', recipe, '--workdir', tmp_path / 'run',
                   f'--config.data.size={size}')
  assert message in sentence and not (tmp_path / 'run').exists()


def _classifier_config(settings=None, **sections):
  return tiny._config('classifier', [['label', {}], *tiny.NORMALIZE], {
    'classifier': {'block_out_channels': [4, 8], 'norm_num_groups': 2, 'image_size': 32},
    **(settings or {}),
  }, **sections)


def test_previews_have_sizes_of_the_data(parts):
  data = {'size': SHAPES}
  for sizes in ([], [[24, 16]]):
    config = parse(tiny.diffusion_config(parts, {'preview_sizes': sizes}, data=data))
    load(TASKS, 'diffusion').check(config)
  config = parse(tiny.diffusion_config(parts, {'preview_sizes': [[24, 20]]}, data=data))
  with pytest.raises(UserError, match=r'preview_sizes has \(24, 20\), which is none of the sizes'):
    load(TASKS, 'diffusion').check(config)


@pytest.mark.parametrize(('config', 'size', 'message'), [
  (tiny.clip_config, [[32, 32], [32, 48]], 'is ((32, 32), (32, 48)), but settings.clip.vision'),
  (tiny.clip_config, {'area': 1024, 'step': 8}, "is {'area': 1024, 'step': 8}, but settings.clip"),
  (tiny.autoencoder_config, [[32, 32], [32, 47]], 'the nearest such size is (32, 48)'),
  (tiny.toy_config, [[32, 32], [32, 48]], 'takes no pictures'),
  (_classifier_config, [[32, 32], [32, 45]], 'the nearest such size is (32, 44)'),
  (_classifier_config, [[32, 48], [48, 32]], 'but settings.classifier.image_size is 32'),
])
def test_other_tasks_check_or_refuse_several_sizes(config, size, message):
  config = parse(config(data={'size': size}))
  with pytest.raises(UserError, match=re.escape(message)):
    load(TASKS, config.task).check(config)


def test_a_classifier_learns_from_several_sizes(pictures, command, tmp_path):
  """And is scored on those that are nearest to a square, as it says."""
  values = _classifier_config({'classifier': {
    'block_out_channels': [4, 8], 'norm_num_groups': 2, 'image_size': 16,
  }}, data=pictures | {'test_fraction': 0.5}, loop=LOOP | {
    'total_steps': 6, 'evaluate_samples': 8,
  })
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', recipe, '--workdir', tmp_path / 'run', '--quiet') == 0
  report = json.loads((tmp_path / 'run' / 'step.json').read_text())
  assert len(report['sizes']) > 1
  scores = json.loads((tmp_path / 'run' / 'scores.json').read_text())
  assert scores['test']['images'] == 8
  assert any('cut to 16 x 16 pixels' in text for text in scores['measured'])


def test_a_step_waits_for_its_size_and_the_wait_is_compiling(recipe, tmp_path, monkeypatch):
  """The background is held back until the loop waits for it; it compiles under the same mesh."""
  compile_step, main, threads = compile.compile_step, threading.get_ident(), []

  def slow(*args):
    if threading.get_ident() != main:
      time.sleep(1.5)
    threads.append(threading.get_ident())
    return compile_step(*args)

  monkeypatch.setattr(compile, 'compile_step', slow)
  with tiny.few_devices():
    training = build.build(load_config(recipe), str(tmp_path / 'run'))
    assert loop.train(training, progress=False) == 0
  assert len(threads) == 3 and threads[0] == main and threads[1] == threads[2] != main
  status = json.loads((tmp_path / 'run' / 'status.json').read_text())
  assert status['goodput']['compile'] > 1.5
  assert not [t for t in threading.enumerate() if t.name == 'compiling'] and jax.devices()


def _told(training, field, factor):
  """(own size -> size of the bucket, rows of `field` with what is told of each)."""
  told, rows = {}, []
  for _ in range(16):
    batch = next(training.loader)
    height, width = batch[field].shape[1:3]
    for row, sizes in zip(batch[field], batch['sizes'].astype(int).tolist(), strict=True):
      assert tuple(sizes[4:]) == (height * factor, width * factor)
      told[tuple(sizes[:2])] = tuple(sizes[4:])
      rows.append((row, sizes))
  assert told.keys() == {(18 + i, 26 - i) for i in range(8)}
  assert told[18, 26] == (16, 24) and told[21, 23] == (16, 16) and told[25, 19] == (24, 16)
  assert training.task.model.size == (16, 16) and len(training.loader.buckets_until(100)) == 3
  return rows


def test_sdxl_is_told_of_each_picture_its_own_size(arguments, tmp_path):
  recipe, overrides = arguments('sdxl', tmp_path / 'run', **{
    'data.size': '((16,24),(16,16),(24,16))', 'loop.batch_size': 2,
  })
  with tiny.few_devices():
    training = build.build(load_config(recipe, overrides), str(tmp_path / 'run'))
  _told(training, 'image', 1)


def test_sdxl_is_told_of_the_crops_that_a_cache_keeps(arguments, pipelines, tmp_path):
  """Of several crops and flips of each picture: the latents are those of what is told."""
  recipe, overrides = arguments('sdxl', tmp_path / 'run', **{
    'data.size': '((16,24),(16,16),(24,16))', 'loop.batch_size': 2, 'settings.cache': 'disk',
    'data.transforms': "(('random_flip',{}),)", 'data.crop': 'random', 'settings.cache_views': 4,
  })
  with tiny.few_devices():
    training = build.build(load_config(recipe, overrides), str(tmp_path / 'run'))
  task, seen = training.task, {}
  encode = jax.jit(lambda images: task.model.space.moments(task.frozen, to_float(images))['mean'])
  for mean, (height, width, top, left, h, w) in _told(training, 'mean', 2):
    path = pipelines / 'pictures' / f'{height - 18}.png'
    picture, own, frame = read_covering(path, h, w, str(path))
    assert own == (height, width) and picture.shape[:2] == tuple(frame)
    both = np.stack([picture, picture[:, ::-1]])[:, top : top + h, left : left + w]
    off = np.abs(np.asarray(encode(both)) - mean).max(axis=(1, 2, 3))
    assert off.min() < 1e-4
    seen.setdefault(height, set()).add((top, left, bool(off.argmin())))
  assert max(map(len, seen.values())) > 2
  assert {flipped for views in seen.values() for _, _, flipped in views} == {True, False}


def test_random_numbers_have_the_sizes_of_the_data(arguments, tmp_path):
  recipe, overrides = arguments('sd15', tmp_path / 'run', **{
    'data.size': '((16,24),(16,16))', 'settings.cache': True, 'data.transforms': '()',
  })
  with tiny.few_devices():
    training = build.build(load_config(recipe, overrides), str(tmp_path / 'run'), synthetic=True)
  shapes = {next(training.loader)['mean'].shape for _ in range(9)}
  assert shapes == {(8, 8, 12, 4), (8, 8, 8, 4)}


@pytest.mark.slow
def test_two_processes_are_one(recipe, whole, tmp_path):
  run = tmp_path / 'run'
  tiny.together(2, '', ('train', '--config', recipe, '--workdir', run, '--quiet'))
  found = tiny.metrics(run)
  for step, line in tiny.metrics(whole[0]).items():
    assert found[step]['loss'] == pytest.approx(line['loss'], rel=1e-4)
