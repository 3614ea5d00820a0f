"""DDPM's own U-Net on pixels, without a condition: trained, exported, drawn, its bits measured."""

import json

import numpy as np
from PIL import Image

from diffusion_jax.pipelines.directory import load_model
from tests import tiny

UNET = {
  'type': 'unet2d', 'sample_size': tiny.SIZE // 4, 'in_channels': 48, 'out_channels': 96,
  'block_out_channels': [8], 'layers_per_block': 1, 'norm_num_groups': 4, 'attention_head_dim': 4,
  'down_block_types': ['AttnDownBlock2D'], 'up_block_types': ['UpBlock2D'],
}


def test_a_learned_variance_on_pixels_from_training_to_bits(parts, tmp_path, command):
  values = tiny.diffusion_config(parts)
  settings = {k: values['settings'][k] for k in ('clip', 'export_dtype')}
  values['settings'] = settings | {
    'space': {'type': 'pixels', 'patch': 4}, 'denoiser': UNET, 'conditioners': {}, 'cache': True,
    'schedule': {'beta_schedule': 'cosine', 'beta_start': 0.0, 'beta_end': 0.999,
                 'num_train_timesteps': 50},
    'objective': {'loss': 'hybrid', 'learned_variance': True, 'decoder': 'discretized'},
    'sample': {'sampler': 'ddpm', 'steps': 3, 'guidance': 1.0, 'threshold': 'static',
               'threshold_limit': 1.0},
    'evaluation': {'features': (), 'metrics': ('fd',)}, 'preview_captions': ['', ''],
  }
  values['loop'] |= {'evaluate_samples': 0}
  config, workdir = tiny.write_config(tmp_path / 'recipe.py', values), tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', workdir, '--quiet') == 0
  assert np.isfinite([line['loss'] for line in tiny.metrics(workdir).values()]).all()
  drawn = []
  for source in (('--workdir', workdir), ('--model', workdir / 'model')):
    out = tmp_path / source[0].strip('-')
    assert command('sample', *source, '--prompt', '', '--out', out) == 0
    drawn.append(np.asarray(Image.open(out / '0000_.png')))
  np.testing.assert_array_equal(*drawn)
  assert drawn[0].shape == (tiny.SIZE, tiny.SIZE, 3) and drawn[0].std() > 0
  model, _, _ = load_model(str(workdir / 'model'))
  assert model.learned_variance and model.denoiser.config.conditions == {}
  out = tmp_path / 'bits.json'
  assert command('evaluate', 'likelihood', '--workdir', workdir, '--samples', 4, '--draws', 2,
                 '--solver', 'heun', '--ode_steps', 2, '--out', out) == 0
  found = json.loads(out.read_text())
  assert found['settings']['variance'] == 'learned' and found['settings']['timesteps'] == 50
  assert found['model']['bits_per_dim_bound'] > 0 and len(found['bound_by_step']['model']) == 2
