"""A U-Net that is told the guidance it imitates, from scratch: as consistency models begin."""

from PIL import Image

from diffusion_jax.run import TrainedRun
from tests import tiny
from tests.train.tasks.test_models import _same_images, _trained


def test_trained_out_of_a_cache_sampled_and_opened_again(parts, tmp_path, command):
  values = tiny.diffusion_config(parts, {
    'sample': {'sampler': 'ddim', 'steps': 2, 'guidance': 1.0}, 'conditioners': {
      'text': {'path': parts['clip']}, 'distilled_guidance': {'scale': 2.0},
    },
  })
  values['settings']['unet']['time_cond_proj_dim'] = 8
  values['loop']['evaluate_samples'] = 0
  workdir = _trained(values, tmp_path, command)
  _same_images(workdir, 'cat', command, tmp_path / 'own')
  arguments = ('--prompt', 'cat', '--out', tmp_path / 'other', '--distilled_guidance', 9)
  assert command('sample', '--model', workdir / 'model', *arguments, '--batch', 1) == 0
  found, other = (
    Image.open(next(folder.glob('0000_*.png'))).tobytes()
    for folder in (tmp_path / 'own' / 'model', tmp_path / 'other')
  )
  assert found != other
  assert TrainedRun(str(workdir)).model.conditioners['distilled_guidance'].scale == 2.0
