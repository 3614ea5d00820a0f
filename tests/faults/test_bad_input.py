"""Mistakes in what is given: one sentence, exit code 2, and a workdir left as it was."""

import json
import os

import pytest

from diffusion_jax.cli.sample import file_name
from tests import tiny


@pytest.fixture
def recipe(tmp_path, parts):
  """recipe(**arguments of tiny.diffusion_config): path of a config file."""

  def write(settings=None, **sections):
    values = tiny.diffusion_config(parts, settings, **sections)
    return tiny.write_config(tmp_path / 'recipe.py', values)

  return write


@pytest.fixture
def train_fails(fails, tmp_path, small_data):
  """Asserts that train refuses and makes no workdir; returns the sentence."""

  def run(config, *more):
    message = fails('train', '--config', config, '--workdir', tmp_path / 'run', *more)
    assert not (tmp_path / 'run').exists()
    return message

  return run


@pytest.mark.parametrize(('override', 'words'), [
  ('--config.loop.batch_sise=8', ('batch_sise', 'batch_size')),
  ('--config.optimizer.learning_rate=fast', ('learning_rate',)),
  ('--config.task=diffusio', ('diffusio', 'autoencoder, classifier, clip, diffusion')),
  ('--config.loop.batch_size=12', ('batch_size 12', '8')),
  ('--config.loop.total_steps=0', ('total_steps', 'at least 1')),
  (f'--config.loop.seed={2**64}', ('loop.seed is 18446744073709551616', '0 to 4294967295')),
  ('--config.loop.seed=-1', ('loop.seed is -1',)),
  ('--config.settings.sample.sampler=eular', ('eular', 'ddim')),
  ('--config.settings.sample.steps=2000', ('2000', '1000')),
  ('--config.settings.clip=asset:none', ('asset:none',)),
  ('--config.settings.autoencoder=nowhere', ('nowhere',)),
  ('--config.mesh.data=3', ('8 devices',)),
  ('--config.data.dataset=nomoji', ('nomoji', 'openmoji')),
  ('--config.settings.unet.sample_size=12', ('data.size', 'sample_size')),
  ('--config.dtype=float8', ('float8', 'bfloat16')),
  ('--config.attention=flash', ("config.attention is 'flash'", 'auto, xla, cudnn, splash')),
  ('--config.attention=cudnn', ("'cudnn' cannot serve here", 'NVIDIA GPU', 'to auto')),
  ('--config.products=float8', ("'float8' cannot serve here", '8.9', 'set products to plain')),
  ('--config.products=int8', ("config.products is 'int8'", 'plain, float8')),
  ('--batchsize=3', ('--batchsize',)),
])
def test_wrong_overrides(recipe, train_fails, override, words):
  message = train_fails(recipe(), override)
  assert all(word in message for word in words), message


@pytest.mark.parametrize(('change', 'words'), [
  ({'loop': {'totl_steps': 3}}, ('config.loop.totl_steps', 'did you mean config.loop.total_steps')),
  ({'settings': {'objective': {'predicton': 'sample'}}},
   ('objective.predicton', 'objective.prediction')),
  ({'loop': {'batch_size': '8'}}, ('config.loop.batch_size', "'8'", 'int')),
  ({'loop': {'batch_size': True}}, ('config.loop.batch_size', 'bool')),
  ({'optimizer': {'groups': [['nothing_like_it', 0.1]]}}, ('nothing_like_it', 'no parameter')),
  ({'data': {'transforms': [['normalize', {}]]}}, ('data.transforms', 'settings.cache')),
  ({'settings': {'cache': 'disc'}}, ("settings.cache is 'disc'", 'disk')),
  ({'settings': {'cache_dir': 'x'}}, ('settings.cache_dir', "to be 'disk'")),
  ({'settings': {'cache_views': 3}}, ('settings.cache_views is 3', 'random_flip')),
  ({'settings': {'preview_captions': []}}, ('preview_captions',)),
  ({'loop': {'evaluate_samples': 100_000}}, ('100000 samples', '16 to')),
  ({'settings': {'objective': {'prediction': 'epsilon'}}}, ('epsilon', 'zero terminal SNR')),
  ({'settings': {'evaluation': {'features': ['clip:nowhere']}}}, ('nowhere',)),
  ({'settings': {'evaluation': {'features': ['vgg:x']}}},
   ('settings.evaluation.features vgg:x', 'KIND:PATH')),
  ({'settings': {'evaluation': {'metrics': ['FID']}}}, ("metrics is 'FID'", 'choose one of fd')),
  ({'settings': {'evaluation': {'metrics': ['inception_score']}}},
   ('logits_unbiased', 'out of settings.evaluation.metrics')),
  ({'loop': {'keep_best': 'fid', 'evaluate_every_steps': 2}},
   ("loop.keep_best is 'fid'", 'it measures fd_clip, kid_clip')),
  ({'loop': {'evaluate_seconds': -1.0}}, ('loop.evaluate_seconds is -1',)),
])
def test_wrong_files(recipe, train_fails, change, words):
  message = train_fails(recipe(**change))
  assert all(word in message for word in words), message


