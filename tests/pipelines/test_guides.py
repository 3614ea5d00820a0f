"""Guidance by CLIP: its score, what it sees, and pictures that fit their prompts better."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.cli.options import AdapterOptions
from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors.clip import load_features
from diffusion_jax.models.text.clip import unit
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.conditioners import Request
from diffusion_jax.pipelines.guides import views_of
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import PixelSpace
from diffusion_jax.pixels import to_uint8
from tests import tiny

PROMPTS = ('red apple', 'cat face', 'sun')


@pytest.fixture(scope='module')
def features(parts):
  with tiny.few_devices():
    return load_features(parts['clip'], make_mesh(MeshConfig()))


@pytest.fixture(scope='module')
def plain(parts):
  """(a model of latents, the weights of all but its denoiser)."""
  return tiny.assemble(
    tiny.UNET, **parts, schedule=ScheduleConfig(), parameterization=Parameterization()
  )


@pytest.fixture(scope='module')
def guided(plain, parts):
  """The same with the CLIP of the parts as its guide."""
  return AdapterOptions(clip=parts['clip']).apply(*plain, 1.0)


def test_the_score_is_the_logit_of_the_decoded_picture_with_its_prompt(guided, features):
  model, weights = guided
  guide = model.conditioners['clip_guidance']
  z = np.random.default_rng(0).normal(size=(3, 16, 16, 4)).astype(np.float32)
  score = jax.jit(guide.score(weights, guide.rows(Request(PROMPTS)), model.space))
  images = to_uint8(model.space.decode(weights, z))
  cosines = (unit(features.images(images)) * unit(features.texts(PROMPTS))).sum(axis=-1)
  scale = np.exp(weights['guiding_clip']['logit_scale'])
  np.testing.assert_allclose(score(z, 1.0, 0.5), scale * cosines, rtol=2e-2, atol=2e-2)


def test_cut_outs_are_squares_of_the_picture_of_other_places_at_each_level():
  ramp = jnp.broadcast_to(jnp.arange(64.0)[None, None, :, None], (2, 64, 64, 3))
  views = views_of(ramp, 16, 5, jnp.float32(1), jnp.float32(0.5))
  assert views.shape == (5, 2, 16, 16, 3)
  steps = np.diff(np.asarray(views)[:, 0, 8, 3:-3, 0], axis=1)  # Inside, where no edge blends.
  mean = steps.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(steps, mean.repeat(steps.shape[1], 1), atol=0.15)
  assert (mean >= 0.5 * 64 / 16 - 0.02).all() and (mean <= 64 / 16 + 0.02).all()
  assert len(np.unique(mean.round(2))) == 5
  assert np.abs(views_of(ramp, 16, 5, jnp.float32(1), jnp.float32(0.6)) - views).max() > 1
  whole = views_of(ramp, 64, 0, jnp.float32(1), jnp.float32(0.5))
  np.testing.assert_allclose(whole[0], ramp, atol=1e-4)


def test_guided_pictures_fit_their_prompts_better(parts, features):
  """Of the guided steps fewer, less so; one program for all scales, one for all intervals."""
  unet = dataclasses.replace(tiny.UNET, in_channels=12, out_channels=12)
  how = PixelSpace(patch=2), {'text': {'path': parts['clip']}}, ScheduleConfig(), Parameterization()
  model, frozen = assemble(unet, *how)
  weights = {role: part.load() for role, part in frozen.items()}
  weights['denoiser'] = jax.jit(model.denoiser.initialize)(jax.random.key(0))
  plain = model, weights
  guided = AdapterOptions(clip=parts['clip']).apply(*plain, 1.0)
  fits = {}
  for (model, weights), scale, every in (
    (plain, 0.0, 1), (guided, 0.0, 1), (guided, 3.0, 1), (guided, 3.0, 2)
  ):
    config = SampleConfig(
      sampler='ddim', steps=4, guidance=1.0, clip_guidance=scale, clip_guidance_every=every
    )
    images = np.concatenate([*model.generate(
      weights, PROMPTS, config, seed=1, mesh=features.mesh, batch_size=3
    )])
    pairs = unit(features.images(images)) * unit(features.texts(PROMPTS))
    fits[len(model.conditioners), scale, every] = np.asarray(pairs.sum(axis=-1))
  without, unguided, best, half = fits.values()
  np.testing.assert_allclose(without, unguided, atol=1e-3)
  assert (best > without + 0.01).all()
  assert without.mean() < half.mean() < best.mean()
  assert len(guided[0].programs) == 3
  assert config.in_force().items() >= {'clip_guidance': '3', 'clip_guidance_every': '2'}.items()


def test_what_guides_nothing_is_refused(plain, guided):
  with pytest.raises(UserError, match='clip_guidance'):
    plain[0].check_sampling(SampleConfig(clip_guidance=1.0))
  guided[0].check_sampling(SampleConfig(clip_guidance=1.0))
  for given in ({'clip': 'anywhere'}, {'clip_cutouts': 4}):
    with pytest.raises(UserError, match='--clip_guidance'):
      AdapterOptions(**given).apply(*plain)
  assert AdapterOptions().apply(*plain) == plain
