"""Measurements on networks that are as small as they can be."""

import json

import jax
import pytest

from benchmarks import run
from benchmarks.command import run_command
from benchmarks.run import built
from benchmarks.sampling import count_calls, measure_encoding, measure_sampling
from benchmarks.table import run_row
from benchmarks.training import Counts
from diffusion_jax.config import parse, untyped
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.sampling import SampleConfig
from tests import tiny


def measure(*arguments):
  """The exit code of the command in this process, on one device."""
  with tiny.few_devices(1), jax.debug_key_reuse(True):
    return run_command('benchmarks.run', run, list(map(str, arguments)), overrides=True)


@pytest.fixture
def toy(tmp_path):
  return tiny.write_config(tmp_path / 'recipe.py', tiny.toy_config())


def test_training_steps(toy, tmp_path, capsys):
  out = tmp_path / 'train.json'
  code = measure(
    'train', '--config', toy, '--steps', 4, '--warmup', 1, '--json', out,
    '--config.loop.batch_size=4',
  )
  found = json.loads(out.read_text())
  assert code == 0 and found['what'] == 'train' and found['steps'] == 4
  times = found['step_seconds']
  assert 0 < times['lower_quartile'] <= times['median'] <= times['upper_quartile']
  assert found['images_per_second'] == pytest.approx(4 / times['median'], rel=1e-2)
  assert found['recompilations'] == 0 and 0 <= found['data_wait_fraction'] < 1
  assert found['compile']['from_cache'] and found['compile']['cold_seconds'] > 0
  assert found['mfu'] == pytest.approx(
    found['flops'] / times['median'] / found['peak_flops_per_second'], rel=0.05, abs=1e-4
  )
  assert 0.2 < found['flops'] / found['flops_by_xla'] <= 1  # The rest is elementwise.
  assert found['memory']['host_peak_bytes'] > found['memory']['state_bytes'] > 0
  assert found['config']['loop']['batch_size'] == 4 and found['versions']['jax']
  assert found['device']['platform'] == 'cpu' and 'python -m benchmarks.run' in found['command']
  printed = capsys.readouterr().out
  assert all(word in printed for word in ('MFU', 'images/s', 'from the cache', 'recompilations'))
  row = run_row(found)
  assert row[0].startswith('train, `') and f'{found["mfu"]:.0%}' in row and 'cores' in row[1]
  left = {path.name for path in tmp_path.iterdir()}
  assert left - {'__pycache__'} == {'train.json', 'recipe.py'}


def test_reading(toy, tmp_path):
  out = tmp_path / 'data.json'
  assert measure('data', '--config', toy, '--steps', 3, '--json', out) == 0
  data = json.loads(out.read_text())
  assert data['batches'] == 3 and data['images_per_second'] > 0 and 'flops' not in data


def test_encoding_and_sampling_without_data(parts, tmp_path):
  """The data set of the config is nowhere."""
  values = tiny.diffusion_config(parts, data={'data_dir': '/nowhere'})
  with tiny.few_devices(1):
    training = built(untyped(parse(values)), tmp_path / 'run', synthetic=True)
    batch = next(training.loader)
    assert batch['mean'].shape == (8, 16, 16, 4) and batch['text'].shape == (8, tiny.LENGTH, 16)
    sample = measure_sampling(training, Counts(1, 2), 2)
    encode = measure_encoding(training, Counts(1, 2), 4)
  assert (sample['sampler'], sample['network_calls'], sample['batch_size']) == ('ddim', 2, 2)
  median = sample['batch_seconds']['median']
  assert sample['seconds_per_image'] == pytest.approx(median / 2, rel=0.01)
  images, captions = (encode[n]['batch_seconds']['median'] for n in ('images', 'captions'))
  assert encode['images_per_second'] == pytest.approx(4 / (images + captions), rel=1e-2)
  assert encode['images']['flops'] > encode['captions']['flops'] > 0
  assert not (tmp_path / 'run').exists()


def test_calls_are_counted(parts):
  """Of two in each step, from no signal and to no noise there is one."""
  settings = parse(tiny.diffusion_config(parts)).settings
  model, _ = assemble(settings.denoiser, settings.space, settings.conditioned, settings.schedule,
                      settings.objective.parameterization)
  for name, steps, calls in (('ddim', 5, 5), ('heun', 5, 8), ('dpm2', 3, 4)):
    assert count_calls(model, SampleConfig(sampler=name, steps=steps)) == calls, name


@pytest.mark.parametrize(('arguments', 'named'), [
  (['train', '--json', '/nowhere/file.json'], '/nowhere/file.json cannot be written'),
  (['train', '--config.loop.batchsize=2'], 'did you mean config.loop.batch_size?'),
  (['sample'], 'this config trains toy; use train or data'),
])
def test_mistakes_are_one_sentence(toy, capsys, arguments, named):
  assert measure(*arguments, '--config', toy) == 2
  said = capsys.readouterr().err
  assert named in said and len(said.splitlines()) == 1


@pytest.mark.parametrize('arguments', [
  ['train', '--steps', '0'], ['scaling', '--devices', '1,x'], ['train', '--stesp', '3'],
])
def test_options_are_checked(toy, arguments):
  with pytest.raises(SystemExit, match='2'):
    measure(*arguments, '--config', toy)


@pytest.mark.slow
def test_scaling_compiles_in_processes_of_their_own(toy, tmp_path, capsys):
  out = tmp_path / 'out.json'
  assert measure('scaling', '--config', toy, '--devices', '2', '--json', out) == 0
  found = {one['mesh']: one for one in json.loads(out.read_text())['meshes']}
  assert found.keys() == {'data', 'fsdp'}
  assert all(one['devices'] == 2 and one['batch_size'] == 16 for one in found.values())
  assert found['data']['moved_bytes'].keys() == {'all-reduce'}
  assert found['fsdp']['moved_bytes']['all-gather'] > 0
  assert 'by formula' in capsys.readouterr().out
