"""Published networks at full size, without weights: every name and shape is the reference's."""

import dataclasses
import math

import numpy as np
import pytest

from diffusion_jax.formats.autoencoder import AUTOENCODERS
from diffusion_jax.formats.dit import TRANSFORMERS
from diffusion_jax.formats.networks import format_of
from diffusion_jax.formats.published import published_shape, to_published_names
from diffusion_jax.formats.single_file_names import to_stored
from diffusion_jax.formats.tensors import Tensor
from diffusion_jax.formats.transformer_names import flux_config, mmdit_config, transformer_rules
from diffusion_jax.models import network
from diffusion_jax.models.flux import FluxConfig
from diffusion_jax.models.mmdit import MMDiTConfig

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

# One of each shape: the others of Stable Diffusion differ in their scaling only.
NETWORKS = {name: AUTOENCODERS[name] for name in ('sdxl', 'sd_x4_upscaler', 'taesd', 'vq_f4')} | {
  # There every block has its own embedding.
  'dit_xl_2': dataclasses.replace(TRANSFORMERS['dit_xl_2_256'], shared_embedding=False),
  **{name: one for name, one in TRANSFORMERS.items() if 'dit' not in name},
}
# Scalars that are learned; those of the autoencoders are in tests/io.
SIZES = {
  'dit_xl_2': 749_826_464, 'sd3_medium': 2_028_328_000, 'sd35_medium': 2_243_171_520,
  'sd35_large': 8_056_627_520, 'flux_dev': 11_901_408_320, 'flux_schnell': 11_891_178_560,
  'pixart_alpha': 611_349_152, 'pixart_sigma': 610_856_096,
}
# Tensors of the published single files.
STORED = {'flux_dev': 780, 'flux_schnell': 776}
STYLES = {MMDiTConfig: ('mmdit', mmdit_config), FluxConfig: ('flux', flux_config)}


@pytest.mark.parametrize('name', NETWORKS)
def test_names_and_shapes(name):
  config = NETWORKS[name]
  kind = format_of(config)
  values = kind.describe(config)
  with torch.device('meta'):
    theirs = getattr(diffusers, values['_class_name']).from_config(values)
  shapes = kind.shapes(config)
  ours = {
    published: published_shape(own, shapes[own].shape)
    for own, published in to_published_names(shapes).items()
  }
  assert ours == {n: tuple(p.shape) for n, p in theirs.state_dict().items()}
  if name in SIZES:
    table = ours.get('pos_embed.pos_embed', (0,))
    assert network.count(shapes) - math.prod(table) == SIZES[name]
    assert SIZES[name] == sum(p.numel() for p in theirs.parameters())
  if type(config) in STYLES:
    assert_inferred(name, kind, config, ours)


def assert_inferred(name, kind, config, shapes):
  """A single file of these tensors says by its shapes which network it holds."""
  tensors = {n: Tensor(np.dtype('float16'), shape, None) for n, shape in shapes.items()}
  style, infer = STYLES[type(config)]
  stored = to_stored(transformer_rules(shapes, style), tensors, name)
  values = infer({n: tensor.shape for n, tensor in stored.items()}, name)
  assert kind.parse(values, name) == config
  total = lambda tensors: sum(math.prod(tensor.shape) for tensor in tensors.values())
  assert total(stored) == total(tensors)
  assert len(stored) == STORED.get(name, len(stored))
