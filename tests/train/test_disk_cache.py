"""Training from a cache on the disk, in memory, and without one: the same losses."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion_jax.build import build
from diffusion_jax.data.cache.files import open_shard
from diffusion_jax.formats.networks import read_part, save_params
from diffusion_jax.recipe import load_config
from tests import tiny

STEPS = 4
LOOP = {'total_steps': STEPS, 'evaluate_samples': 0, 'checkpoint_every_steps': 2}
EXACT = {'cache_text_dtype': 'float32'}
"""So that texts are those of training without a cache."""


def losses(run):
  return [line['loss'] for _, line in sorted(tiny.metrics(run).items())]


@pytest.fixture(scope='module')
def train(command, parts, small_data, tmp_path_factory):
  """train(name, settings): the workdir of a run with these settings, and half of captions dropped.
  """
  folder = tmp_path_factory.mktemp('disk_cache_runs')

  def run(name, settings, *more, **sections):
    values = tiny.diffusion_config(
      parts, {'caption_dropout': 0.5, **settings}, loop=LOOP, **sections
    )
    recipe = tiny.write_config(folder / f'{name}.py', values)
    assert command('train', '--config', recipe, '--workdir', folder / name, '--quiet', *more) == 0
    return folder / name

  return run


@pytest.fixture(scope='module')
def memory(train):
  """The workdir of a run from a cache in memory, with the texts in float32."""
  return train('memory', EXACT)


def shards(folder):
  return {n: data for n, data in tiny.snapshot(folder).items() if n.endswith('.array_record')}


@pytest.fixture(scope='module')
def prepared(once, parts, command, small_data):
  """A cache that `prepare` has made ahead, with the texts in float32."""
  del small_data

  def make(folder):
    recipe, cache = folder / 'recipe.py', folder / 'cache'
    tiny.write_config(recipe, tiny.diffusion_config(parts, EXACT))
    arguments = ('prepare', '--config', recipe, f'--config.settings.cache_dir={cache}', '--latents')
    assert command(*arguments) == 0
    assert sorted(path.name for path in cache.iterdir()) == ['latents']
    assert command(*arguments, '--text') == 0
    assert {name.partition('/')[0] for name in shards(cache)} == {'latents', 'texts', 'null'}

  return once('disk_cache', make) / 'cache'


def test_the_losses_are_those_of_memory_and_of_no_cache(train, memory, prepared):
  """What was prepared is taken as it is, to the end of the same training."""
  before = tiny.snapshot(prepared)
  disk = train(
    'disk', {'cache': False, **EXACT}, '--config.settings.cache=disk',
    f'--config.settings.cache_dir={prepared}',
  )
  assert losses(disk) == losses(memory) and len(losses(memory)) == STEPS
  assert tiny.snapshot(prepared) == before
  manifest = json.loads((prepared / 'latents' / 'manifest.json').read_text())
  assert manifest['complete'] and manifest['records'] > 100
  assert json.loads((disk / 'config.json').read_text())['settings']['cache'] == 'disk'
  without = train('without', {'cache': False}, data={'transforms': tiny.WITH_TEXT})
  np.testing.assert_allclose(losses(memory), losses(without), rtol=1e-5)
  name = 'model/unet/diffusion_pytorch_model.safetensors'
  found, wanted = load_file(disk / name), load_file(memory / name)
  assert all((found[key] == wanted[key]).all() for key in wanted)


def test_prepare_knows_its_options(fails, parts, tmp_path, small_data):
  recipe = tiny.write_config(tmp_path / 'recipe.py', tiny.diffusion_config(parts))
  arguments = ('prepare', '--config', recipe, f'--config.settings.cache_dir={tmp_path}')
  assert 'give them together' in fails(*arguments)
  assert 'does not know --wrong' in fails(*arguments, '--text', '--wrong')


def test_other_weights_are_refused(prepared, parts, fails, tmp_path):
  """By the role of their network; what was there stays."""
  recipe = tiny.write_config(tmp_path / 'again.py', tiny.diffusion_config(parts, EXACT))
  before = tiny.snapshot(prepared)
  role, folder, part = 'autoencoder', tmp_path / 'changed', read_part(parts['autoencoder'])
  params = part.load()
  name = sorted(params)[0]
  params[name] = np.nextafter(params[name], np.float32(9))
  save_params(folder, part.config, params)
  message = fails(
    'train', '--config', recipe, '--workdir', tmp_path / 'new',
    f'--config.settings.{role}={folder}', '--config.settings.cache=disk',
    f'--config.settings.cache_dir={prepared}',
  )
  assert 'latents differs in weights of autoencoder (' in message and str(prepared) in message
  assert tiny.snapshot(prepared) == before


def test_views_are_made_by_the_transforms_of_the_config(parts, tmp_path, small_data):
  """Another for each use; a resume draws the same."""
  values = tiny.diffusion_config(
    parts, {'cache': 'disk', 'cache_views': 3, 'cache_dtype': 'bfloat16'},
    data={'transforms': [['random_flip', {'keep_sided': False}]]},
  )
  with tiny.few_devices():
    training = build(values, str(tmp_path / 'run'))
    again = build(values, str(tmp_path / 'run'))
  source, batches = training.loader, []
  for _ in range(3):
    state = source.get_state()
    batches.append(next(source))
  again.loader.set_state(state)
  for name, value in next(again.loader).items():
    np.testing.assert_array_equal(value, batches[-1][name])
  manifest = json.loads((tmp_path / 'run' / 'cache' / 'latents' / 'manifest.json').read_text())
  assert manifest['made_of']['views'] == '3' and manifest['made_of']['dtype'] == 'bfloat16'
  files = (tmp_path / 'run' / 'cache' / 'latents').glob('*.array_record')
  views = [part['mean'] for file in files for shard in [open_shard(file)]
           for row in range(len(shard)) for part in [shard.arrays(row, n) for n in range(3)]]
  assert len(views) == 3 * manifest['records'] and str(views[0].dtype) == 'bfloat16'
  kinds = [len({view.tobytes() for view in views[i : i + 3]}) for i in range(0, len(views), 3)]
  assert set(kinds) == {1, 2} and np.mean(kinds) > 1.2  # Some drawings are symmetric.


def test_a_batch_of_xl_is_that_of_no_cache(arguments, tmp_path):
  """Texts of two encoders, the pooled one, and the sizes of each picture; of several sizes."""
  found, sizes = {}, {'data.size': '((16,24),(16,16),(24,16))'}
  for cache, transforms in (('disk', ()), (False, ('choose_caption', 'tokenize', 'normalize'))):
    file, more = arguments('sdxl', tmp_path / str(cache), **sizes)
    config = load_config(file, [*more, f'--config.settings.cache={cache}'])
    config.data.transforms, config.settings.cache_text_dtype = transforms, 'float32'
    with tiny.few_devices():
      training = build(config, str(tmp_path / str(cache)))
    task, batch = training.task, next(training.loader)
    fields = {name: batch[name] for name in task.batch_fields}
    found[cache] = jax.jit(task.encode)(task.frozen, fields, jax.random.key(0))
  cached, plain = (jax.tree.map(np.asarray, found[cache]) for cache in ('disk', False))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cached, plain)
  assert {name for one in cached.conditions.values() for name in one} == {'text', 'pooled', 'sizes'}
  assert len(np.unique(cached.conditions['sizes']['sizes'][:, 0])) > 1


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(prepared, parts, tmp_path, small_data):
  """Real ones, which share the work."""
  recipe = tiny.write_config(tmp_path / 'recipe.py', tiny.diffusion_config(parts, EXACT))
  cache = tmp_path / 'cache'
  tiny.together(2, small_data, (
    'prepare', '--config', recipe, '--latents', '--text', f'--config.settings.cache_dir={cache}'
  ))
  assert shards(cache) == shards(prepared) and len(shards(cache)) > 4


@pytest.mark.slow
def test_two_processes_train_as_one(memory, prepared, parts, tmp_path, small_data):
  """On the disk with what they write there themselves."""
  values = tiny.diffusion_config(parts, {'caption_dropout': 0.5, **EXACT}, loop=LOOP)
  recipe = tiny.write_config(tmp_path / 'two.py', values)
  for cache in ('disk', True):
    run = tmp_path / f'two_{cache}'
    tiny.together(2, small_data, (
      'train', '--config', recipe, '--workdir', run, '--quiet', f'--config.settings.cache={cache}'
    ))
    np.testing.assert_allclose(losses(run), losses(memory), rtol=1e-5)
    assert shards(run / 'cache') == (shards(prepared) if cache == 'disk' else {})
