"""Published autoencoders have their published sizes, and their configs survive config.json."""

import json

import pytest

from diffusion_jax.formats.autoencoder import AUTOENCODERS
from diffusion_jax.formats.networks import format_of
from diffusion_jax.models import network

# Scalars and tensors. diffusers builds the same from these configs on the meta device.
SIZES = {
  'sd15': (83_653_863, 248), 'sd21': (83_653_863, 248), 'sdxl': (83_653_863, 248),
  'sd3': (83_819_683, 244), 'flux': (83_819_683, 244), 'sd_x4_upscaler': (55_325_927, 204),
  'taesd': (2_445_063, 134), 'vq_f4': (55_322_782, 205),
}


@pytest.mark.parametrize('name', AUTOENCODERS)
def test_sizes(name):
  config = AUTOENCODERS[name]
  shapes = format_of(config).shapes(config)
  assert (network.count(shapes), len(shapes)) == SIZES[name]


@pytest.mark.parametrize('name', AUTOENCODERS)
def test_configs_survive_config_json(name):
  config = AUTOENCODERS[name]
  kind = format_of(config)
  values = json.loads(json.dumps(kind.describe(config)))
  assert kind.matches(values) and kind.parse(values, 'here') == config
