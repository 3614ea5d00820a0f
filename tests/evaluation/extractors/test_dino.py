"""DINOv2 as features: against transformers behind Pillow and torch, on whole images."""

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation.extractors import load_extractor
from diffusion_jax.evaluation.extractors.images import load_dinov2_extractor, size_name
from diffusion_jax.formats.dinov2 import SIZES
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.dinov2 import DINOv2, DINOv2Config
from diffusion_jax.parallel.mesh import MeshConfig, in_batches, make_mesh

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')


def _images(height, width):
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (2, 5, 4, 3), np.uint8)
  smooth = [np.asarray(Image.fromarray(x).resize((width, height), Image.BILINEAR)) for x in coarse]
  noise = rng.integers(-20, 21, (2, height, width, 3))
  return np.clip(np.stack(smooth) + noise, 0, 255).astype(np.uint8)


def test_features_are_those_of_the_reference(tmp_path):
  torch.manual_seed(0)
  theirs = transformers.Dinov2Model(transformers.Dinov2Config(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=70,
  )).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path / 'tiny')
  extractor = load_extractor('dinov2', tmp_path / 'tiny')
  assert extractor.name == 'dinov2/16x1/tiny/pillow' and extractor.widths == {'cls': 16}
  images = _images(80, 96)
  found = jax.jit(extractor.apply)(extractor.params, images)
  pixels = np.stack([  # As torchvision's Resize does with pictures.
    np.asarray(Image.fromarray(x).resize((224, 224), Image.BICUBIC)) for x in images
  ])
  np.testing.assert_allclose(  # Where some are of another size than the rest, hosts resize them.
    extractor.apply(extractor.params, pixels.astype(np.float32))['cls'], found['cls'], atol=2e-5
  )
  pixels = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
  mean, std = (torch.tensor(v)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225)))
  with torch.no_grad():
    wanted = theirs((pixels - mean) / std).pooler_output.numpy()
  assert found.keys() == {'cls'} and found['cls'].dtype == np.float32
  np.testing.assert_allclose(found['cls'], wanted, atol=2e-5)
  assert np.abs(wanted[0] - wanted[1]).max() > 0.02  # The two images differ in them.


def test_features_on_eight_devices_are_those_of_one(tmp_path):
  config = DINOv2Config(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=70,
    use_swiglu_ffn=True, num_register_tokens=2,
  )
  network = Network.of(DINOv2, config)
  rng = np.random.default_rng(0)
  params = {n: rng.normal(0, 0.3, s.shape).astype(np.float32) for n, s in network.shapes.items()}
  save_params(tmp_path, config, params)
  images = np.concatenate([_images(40, 48)] * 2)
  alone = load_dinov2_extractor(tmp_path)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  spread = load_dinov2_extractor(tmp_path, mesh=mesh)
  kernel = spread.params['encoder.layer.0.mlp.weights_in.kernel']
  assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
  wanted = jax.jit(alone.apply)(alone.params, images)['cls']
  with jax.set_mesh(mesh):
    found = list(in_batches(jax.jit(spread.apply), spread.params, images, mesh=mesh, batch_size=4))
  np.testing.assert_allclose(found[0]['cls'], wanted, rtol=1e-4, atol=1e-4)


def test_sizes_have_the_names_of_the_published_ones():
  assert [size_name(config) for config in SIZES.values()] == ['small', 'base', 'large', 'giant']