def test_a_time_budget_where_nothing_is_drawn(tmp_path, train_fails):
  values = tiny.toy_config(loop={'evaluate_seconds': 5.0})
  message = train_fails(tiny.write_config(tmp_path / 'toy.py', values))
  assert 'loop.evaluate_seconds' in message and 'task toy makes none' in message


def test_latents_that_the_denoiser_cannot_halve(tmp_path, parts, train_fails):
  values = tiny.diffusion_config(parts)
  values['settings']['unet'] |= {
    'sample_size': 6, 'block_out_channels': [8, 8, 8],
    'down_block_types': ['DownBlock2D'] * 3, 'up_block_types': ['UpBlock2D'] * 3,
  }
  message = train_fails(tiny.write_config(tmp_path / 'odd.py', values))
  assert '6' in message and 'sample_size' in message


def test_missing_and_broken_config_files(tmp_path, train_fails):
  assert 'nowhere.py' in train_fails(tmp_path / 'nowhere.py')
  broken = tmp_path / 'broken.py'
  broken.write_text('def get_config():\n  raise RuntimeError("the moon is full")\n')
  assert 'the moon is full' in train_fails(broken)
  broken.write_text('def get_config(:\n')
  assert 'broken.py' in train_fails(broken)


def test_a_data_set_that_is_not_there(recipe, train_fails, tmp_path):
  message = train_fails(recipe(data={'data_dir': str(tmp_path / 'empty')}))
  assert 'prepare --dataset openmoji --size 32' in message
  assert not (tmp_path / 'empty').exists()


def test_a_workdir_of_another_config(fails, finished, copy_of):
  before, run = tiny.snapshot(finished), copy_of(finished)
  message = fails('train', '--config', finished.parent / 'recipe.py', '--workdir', run,
                  '--config.optimizer.learning_rate=0.5')
  assert 'optimizer.learning_rate was 0.001 and is now 0.5' in message
  assert tiny.snapshot(run) == before


def test_sampling_passes_over_a_truncated_checkpoint(command, finished, copy_of, capsys):
  run = copy_of(finished)
  older, newer = sorted(int(path.name) for path in (run / 'checkpoints').iterdir() if path.is_dir())
  for item in ('params', 'ema'):
    for file in (run / 'checkpoints' / str(newer) / item).rglob('d/*'):
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  before, out = tiny.snapshot(run), run.parent / 'pictures'
  arguments = ('sample', '--workdir', run, '--prompt', 'cat', '--steps', 1, '--out', out)
  assert command(*arguments) == 0
  assert f'checkpoints/{newer} is damaged (ema/' in capsys.readouterr().err
  assert len(list(out.glob('0000_*.png'))) == 1
  assert tiny.snapshot(run) == before
  (run / 'checkpoints' / str(older) / 'manifest.json').unlink()
  before = tiny.snapshot(run)
  assert command(*arguments) == 2
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'all checkpoints' in message and 'manifest.json is missing' in message
  assert tiny.snapshot(run) == before


def test_training_goes_on_from_before_a_truncated_checkpoint(command, finished, copy_of, capsys):
  run = copy_of(finished)
  older, newer = sorted(int(path.name) for path in (run / 'checkpoints').iterdir() if path.is_dir())
  file = next((run / 'checkpoints' / str(newer) / 'opt_state').rglob('d/*'))
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  damaged = tiny.snapshot(run / 'checkpoints' / str(newer))
  recipe = finished.parent / 'recipe.py'
  more = [f'--config.loop.{key}=0' for key in (
    'evaluate_samples', 'evaluate_every_steps', 'sample_every_steps'
  )]
  assert command('train', '--config', recipe, '--workdir', run, *more) == 0
  said = capsys.readouterr()
  assert f'checkpoints/{newer} is damaged (opt_state/' in said.err
  assert f'going on from step {older}' in said.out
  assert tiny.snapshot(run / 'checkpoints' / 'quarantine' / str(newer)) == damaged
  assert {path.name for path in (run / 'checkpoints').iterdir() if path.is_dir()} == {
    str(older), str(newer), 'quarantine'
  }


