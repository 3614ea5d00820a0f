"""Extractors: what their names tell, what they compute, and errors. Inception: tests/parity.

The packaged classifier names the groups of emoji that it has never seen.
"""

import io
import json
import shutil

import jax
import numpy as np
import pytest
import transformers
from PIL import Image

from diffusion_jax.data.sources.openmoji import builder, glyphs
from diffusion_jax.data.sources.openmoji.builder import group
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors import compiled, load_extractor
from diffusion_jax.evaluation.extractors.clip import (
  CLIPFeatures,
  load_clip_extractor,
  load_features,
)
from diffusion_jax.evaluation.extractors.images import InceptionExtractor
from diffusion_jax.formats.networks import load
from diffusion_jax.models.features.inception import Inception, InceptionConfig
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests import tiny

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), np.uint8)


def test_inception_computes_what_is_asked_for(images):
  network = Network.of(Inception, InceptionConfig(divisor=16))
  rng = np.random.default_rng(0)
  params = {
    name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in network.shapes.items()
  }
  extractor = InceptionExtractor(network, params, 'w', 'clean', ('192', '64'))
  assert extractor.name == 'inception/w/clean' and extractor.widths == {'192': 12, '64': 4}
  apply = compiled(extractor)
  found = apply(params, images)
  assert {name: value.shape for name, value in found.items()} == {'192': (3, 12), '64': (3, 4)}
  later = {name: p for name, p in params.items() if name.startswith(('Mixed', 'fc'))}
  broken = params | {name: np.full_like(p, np.nan) for name, p in later.items()}
  for name, value in apply(broken, images).items():
    np.testing.assert_array_equal(value, found[name])
  with pytest.raises(UserError, match="no '2048'; choose of 64, 192, spatial"):
    InceptionExtractor(network, params, 'w', outputs=('2048',))
  for name in ('bicubic', 'pillow'):
    with pytest.raises(UserError, match=f"no resize rule '{name}'; choose of tensorflow"):
      InceptionExtractor(network, params, 'w', name)


def test_clip_sees_pixels_as_its_directory_says(parts, images, tmp_path):
  directory = shutil.copytree(parts['clip'], tmp_path / 'some-clip')
  plain = load_clip_extractor(directory)
  assert plain.name == 'clip/some-clip/bicubic'
  assert plain.widths == {'embedding': tiny.CLIP.projection_dim}
  (directory / 'preprocessor_config.json').write_text(
    json.dumps({'image_mean': MEAN, 'image_std': STD})
  )
  told = load_clip_extractor(directory)
  size = tiny.CLIP.vision_config.image_size
  channel = lambda plane: np.asarray(
    Image.fromarray(plane.astype(np.float32)).resize((size, size), Image.BICUBIC)
  ).clip(0, 255)
  small = np.stack([np.stack([channel(i[..., c]) for c in range(3)], -1) for i in images]) / 255
  clip = load('clip', directory)
  for extractor, mean, std in ((plain, 0.5, 0.5), (told, np.array(MEAN), np.array(STD))):
    wanted = np.asarray(clip.encode_image(((small - mean) / std).astype(np.float32)))
    found = np.asarray(compiled(extractor)(extractor.params, images)['embedding'])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
  features = load_features(str(directory), make_mesh(MeshConfig()))
  np.testing.assert_allclose(features.images(images), found, atol=1e-4 * np.abs(found).max())


def test_an_image_tower_alone(images, tmp_path):
  """transformers' CLIPVisionModelWithProjection behind Pillow; texts are refused."""
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  theirs = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
    **tiny.TOWER, image_size=24, patch_size=8, projection_dim=6,
  )).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path / 'tower')
  (tmp_path / 'tower' / 'preprocessor_config.json').write_text(
    json.dumps({'image_mean': MEAN, 'image_std': STD})
  )
  extractor = load_extractor('clip', tmp_path / 'tower')
  assert extractor.name == 'clip/tower/bicubic' and extractor.widths == {'embedding': 6}
  channel = lambda plane: np.asarray(
    Image.fromarray(plane.astype(np.float32)).resize((24, 24), Image.BICUBIC)
  ).clip(0, 255)
  small = np.stack([np.stack([channel(i[..., c]) for c in range(3)], -1) for i in images]) / 255
  pixels = torch.tensor(((small - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)
  with torch.no_grad():
    wanted = theirs(pixels).image_embeds.numpy()
  found = compiled(extractor)(extractor.params, images)['embedding']
  np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
  assert np.abs(wanted[0] - wanted[1]).max() > 1e-2 * np.abs(wanted).max()
  with pytest.raises(UserError, match='clip/tower/bicubic is an image tower alone and knows no te'):
    CLIPFeatures(extractor, None, make_mesh(MeshConfig()))


def test_by_name(parts):
  mesh = make_mesh(MeshConfig())
  extractor = load_extractor('clip', parts['clip'], mesh=mesh)
  assert extractor.widths and all(p.sharding.mesh == mesh for p in extractor.params.values())
  with pytest.raises(UserError, match="no kind of features 'inception'; did you mean inception/"):
    load_extractor('inception', 'x.pth')
  with pytest.raises(UserError, match='clip has no pool3; choose of embedding'):
    load_extractor('clip', parts['clip'], outputs=('pool3',))


def test_held_out_emoji_are_given_their_groups():
  drawn = [(glyphs.glyph(hexcode), path) for hexcode, path in builder.drawings()]
  unseen = [(one, path) for one, path in drawn if one and glyphs.is_unseen_concept(one.concept)]
  unseen = unseen[::3]
  images = np.stack([
    np.asarray(Image.open(io.BytesIO(builder.render(path, 64)[0])).convert('RGB'))
    for _, path in unseen
  ])
  extractor = load_extractor('classifier', 'asset:classifier-openmoji-64')
  assert extractor.name == 'classifier/classifier-openmoji-64/clean'
  found = jax.jit(extractor.apply)(extractor.params, images)
  assert found['penultimate'].shape == (len(images), extractor.widths['penultimate'])
  names = [extractor.class_names[i] for i in found['logits'].argmax(axis=1)]
  wanted = [group(one) for one, _ in unseen]
  right = np.mean([a == b for a, b in zip(names, wanted, strict=True)])
  commonest = max(wanted.count(name) for name in set(wanted)) / len(wanted)
  assert len(wanted) > 30 and right > 0.8 > commonest + 0.15
