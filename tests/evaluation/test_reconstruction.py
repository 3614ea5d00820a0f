"""Images through an autoencoder: what comes back, how like it is, and what the job keeps of it."""

import math

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation.comparison import compare, features_of, of_images
from diffusion_jax.evaluation.extract import Extraction
from diffusion_jax.evaluation.images import Folder
from diffusion_jax.evaluation.metrics.images import psnr_of_each, ssim_of_each
from diffusion_jax.evaluation.reconstruction import (
  compare_pairs,
  of_autoencoder,
  perceptual,
  reconstructor,
)
from diffusion_jax.formats.networks import load_params
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.network import Network
from diffusion_jax.models.perceptual import lpips, lpips_shapes
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_params
from diffusion_jax.pixels import to_uint8
from tests.evaluation.colours import Colours

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 246, (5, 32, 32, 3), np.uint8)


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def network(parts):
  config, params = load_params('autoencoder', parts['autoencoder'])
  return Network.of(AutoencoderKL, config), params


def test_a_shift_of_all_values_has_figures_of_its_own():
  found = compare_pairs(IMAGES, IMAGES + np.uint8(10), ('psnr', 'ssim', 'l1'))
  np.testing.assert_allclose(found['l1'], 10 / 127.5, rtol=1e-9)
  np.testing.assert_allclose(found['psnr'], 20 * math.log10(255 / 10), rtol=1e-9)
  scaled = IMAGES / 127.5 - 1
  assert found['ssim'].mean() == pytest.approx(
    ssim_of_each(scaled, scaled + 10 / 127.5).mean(), abs=1e-6
  )
  assert (found['ssim'] < 1).all()
  assert list(compare_pairs(IMAGES, IMAGES, ('l1',))) == ['l1']


def test_lpips_of_pairs_is_that_of_the_model(mesh):
  params = {
    name: np.abs(RNG.normal(0, 0.05, s.shape)).astype(np.float32) for name, s in
    lpips_shapes().items()
  }
  images = IMAGES[:2, :16, :16]
  found = perceptual(put_params(params, mesh), mesh, 2)(images, images[[1, 1]])
  scaled = images.astype(np.float32) / 127.5 - 1
  wanted = jax.jit(lpips)(params, scaled[1:], scaled[:1])
  np.testing.assert_allclose(found, [wanted[0], 0], rtol=1e-4)
  assert wanted[0] > 0


def test_pictures_come_back_through_the_means_of_their_latents(network, mesh):
  own, params = network
  found = reconstructor(own, mesh, 2)(put_params(params, mesh), IMAGES)
  model = own.bind(params)
  wanted = jax.jit(lambda x: model.decode(model.encode(x)[0]))(
    IMAGES.astype(np.float32) / 127.5 - 1
  )
  assert found.shape == IMAGES.shape and found.dtype == np.uint8
  assert np.abs(found.astype(int) - to_uint8(np.asarray(wanted)).astype(int)).max() <= 1


def test_the_job_keeps_a_figure_for_each_image_that_can_be_read(network, mesh, tmp_path):
  own, params = network
  for i, image in enumerate(IMAGES):
    Image.fromarray(image).save(tmp_path / f'{i}.png')
  (tmp_path / '1.png').write_bytes(b'')
  images, there = Folder(tmp_path), [0, 2, 3, 4]
  on_mesh = put_params(params, mesh)
  reconstruct, extraction = reconstructor(own, mesh, 2), Extraction([Colours()], mesh)
  work = of_autoencoder(reconstruct, lambda: on_mesh, 'tiny', images, ('psnr', 'ssim'))
  parts = tmp_path / 'parts'
  how = {'most_unreadable': 0.2, 'chunk': 2}
  found, pictures = features_of(work, extraction, parts / 'reconstructed', **how)
  outputs = reconstruct(on_mesh, IMAGES[there])
  wanted = compare_pairs(IMAGES[there], outputs, ('psnr', 'ssim'))
  assert found.rows.tolist() == there and set(found.each) == {'psnr', 'ssim'}
  for name, values in wanted.items():
    np.testing.assert_allclose(found.each[name], values, rtol=1e-6, atol=1e-6)
  assert set(found.columns) == {'colours:mean'} and found.edge == 32
  assert pictures[2].shape == (96, 96, 3)
  # All of it is there: nothing is made again.
  again = of_autoencoder(None, lambda: 1 / 0, 'tiny', images, ('psnr', 'ssim'))
  repeated, _ = features_of(again, extraction, parts / 'reconstructed', **how)
  np.testing.assert_array_equal(repeated.each['psnr'], found.each['psnr'])
  originals, _ = features_of(of_images(images), extraction, parts / 'reference', **how)
  scores = compare(found, originals, ['psnr', 'ssim'], own=True)
  assert scores.values['psnr'] == pytest.approx(psnr_of_each(
    outputs / 127.5 - 1, IMAGES[there] / 127.5 - 1
  ).mean())
  assert set(scores.intervals) == {'psnr', 'ssim'}
  assert scores.intervals['psnr'].low <= scores.values['psnr'] <= scores.intervals['psnr'].high
