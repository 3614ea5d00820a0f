"""Pictures of which part is kept: exact where they are known, one program for all that is asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.known import (
  enlarged,
  free_places,
  outpainted,
  painted_shares,
  parse_margins,
  projection,
)
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import PixelSpace, fold, unfold
from diffusion_jax.pipelines.tiling import tiled
from diffusion_jax.pixels import to_float, to_uint8
from tests import tiny

CONFIG = SampleConfig('dpmpp_2m', steps=6, guidance=3.0)
PROMPTS = ('red apple', 'sun')
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, tiny.SIZE, tiny.SIZE, 3), np.uint8)
MASKS = np.zeros((2, tiny.SIZE, tiny.SIZE), bool)
MASKS[0, 5:20, 9:], MASKS[1, :7] = True, True


@pytest.fixture(scope='module')
def draw(model_and_weights):
  """draw(config, **arguments of generate): pictures of PROMPTS."""
  model, weights = model_and_weights
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  used = model.on_mesh(jax.tree.map(np.asarray, weights), mesh)

  def run(config=CONFIG, model=model, **more):
    how = {'seed': 0, 'mesh': mesh, 'batch_size': 2} | more
    return np.concatenate(list(model.generate(used, PROMPTS, config, **how)))

  return run


def test_pixels_that_are_not_painted_come_back_and_all_is_one_program(draw, compilations):
  paint = lambda config=CONFIG, *strength, masks=MASKS, **more: draw(
    config, inputs=Inputs(IMAGES, *strength, masks=masks, **more)
  )
  plain, found = draw(), paint()
  compilations.clear()
  np.testing.assert_array_equal(found[~MASKS], IMAGES[~MASKS])
  assert (found[MASKS] != plain[MASKS]).any() and (found[MASKS] != IMAGES[MASKS]).any()
  np.testing.assert_array_equal(paint(masks=MASKS[:1] | True), plain)
  np.testing.assert_array_equal(paint(masks=MASKS & False), IMAGES)
  started, feathered = paint(CONFIG, 0.5), paint(feather=3)
  for other in (started, feathered):
    np.testing.assert_array_equal(other[~MASKS], IMAGES[~MASKS])
    assert (other[MASKS] != found[MASKS]).any()
  deep = painted_shares(MASKS, 3) == 1
  np.testing.assert_array_equal(feathered[deep], found[deep])
  assert not compilations

  again = lambda repeats: paint(dataclasses.replace(CONFIG, resample=repeats, resample_jump=2))
  twice = again(2)
  assert compilations and (twice[MASKS] != found[MASKS]).any()
  compilations.clear()
  assert (again(3)[MASKS] != twice[MASKS]).any() and not compilations
  np.testing.assert_array_equal(twice[~MASKS], IMAGES[~MASKS])


def test_feathers_grow_inside_masks_alone():
  shares = painted_shares(MASKS, 4)
  assert shares.dtype == np.float32 and not shares[~MASKS].any() and shares[MASKS].all()
  np.testing.assert_allclose(shares[1, :8, 0], [1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0], rtol=1e-6)
  np.testing.assert_array_equal(painted_shares(MASKS), MASKS)
  np.testing.assert_array_equal(painted_shares(MASKS | True, 4), 1)


def test_places_are_free_where_any_of_their_pixels_is_painted(model_and_weights):
  """In pixels folded into channels each pixel is for itself."""
  model, _ = model_and_weights
  masks = np.zeros((1, 8, 8), bool)
  masks[0, 3, 5] = True
  of_pixels = unfold(free_places(PixelSpace(4), jnp.asarray(masks)), 4)
  np.testing.assert_array_equal(of_pixels, np.repeat(masks[..., None], 3, -1))
  latent = np.asarray(free_places(model.space, jnp.asarray(masks)))
  assert latent.shape == (1, *model.space.shape(8, 8)) and latent[0, 1, 2].all()
  assert latent.sum() == model.space.channels


def test_averages_over_squares_are_kept(draw):
  """Those of pixels for a model of them; of latents, which are no average of pixels, in z."""
  space, small = PixelSpace(2), RNG.integers(0, 256, (1, 2, 4, 3), np.uint8)
  large = enlarged(small, 4)
  assert large.shape == (1, 8, 16, 3) and (large[0, 4:, :4] == small[0, 1, 0]).all()
  hold = projection(space, fold(jnp.asarray(large, jnp.float32), 2), low_pass=4)
  found = unfold(hold(jnp.asarray(RNG.normal(size=space.shape(8, 16)))[None]), 2)
  means = np.asarray(found).reshape(1, 2, 4, 4, 4, 3).mean(axis=(2, 4))
  np.testing.assert_allclose(means, small, rtol=1e-5)
  assert found.std() > 0.5
  one, other = (
    draw(inputs=Inputs(enlarged(images, 8), low_pass=8))
    for images in (IMAGES[:, :4, :4], IMAGES[:, 4:8, :4])
  )
  assert (one != draw()).any() and (one != other).any()


def test_a_transformer_of_pixels_and_a_flow_by_a_stochastic_sampler():
  """Folded pixels are exact one by one, and averages those of the small picture."""
  dit = DiTConfig(
    num_attention_heads=1, attention_head_dim=8, in_channels=12, out_channels=12, num_layers=1,
    sample_size=4, patch_size=1, num_embeds_ada_norm=None,
  )
  flow = ScheduleConfig(beta_schedule='flow')
  model, _ = assemble(dit, PixelSpace(2), {}, flow, Parameterization('flow_prediction'))
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  weights = {'denoiser': jax.jit(model.denoiser.initialize)(jax.random.key(1))}
  images, mask = IMAGES[:1, :8, :8], MASKS[:1, 2:10, 5:13]
  draw = lambda **how: np.concatenate(list(model.sample(
    weights, [''], SampleConfig('euler_ancestral', steps=4, guidance=1.0), seed=0, mesh=mesh,
    batch_size=1, height=8, width=8, **how
  )))
  found = to_uint8(draw(inputs=Inputs(images, masks=mask)))
  np.testing.assert_array_equal(found[~mask], images[~mask])
  assert (found[mask] != images[mask]).mean() > 0.5
  # Before they are clipped to what pixels can be.
  z = draw(inputs=Inputs(enlarged(images[:, :2, :2], 4), low_pass=4), latents=True)
  means = np.asarray(unfold(jnp.asarray(z), 2)).reshape(1, 2, 4, 2, 4, 3).mean(axis=(2, 4))
  np.testing.assert_allclose(means, to_float(images[:, :2, :2]), atol=1e-5)


def test_outpainting_widens_the_canvas(draw):
  inner = IMAGES[:, :16, :24]
  wider = outpainted(inner, parse_margins('8, 0,0,16'), MASKS[:, :16, :24])
  assert wider['images'].shape == (2, 32, 32, 3) and wider['masks'][:, 16:].all()
  assert wider['masks'][:, :, :8].all() and (wider['masks'][:, :16, 8:] == MASKS[:, :16, :24]).all()
  np.testing.assert_array_equal(wider['images'][:, :16, 0], inner[:, :, 0])
  found = draw(inputs=Inputs(**outpainted(inner, (8, 0, 0, 16))))
  np.testing.assert_array_equal(found[:, :16, 8:], inner)
  for margins in ('1,2,3', '1,2,3,-4', 'a,b,c,d', '0,0,0,0', '9000,0,0,0'):
    with pytest.raises(UserError, match='--outpaint is'):
      parse_margins(margins)


@pytest.mark.parametrize(('axes', 'across', 'down'), [('x', True, False), ('both', True, True)])
def test_rolled_noise_gives_the_rolled_picture_where_it_wraps(
  draw, model_and_weights, axes, across, down
):
  model, _ = model_and_weights
  wraps = tiled(model, axes)
  noise = RNG.normal(size=(2, *model.space.shape(tiny.SIZE, tiny.SIZE))).astype(np.float32)
  found = draw(model=wraps, noise=noise).astype(int)
  scale = tiny.SIZE // noise.shape[1]
  for axis, same in ((2, across), (1, down)):
    rolled = draw(model=wraps, noise=np.roll(noise, 4, axis))
    apart = np.abs(rolled - np.roll(found, 4 * scale, axis)).max()
    assert apart <= 1 if same else apart > 8
  assert tiled(model, 'none') is model
  places = dataclasses.replace(model, denoiser=Network.of(DiT, DiTConfig(
    num_attention_heads=1, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=4,
  )))
  with pytest.raises(UserError, match='the denoiser is no U-Net'):
    tiled(places, axes)


@pytest.mark.parametrize(('inputs', 'resample', 'said'), [
  ({'masks': MASKS}, 1, 'masks .--mask. is of a picture'),
  ({'low_pass': 4}, 1, 'low_pass .--enlarge. is of a picture'),
  ({'images': IMAGES, 'masks': MASKS, 'low_pass': 4}, 1, 'leave one out'),
  ({'images': IMAGES, 'feather': 2}, 1, 'feather needs a mask'),
  ({'images': IMAGES, 'masks': MASKS, 'feather': -1}, 1, 'feather is -1'),
  ({'images': IMAGES, 'low_pass': 3}, 1, 'give a multiple of 2'),
  ({'images': IMAGES, 'low_pass': 12}, 1, 'that divides the 32x32 pixels'),
  ({'images': IMAGES}, 2, 'no part of a picture is held'),
  ({'images': IMAGES, 'masks': MASKS[:, :8]}, 1, 'masks are bool'),
  ({'images': IMAGES, 'masks': MASKS.astype(np.uint8)}, 1, 'masks are uint8'),
])
def test_what_contradicts_itself_is_refused(draw, inputs, resample, said):
  with pytest.raises(UserError, match=said):
    draw(dataclasses.replace(CONFIG, resample=resample), inputs=Inputs(**inputs))


def test_a_stretch_as_long_as_the_steps_is_refused(draw):
  config = dataclasses.replace(CONFIG, resample=2, resample_jump=6)
  with pytest.raises(UserError, match='choose a resample_jump below them'):
    draw(config, inputs=Inputs(IMAGES, masks=MASKS))
