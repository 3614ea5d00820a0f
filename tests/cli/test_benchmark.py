"""The benchmark command on networks that are as small as they can be."""

import json

import pytest

from tests import tiny


@pytest.fixture(scope='module')
def recipe_file(parts, tmp_path_factory):
  """A diffusion config whose data set is nowhere."""
  values = tiny.diffusion_config(parts, data={'data_dir': '/nowhere'})
  return tiny.write_config(tmp_path_factory.mktemp('recipe') / 'recipe.py', values)


def test_training_steps_without_data(command, recipe_file, tmp_path, capsys):
  out = tmp_path / 'train.json'
  code = command(
    'benchmark', '--config', recipe_file, '--synthetic', '--steps', 4, '--warmup', 1,
    '--json', out, '--config.loop.batch_size=4',
  )
  found = json.loads(out.read_text())
  assert code == 0 and found['what'] == 'train' and found['synthetic'] and found['steps'] == 4
  times = found['step_seconds']
  assert 0 < times['lower_quartile'] <= times['median'] <= times['upper_quartile']
  assert found['images_per_second'] == pytest.approx(4 / times['median'], rel=1e-2)
  assert found['recompilations'] == 0 and 0 <= found['data_wait_fraction'] < 1
  assert found['compile']['from_cache'] and found['compile']['cold_seconds'] > 0
  assert found['mfu'] == pytest.approx(
    found['flops'] / times['median'] / found['peak_flops_per_second'], rel=0.05, abs=1e-4
  )
  # The padding that XLA leaves out is much of latents of 8 x 8, and elementwise work of 8 channels.
  assert found['flops'] == pytest.approx(found['flops_by_xla'], rel=0.4)
  assert found['memory']['host_peak_bytes'] > found['memory']['state_bytes'] > 0
  assert found['config']['loop']['batch_size'] == 4 and found['versions']['jax']
  assert found['device']['platform'] == 'cpu' and 'python -m diffusion_jax' in found['command']
  printed = capsys.readouterr().out
  assert all(word in printed for word in ('MFU', 'images/s', 'from the cache', 'recompilations'))
  assert [path.name for path in tmp_path.iterdir()] == ['train.json']


def test_sampling_encoding_and_reading(command, recipe_file, tmp_path):
  found = {}
  for what, more in (('sample', ['--batch', 2]), ('encode', ['--batch', 4]), ('data', [])):
    out = tmp_path / f'{what}.json'
    synthetic = ['--synthetic'] if what == 'data' else []
    assert command('benchmark', '--config', recipe_file, '--what', what, '--json', out, '--steps',
                   2, '--warmup', 1, *more, *synthetic) == 0
    found[what] = json.loads(out.read_text())
  sample = found['sample']
  assert (sample['sampler'], sample['network_calls'], sample['batch_size']) == ('ddim', 2, 2)
  median = sample['batch_seconds']['median']
  assert sample['seconds_per_image'] == pytest.approx(median / 2, rel=0.01)
  encode = found['encode']
  images, captions = (encode[n]['batch_seconds']['median'] for n in ('images', 'captions'))
  assert encode['images_per_second'] == pytest.approx(4 / (images + captions), rel=1e-2)
  assert encode['images']['flops'] > encode['captions']['flops'] > 0
  assert found['data']['images_per_second'] > 0 and 'flops' not in found['data']


def test_calls_are_counted(parts):
  from diffusion_jax.benchmark.sampling import count_calls
  from diffusion_jax.pipelines.directory import assemble
  from diffusion_jax.pipelines.sampling import SampleConfig
  from diffusion_jax.recipe import parse

  settings = parse(tiny.diffusion_config(parts)).settings
  model, _ = assemble(settings.unet, settings.autoencoder, settings.clip, settings.schedule,
                      settings.objective.prediction, settings.latent_patch_size)
  for name, steps, calls in (('ddim', 5, 5), ('heun', 5, 9), ('dpm2', 3, 5)):
    assert count_calls(model, SampleConfig(sampler=name, steps=steps)) == calls, name


@pytest.mark.parametrize(('arguments', 'named'), [
  (['--steps', '0'], '--steps is 0; give 1 or more'),
  (['--batch', '4'], '--batch does nothing with --what train'),
  (['--json', '/nowhere/file.json'], '/nowhere/file.json cannot be written'),
  (['--scaling', '1,x'], '--scaling 1,x is no list of devices'),
  (['--scaling', '2', '--what', 'data'], '--scaling is of training steps'),
  (['--config.loop.batchsize=2'], 'is not a known key; did you mean config.loop.batch_size?'),
  (['--stesp', '3'], 'benchmark does not know --stesp'),
])
def test_bad_options_are_one_sentence(fails, recipe_file, arguments, named):
  assert named in fails('benchmark', '--config', recipe_file, *arguments)


def test_what_draws_nothing_is_not_sampled(fails, tmp_path):
  config = tiny.write_config(tmp_path / 'recipe.py', tiny.toy_config())
  message = fails('benchmark', '--config', config, '--what', 'sample')
  assert 'this config trains toy; use --what train or data' in message


@pytest.mark.slow
def test_scaling_compiles_in_processes_of_their_own(command, tmp_path, capsys):
  config, out = tiny.write_config(tmp_path / 'recipe.py', tiny.toy_config()), tmp_path / 'out.json'
  assert command('benchmark', '--config', config, '--scaling', '2', '--json', out) == 0
  found = {one['mesh']: one for one in json.loads(out.read_text())['meshes']}
  assert found.keys() == {'data', 'fsdp'}
  assert all(one['devices'] == 2 and one['batch_size'] == 16 for one in found.values())
  assert found['data']['moved_bytes'].keys() == {'all-reduce'}
  assert found['fsdp']['moved_bytes']['all-gather'] > 0
  assert 'by formula' in capsys.readouterr().out