@pytest.mark.parametrize(('arguments', 'words'), [
  ([], ('there is no prompt', "--prompt '' draws without one")),
  (['--prompt', os.fsdecode(b'caf\xe9')], (r"'caf\udce9' is not UTF-8",)),
  (['--prompt', 'cat', '--negative', os.fsdecode(b'\xff')], (r"'\udcff' is not UTF-8",)),
  (['--prompt', 'cat ' * 10**6], ('4,000,000 characters, but only 10 tokens fit', 'shorten')),
  (['--prompts', 'nowhere.txt'], ('nowhere.txt',)),
  (['--prompt', 'one two three four five six seven eight nine ten'], ('10 fit', 'shorten')),
  (['--prompt', 'cat', '--negative', 'word ' * 30], ('shorten',)),
  (['--prompt', 'cat', '--sampler', 'eular'], ('eular', 'dpmpp_2m')),
  (['--prompt', 'cat', '--guidance_rescale', '2'], ('guidance_rescale', '0 to 1')),
  (['--prompt', 'cat', '--guidance_interval', '3', '1'], ('guidance_interval', 'lower one first')),
  (['--prompt', 'cat', '--threshold', 'hard'], ('hard', 'none, static, dynamic')),
  (['--prompt', 'cat', '--image', 'none.png'], ('none.png', 'cannot be read')),
  (['--prompt', 'cat', '--image', 'README.md'], ('README.md', 'PNG')),
  (['--prompt', 'cat', '--strength', '0.5'], ('--image',)),
  (['--prompt', 'cat', '--image', 'docs/samples.png', '--strength', '0'], ('strength', 'up to 1')),
  (['--prompt', 'cat', '--steps', '1001'], ('1001', '1000')),
  (['--prompt', 'cat', '--steps', '0'], ('steps is 0', 'a number from 1 to')),
  (['--prompt', 'cat', '--batch', '0'], ('--batch is 0',)),
  (['--prompt', 'cat', '--seed', 2**64], ('--seed is 18446744073709551616', '0 to 4294967295')),
  (['--prompt', 'cat', '--seed', 2**32], ('--seed is 4294967296', '0 to 4294967295')),
  (['--prompt', 'cat', '--seed', -1], ('--seed is -1',)),
  (['--prompt', 'cat', '--seed', 10**4000], ('--seed is a number of 13288 bits',)),
  (['--prompt', 'cat', '--size', '9'], ('the size 9x9', 'the nearest such size is 8x8')),
  (['--prompt', 'cat', '--size', '9by9'], ('--size', '96x64')),
])
def test_wrong_sample_arguments(fails, finished, tmp_path, arguments, words):
  out = tmp_path / 'pictures'
  message = fails('sample', '--workdir', finished, '--out', out, *arguments)
  assert all(word in message for word in words), message
  assert not out.exists()


def test_runs_that_cannot_be_sampled(fails, finished, copy_of, tmp_path):
  arguments = ('--prompt', 'cat', '--out', tmp_path / 'out')
  assert 'config.json' in fails('sample', '--workdir', tmp_path / 'none', *arguments)
  assert not (tmp_path / 'none').exists()
  assert 'asset:none' in fails('sample', '--model', 'asset:none', *arguments)
  run = tmp_path / 'young'
  run.mkdir()
  (run / 'config.json').write_bytes((finished / 'config.json').read_bytes())
  assert 'no checkpoint yet' in fails('sample', '--workdir', run, *arguments)
  assert [path.name for path in run.iterdir()] == ['config.json']
  (run / 'config.json').write_text('{"task": ')
  assert 'config.json is not readable JSON' in fails('sample', '--workdir', run, *arguments)


@pytest.mark.parametrize('samples', [3, 100_000])
def test_too_few_and_too_many_samples(fails, finished, tmp_path, samples):
  message = fails(
    'evaluate', 'model', '--workdir', finished, '--out', tmp_path / 'scores.json', '--samples',
    samples,
  )
  assert f'{samples} samples' in message and '16 to' in message
  assert not (tmp_path / 'scores.json').exists()


@pytest.mark.parametrize('more', [('model',), ('likelihood',), ('images', 'docs')])
def test_scores_of_an_impossible_seed(fails, finished, tmp_path, more):
  subject = () if 'images' in more else ('--workdir', finished)
  out = tmp_path / 'new' / 'scores.json'
  message = fails('evaluate', *more, *subject, '--out', out, '--seed', 2**32)
  assert '--seed is 4294967296; give a whole number from 0 to 4294967295' in message
  assert not out.parent.exists()


def test_no_run_to_report_on(fails, tmp_path):
  assert 'holds no run' in fails('report', '--workdir', tmp_path)
  assert list(tmp_path.iterdir()) == []
  assert 'no run directory' in fails('report', '--workdir', tmp_path / 'none')


def test_unknown_data_sets(fails, tmp_path):
  root = tmp_path / 'data'
  assert 'nomoji' in fails('prepare', '--dataset', 'nomoji', '--data_dir', root)
  assert '48' in fails('prepare', '--dataset', 'openmoji', '--size', 48, '--data_dir', root)
  assert not root.exists()


def test_files_where_directories_belong(fails, recipe, finished, tmp_path):
  file = tmp_path / 'file'
  file.write_text('mine')
  assert 'is a file' in fails('train', '--config', recipe(), '--workdir', file)
  assert 'is a file' in fails('sample', '--workdir', finished, '--prompt', 'cat', '--out', file)
  assert 'is a directory' in fails('evaluate', 'model', '--workdir', finished, '--out', tmp_path)
  assert file.read_text() == 'mine'


def test_names_of_pictures_are_safe():
  assert file_name(3, '../Red  Apple!') == '0003_red_apple.png'
  assert json.dumps(file_name(0, 'é' * 5)) == '"0000_.png"'
