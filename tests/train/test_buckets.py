"""Training on pictures of several sizes: a step for each, none waited for twice, and resumed."""

import json
import re
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import build
from diffusion_jax.config import parse
from diffusion_jax.errors import UserError
from diffusion_jax.recipe import load_config
from diffusion_jax.registry import TASKS, load
from diffusion_jax.train import compile, loop
from tests import tiny

SHAPES = [[16, 24], [16, 16], [24, 16]]
DIT = {
  'type': 'dit', 'num_attention_heads': 2, 'attention_head_dim': 4, 'in_channels': 3,
  'out_channels': 3, 'num_layers': 1, 'sample_size': 16, 'patch_size': 8, 'num_embeds_ada_norm': 2,
}
BATCH, STEPS = 8, 12
SAME = ('loss', 'gradient_norm', 'loss_by_timestep')


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
  """A transformer of classes on pixels, of pictures of which a half are wide and few tall."""
  folder, rng = tmp_path_factory.mktemp('buckets'), np.random.default_rng(0)
  for i in range(40):
    path = folder / 'data' / ('red', 'blue')[i % 2] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (30, 50) if i < 20 else (33, 30) if i < 35 else (50, 31)
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
  values = tiny._config('diffusion', [['label', {}], ['random_flip', {}], *tiny.NORMALIZE], {
    'space': {'type': 'pixels'}, 'denoiser': DIT, 'conditioners': {'class': {}},
    'schedule': {'process': 'flow'}, 'objective': {'prediction': 'flow_prediction'},
    'sample': {'sampler': 'flow_euler', 'steps': 1}, 'preview_captions': ['red'],
    'export_dtype': 'float32', 'clip': '',
  }, data={'dataset': f'folder:{folder / "data"}', 'size': SHAPES, 'test_fraction': 0.0},
     loop={'total_steps': STEPS, 'batch_size': BATCH, 'evaluate_samples': 0,
           'checkpoint_every_steps': 1000})
  return tiny.write_config(folder / 'recipe.py', values)


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


def test_a_run_goes_on_within_a_bucket_with_other_workers(recipe, whole, command, tmp_path):
  """And on another number of devices with the batch in parts, where only the rounding differs."""
  arguments = ('train', '--config', recipe, '--workdir', tmp_path / 'run', '--quiet')
  assert command(*arguments, '--config.loop.total_steps=5') == 0
  assert command(*arguments, '--config.data.workers=0') == 0
  wanted, found = tiny.metrics(whole[0]), tiny.metrics(tmp_path / 'run')
  for step, line in wanted.items():
    assert {name: found[step][name] for name in SAME} == {name: line[name] for name in SAME}
  again = ('train', '--config', recipe, '--workdir', tmp_path / 'meshes', '--quiet')
  assert command(*again, '--config.mesh.fsdp=2', devices=8) == 0
  for step, line in tiny.metrics(tmp_path / 'meshes').items():
    assert line['loss'] == pytest.approx(wanted[step]['loss'], rel=1e-4)


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


@pytest.mark.parametrize(('config', 'size', 'message'), [
  (tiny.clip_config, [[32, 32], [32, 48]], 'is ((32, 32), (32, 48)), but settings.clip.vision'),
  (tiny.clip_config, {'area': 1024, 'step': 8}, "is {'area': 1024, 'step': 8}, but settings.clip"),
  (tiny.autoencoder_config, [[32, 32], [32, 47]], 'the nearest such size is (32, 48)'),
  (tiny.toy_config, [[32, 32], [32, 48]], 'takes no pictures'),
])
def test_other_tasks_check_or_refuse_several_sizes(config, size, message):
  config = parse(config(data={'size': size}))
  with pytest.raises(UserError, match=re.escape(message)):
    load(TASKS, config.task).check(config)


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


@pytest.mark.parametrize('cache', [False, True])
def test_sdxl_is_told_of_each_picture_its_own_size(arguments, tmp_path, cache):
  """Also of latents out of a cache, half as large."""
  recipe, overrides = arguments('sdxl', tmp_path / 'run', **{
    'data.size': '((16,24),(16,16),(24,16))', 'loop.batch_size': 2, 'settings.cache': cache,
    **({'data.transforms': '()'} if cache else {}),
  })
  with tiny.few_devices():
    training = build.build(load_config(recipe, overrides), str(tmp_path / 'run'))
  told, own = {}, {(18 + i, 26 - i) for i in range(8)}
  for _ in range(16):
    batch = next(training.loader)
    height, width = batch['mean' if cache else 'image'].shape[1:3]
    for sizes in batch['sizes'].astype(int).tolist():
      assert tuple(sizes[4:]) == (height * (1 + cache), width * (1 + cache))
      assert tuple(sizes[:2]) in own
      told[tuple(sizes[:2])] = tuple(sizes[4:])
  assert told.keys() == own
  assert told[18, 26] == (16, 24) and told[21, 23] == (16, 16) and told[25, 19] == (24, 16)
  assert training.task.model.size == (16, 16) and len(training.loader.buckets_until(100)) == 3


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
