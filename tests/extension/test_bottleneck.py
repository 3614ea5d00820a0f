"""A bottleneck from one file outside of the package: trained, reported and scored."""

import json

from tests import tiny


def test_a_bottleneck(outside, trained_with, command, sources, tmp_path):
  assert sources
  values = tiny.autoencoder_config(
    {'bottleneck': {'type': 'noisy', 'deviation': 0.2}, 'adversarial_weight': 0.0,
     'autoencoder': tiny.ONE_LEVEL},
    loop={'total_steps': 2, 'evaluate_samples': 16},
  )
  workdir = trained_with(outside('bottleneck'), values)
  assert tiny.metrics(workdir)[2]['latent_power'] > 0
  assert 'Noisy autoencoder' in (workdir / 'README.md').read_text()
  out = tmp_path / 'scores.json'
  arguments = ('--workdir', workdir, '--samples', 16, '--metrics', 'psnr', '--out', out)
  assert command('evaluate', 'autoencoder', *arguments) == 0
  assert json.loads(out.read_text())['reconstructed']['psnr'] > 0
