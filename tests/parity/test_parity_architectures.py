"""Published networks at full size, without weights: every name and shape is the reference's."""

import dataclasses
import math

import pytest

from diffusion_jax.formats.autoencoder import AUTOENCODERS
from diffusion_jax.formats.dit import TRANSFORMERS
from diffusion_jax.formats.networks import format_of
from diffusion_jax.formats.published import published_shape, to_published_names
from diffusion_jax.models import network

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

# One of each shape: the others of Stable Diffusion differ in their scaling only.
NETWORKS = {name: AUTOENCODERS[name] for name in ('sdxl', 'sd_x4_upscaler', 'taesd', 'vq_f4')} | {
  # There every block has its own embedding.
  'dit_xl_2': dataclasses.replace(TRANSFORMERS['dit_xl_2_256'], shared_embedding=False),
  'sd3_medium': TRANSFORMERS['sd3_medium'],
}
# Scalars that are learned; those of the autoencoders are in tests/io.
SIZES = {'dit_xl_2': 749_826_464, 'sd3_medium': 2_028_328_000}


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
