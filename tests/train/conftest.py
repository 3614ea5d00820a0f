"""Runs of the recipes for fine-tuning, at a tiny size, that the tests share."""

import shutil

import jax
import pytest

from tests import tiny, tiny_pipeline

RECIPES = tiny.ROOT / 'configs' / 'finetune'
PIPELINES = {
  'sd': (tiny_pipeline.SD, 'epsilon'), 'sd_v': (tiny_pipeline.SD, 'v_prediction'),
  'sdxl': (tiny_pipeline.SDXL, 'epsilon'),
}
OF = {'sdxl': 'sdxl', 'sdxl_lora': 'sdxl', 'sd21': 'sd_v'}
"""The pipeline that a recipe begins with; else 'sd'."""

SMALL = {
  'data.size': tiny_pipeline.SIZE, 'settings.architecture': '', 'settings.sample.steps': 2,
  'settings.sample.sampler': 'ddim', 'settings.export_dtype': 'float32', 'dtype': 'float32',
  'settings.preview_captions': "('a cat',)", 'optimizer.learning_rate': 1e-2,
  'loop.total_steps': 4, 'loop.batch_size': 8, 'loop.log_every_steps': 1,
  'loop.checkpoint_every_steps': 2, 'loop.sample_every_steps': 0, 'loop.ema_halflife_images': 0.0,
}


@pytest.fixture(autouse=True)
def keys_are_watched():
  """A random key that is used twice fails the test."""
  with jax.debug_key_reuse(True):
    yield


@pytest.fixture(scope='session')
def pipelines(once):
  """Folder with a pipeline for each of PIPELINES, and 'pictures' and 'subject' to train on."""

  def make(folder):
    for name, (parts, prediction) in PIPELINES.items():
      tiny_pipeline.write_tiny_pipeline(folder / name, parts, prediction)
    tiny_pipeline.write_pictures(folder / 'pictures')
    tiny_pipeline.write_pictures(folder / 'subject', captions=False)

  return once('tiny_pipelines', make)


@pytest.fixture(scope='session')
def arguments(pipelines):
  """arguments(recipe, **changes): (file, what is given on the command line)."""

  def make(recipe, workdir, **changes):
    own = {}
    if recipe == 'dreambooth':
      own = {
        'settings.prior.folder': workdir.parent / 'class', 'settings.prior.images': 8,
        'settings.prior.prompt': 'a cat', 'settings.prior.weight': 0.5,
        'data.caption': 'a cat sks',
      }
    elif recipe == 'textual_inversion':
      own = {'data.caption': 'a <concept> b', 'settings.placeholder.initializer': 'cat',
             'settings.preview_captions': "('a <concept>',)"}
    values = {
      **SMALL, 'settings.model': pipelines / OF.get(recipe, 'sd'),
      'data.dataset': f'folder:{pipelines / ("subject" if own else "pictures")}', **own, **changes,
    }
    return str(RECIPES / f'{recipe}.py'), [f'--config.{k}={v}' for k, v in values.items()]

  return make


@pytest.fixture(scope='session')
def tuned(once, arguments, command):
  """tuned(recipe): workdir of a finished run of the recipe."""

  def run(recipe):
    def make(folder):
      config, more = arguments(recipe, folder / 'run')
      run = folder / 'run'
      assert command('train', '--config', config, '--workdir', run, '--quiet', *more) == 0

    return once(f'tuned_{recipe}', make) / 'run'

  return run


@pytest.fixture
def resumed(tuned, arguments, command, tmp_path):
  """resumed(recipe): a copy of the run that is cut off after step 2 and has then gone on."""

  def run(recipe):
    folder = tmp_path / recipe
    shutil.copytree(tuned(recipe).parent, folder)
    shutil.rmtree(folder / 'run' / 'checkpoints' / '4')
    shutil.rmtree(folder / 'run' / 'model')
    # The config of a run holds the folder of its prior, which stays where it is.
    config, more = arguments(recipe, tuned(recipe))
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet', *more) == 0
    return folder / 'run'

  return run
