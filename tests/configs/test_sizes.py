"""data.size as one number or two, from the command line to the checks before any work."""

import pytest

from diffusion_jax.config import parse
from diffusion_jax.errors import UserError
from diffusion_jax.recipe import load_config
from diffusion_jax.train.tasks.finetune import FinetuneTask
from tests import tiny_pipeline


def finetuned(folder, size):
  overrides = [f'--config.settings.model={folder}', f'--config.data.size={size}']
  return parse(load_config('finetune/sd15', overrides))


def test_fine_tuning_takes_a_height_and_a_width_that_the_model_halves(tmp_path):
  tiny_pipeline.write_tiny_pipeline(tmp_path, tiny_pipeline.SD)
  config = finetuned(tmp_path, '(24,16)')
  assert config.data.shape == (24, 16) and config.data.edge == 24
  FinetuneTask.check_size(config)
  FinetuneTask.check_size(finetuned(tmp_path, tiny_pipeline.SIZE))
  with pytest.raises(UserError, match=r'multiples of 2; the nearest such size is \(24, 16\)'):
    FinetuneTask.check_size(finetuned(tmp_path, '(24,17)'))
  with pytest.raises(UserError, match=r'set data\.size to 16'):
    FinetuneTask.check_size(finetuned(tmp_path, 24))


@pytest.mark.parametrize('size', ['(0,16)', '(16,9000)', '(16,)', '(16,8,8)'])
def test_sizes_that_are_none(size, tmp_path):
  with pytest.raises(UserError, match=r'data\.size'):
    finetuned(tmp_path, size)
