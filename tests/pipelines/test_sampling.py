"""Settings of sampling: what they do, what they compile, and image-to-image, with exact answers."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.cli.options import with_values
from diffusion_jax.config import typed
from diffusion_jax.diffusion.denoiser import classifier_free
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import initial_noise, sampling_grid
from diffusion_jax.errors import UserError
from diffusion_jax.formats.scheduler import read_scheduler
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import sample_config
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.sampling import BUCKETS, SampleConfig
from diffusion_jax.pixels import to_uint8
from diffusion_jax.types import Condition
from tests import tiny

CONFIG = SampleConfig('ddim', steps=3, guidance=3.0, guidance_interval=(0.1, 5.0))
PROMPTS = ('red apple', 'cat face', 'sun')
IMAGES = np.random.default_rng(0).integers(0, 256, (3, tiny.SIZE, tiny.SIZE, 3), np.uint8)


@pytest.fixture(scope='module')
def draw(model_and_weights):
  """draw(config, **arguments of generate): images of PROMPTS, two at a time."""
  model, weights = model_and_weights
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])

  def run(config=CONFIG, seed=0, prompts=PROMPTS, zeroed=False, **more):
    used = dict(weights)
    if zeroed:
      used['denoiser'] = jax.tree.map(jnp.zeros_like, used['denoiser'])
    used = model.on_mesh(jax.tree.map(np.asarray, used), mesh)
    batches = model.generate(used, prompts, config, seed=seed, mesh=mesh, batch_size=2, **more)
    return np.concatenate(list(batches))

  return run


def test_other_numbers_draw_other_images_without_compiling(draw, compilations):
  first = draw()
  draw(inputs=Inputs(IMAGES, 1.0))
  assert compilations
  compilations.clear()
  np.testing.assert_array_equal(draw(), first)
  changes = [
    {'guidance': 5.0}, {'guidance_rescale': 0.7}, {'guidance_interval': (0.0, 2.0)},
    {'guidance_interval': (0.1, None)}, {'steps': 5}, {'spacing': 'leading'},
  ]
  found = [draw(dataclasses.replace(CONFIG, **change)) for change in changes]
  found += [draw(seed=1), draw(negative='blue flag'), draw(inputs=Inputs(IMAGES, 0.4))]
  found += [draw(inputs=Inputs(IMAGES, 0.7))]
  assert not compilations
  every = [first, *found]
  for i, images in enumerate(every):
    assert all((images != other).any() for other in every[:i]), i
  draw(dataclasses.replace(CONFIG, guidance=1.0))
  assert compilations


def test_a_size_that_was_seen_before_compiles_nothing(draw, model_and_weights, compilations):
  """Whatever the prompt, seed, guidance and steps; every size is a program of its own, counted."""
  model, _ = model_and_weights
  sizes = ((tiny.SIZE, 2 * tiny.SIZE), (2 * tiny.SIZE, tiny.SIZE), (tiny.SIZE, tiny.SIZE))
  draw()
  before = len(model.programs)
  first = [draw(height=height, width=width) for height, width in sizes]
  assert [images.shape[1:3] for images in first] == list(sizes)
  assert len(model.programs) == before + 2 and compilations
  compilations.clear()
  for (height, width), images in zip(sizes, first, strict=True):
    np.testing.assert_array_equal(draw(height=height, width=width), images)
    again = draw(seed=3, prompts=PROMPTS[::-1], height=height, width=width)
    more = draw(dataclasses.replace(CONFIG, guidance=5.0, steps=4), height=height, width=width)
    assert (again != images).any() and (more != images).any()
  assert not compilations and len(model.programs) == before + 2


def test_a_size_that_cannot_be_halved_is_answered_with_the_nearest(model_and_weights):
  """By the denoiser as well as by the autoencoder."""
  model, _ = model_and_weights
  deeper = dataclasses.replace(tiny.UNET, block_out_channels=(8,) * 3, down_block_types=(
    'DownBlock2D',) * 3, up_block_types=('UpBlock2D',) * 3)
  stand_in = dataclasses.replace(model, denoiser=types.SimpleNamespace(config=deeper))
  assert (model.multiple, stand_in.multiple) == (2, 8)
  assert model.size_of(34, 30) == (34, 30) and stand_in.size_like(30, 60) == (24, 48)
  for size, near in (((34, 30), '32x32'), ((None, 3), '32x8'), ((100, 1000), '96x1000')):
    with pytest.raises(UserError, match=f'multiples of 8; the nearest such size is {near}'):
      stand_in.size_of(*size)


def test_image_to_image_starts_from_the_noised_image(draw, model_and_weights):
  """A network that gives v = 0 makes DDIM a factor cos(phi - phi') for each step."""
  model, weights = model_and_weights
  found = draw(zeroed=True, inputs=Inputs(IMAGES, 0.7), seed=4)
  grid = np.asarray(sampling_grid(model.noise.table, 3))[:, -3:]  # round(0.7 * 3) = 2 steps.
  factor = np.cos(np.diff(np.arctan2(grid[1], grid[0]))).prod()
  z = model.space.autoencoder.bind(weights['autoencoder']).encode(IMAGES / np.float32(127.5) - 1)[0]
  noise, _ = initial_noise(4, 0, 3, model.space.shape(*model.trained_size))
  start = grid[0][0] * model.space.scaled(z) + grid[1][0] * noise
  wanted = to_uint8(model.space.decode(weights, factor * start))
  assert np.abs(found.astype(int) - wanted).max() <= 1
  assert np.abs(wanted[0].astype(int) - wanted[1]).max() > 10


def test_a_started_image_does_not_depend_on_its_batch(draw):
  every = draw(inputs=Inputs(IMAGES, 0.7), seed=2)
  last = draw(inputs=Inputs(IMAGES[2:], 0.7), seed=2, prompts=PROMPTS[2:], first=2)
  assert np.abs(last[0].astype(int) - every[2]).max() <= 1
  one_for_all = draw(inputs=Inputs(IMAGES[2:], 0.7), seed=2)
  assert np.abs(one_for_all[2].astype(int) - every[2]).max() <= 1
  assert (one_for_all[0] != every[0]).any()


@pytest.mark.parametrize(('images', 'strength', 'words'), [
  (IMAGES[:2], 0.5, '1 or 3'), (IMAGES[:, :8], 0.5, 'uint8'),
  (IMAGES.astype(np.float32), 0.5, 'float32'), (IMAGES, 0.0, 'strength'),
  (IMAGES, 1.5, 'strength'), (IMAGES, 0.1, 'no step of 3'),
])
def test_images_that_cannot_be_started_from(draw, images, strength, words):
  with pytest.raises(UserError, match=words):
    draw(inputs=Inputs(images, strength))


@pytest.mark.parametrize(('change', 'words'), [
  ({'guidance': float('nan')}, 'guidance'), ({'guidance': float('inf')}, 'guidance'),
  ({'guidance_rescale': 1.2}, 'guidance_rescale'), ({'guidance_rescale': -0.1}, '0 to 1'),
  ({'guidance_interval': (2.0, 1.0)}, 'lower one first'),
  ({'guidance_interval': (-1.0, None)}, 'guidance_interval'),
  ({'guidance_interval': (float('nan'), 1.0)}, 'guidance_interval'),
  ({'threshold': 'hard'}, 'none, static, dynamic'), ({'threshold_limit': 0.0}, 'above 0'),
  ({'threshold_percentile': 95.0}, 'fraction'), ({'threshold_percentile': 0.0}, 'fraction'),
  ({'image_guidance': float('nan')}, 'image_guidance'), ({'clip_skip': -1}, 'clip_skip'),
  ({'options': {'order': 2}}, "no option 'order'"),
  ({'spacing': 'leading', 'steps_offset': 500}, 'offset of 500'),
  ({'guidance_kind': 'plus_plus'}, 'a guidance from 0 to 1, not of ddim and 3'),
  ({'guidance_kind': 'plus_plus', 'sampler': 'heun', 'guidance': 0.5}, 'not of heun'),
  ({'guidance_kind': 'plus_plus', 'guidance': 0.5}, 'guidance_interval has no effect'),
  ({'guidance_kind': 'zero_star'}, 'zero_star is of models of a flow'),
])
def test_wrong_settings_are_refused(model_and_weights, change, words):
  model, _ = model_and_weights
  with pytest.raises(UserError, match=words):
    dataclasses.replace(CONFIG, **change).check(model.noise, model.parameterization)


def test_settings_survive_json():
  for interval in ((0.3, 5.5), (0.3, None), (0.0, None)):
    config = SampleConfig(
      'unipc', guidance_interval=interval, threshold='dynamic', guidance_rescale=0.7,
      options={'order': 3, 'variant': 'bh1', 'lower_order_final': False}, steps_offset=1,
    )
    text = json.dumps(dataclasses.asdict(config), allow_nan=False)
    assert typed(SampleConfig, json.loads(text)) == config
  for wrong in ([0.1], [0.1, 'much'], [0.1, 1.0, 2.0]):
    with pytest.raises(UserError, match='guidance_interval'):
      typed(SampleConfig, {'guidance_interval': wrong})


def guide(config, schedule, calls=None, prediction='epsilon'):
  """x_0 that the settings make of two images, at the grid's second pair."""
  def denoise(x, alpha, sigma, text):
    if calls is not None:
      calls.append(len(x))
    return text[:, :, :, None] + 0.1 * x

  shape = (2, 4, 4)
  text, negative, x = (jax.random.normal(jax.random.key(i), shape) for i in range(3))
  numbers = config.numbers(schedule)
  pair = [part[1] for part in numbers.grid]
  denoiser = config.program.guide(
    denoise, text, negative, numbers, Parameterization(prediction)
  )
  plain = classifier_free(denoise, text, negative, config.guidance)
  x = x[..., None]
  return denoiser(x, *pair), plain(x, *pair), lambda **more: classifier_free(
    denoise, text, negative, config.guidance, **more
  )(x, *pair)


def test_no_guidance_costs_one_call_of_the_same_size(model_and_weights):
  schedule = model_and_weights[0].noise
  for scale, size in ((1.0, 2), (1, 2), (4.0, 4)):
    calls = []
    guide(SampleConfig(guidance=scale), schedule, calls)
    assert calls[0] == size


def test_settings_reach_the_denoiser(model_and_weights):
  schedule = model_and_weights[0].noise
  found, plain, _ = guide(SampleConfig(), schedule)
  np.testing.assert_allclose(found, plain, rtol=1e-6)
  for prediction, space in (('epsilon', 'epsilon'), ('flow_prediction', 'sample')):
    config = SampleConfig(guidance_rescale=0.7)
    found, plain, other = guide(config, schedule, prediction=prediction)
    np.testing.assert_allclose(found, other(rescale=0.7, rescale_in=space), rtol=1e-5, atol=1e-6)
    assert not np.allclose(found, plain)
  low = guide(SampleConfig(guidance_interval=(1e3, None)), schedule)
  unguided = guide(SampleConfig(guidance=1.0), schedule)[0]
  np.testing.assert_allclose(low[0], unguided, rtol=1e-6)
  clipped = guide(SampleConfig(threshold='static', threshold_limit=2.0), schedule)
  np.testing.assert_allclose(clipped[0], np.clip(clipped[1], -2, 2), rtol=1e-6)
  config = SampleConfig(threshold='dynamic', threshold_limit=2.0, threshold_percentile=0.5)
  found, plain, _ = guide(config, schedule)
  s = np.clip(np.quantile(np.abs(plain), 0.5, axis=(1, 2, 3), keepdims=True), 1.0, 2.0)
  np.testing.assert_allclose(found, np.clip(plain, -s, s) / s, rtol=1e-5)


def test_a_published_scheduler_becomes_settings(model_and_weights):
  values = {
    '_class_name': 'UniPCMultistepScheduler', 'solver_order': 3, 'timestep_spacing': 'leading',
    'steps_offset': 1, 'final_sigmas_type': 'sigma_min', 'thresholding': True,
  }
  found = read_scheduler(values, 'scheduler_config.json')
  config = sample_config(found)
  assert config == SampleConfig(
    'unipc', 50, 7.5, 'leading', threshold='dynamic', threshold_limit=1.0, options={'order': 3},
    steps_offset=1, drop_last=True, set_alpha_to_one=False,
  )
  assert config.program.options == (('order', 3),)
  schedule = model_and_weights[0].noise
  alphas, sigmas = dataclasses.replace(config, steps=4).numbers(schedule).grid
  places = [801, 601, 401, 201]  # Of 5 the last is left out.
  np.testing.assert_allclose(alphas[:4], schedule.table.alphas[places], rtol=1e-6)
  np.testing.assert_allclose(sigmas[4], schedule.table.sigmas[0], rtol=1e-6)
  assert len(sigmas) == 9 and not sigmas[5:].any() and not alphas[5:].any()  # Filled up.
  assert sample_config(found, 'StableDiffusionInstructPix2PixPipeline').image_guidance == 1.5


def test_another_sampler_leaves_behind_what_was_said_for_the_first():
  read = SampleConfig('unipc', options={'order': 3}, steps_offset=1, drop_last=True,
                      set_alpha_to_one=False, places={'low': 0.1}, timesteps='nearest',
                      scaled_noise=True)
  with_sampler = lambda name: with_values(read, {'sampler': name, 'steps': 7})
  assert with_sampler('unipc') == dataclasses.replace(read, steps=7)
  assert with_sampler('heun') == SampleConfig('heun', 7, steps_offset=1)


def test_guidance_by_a_picture_needs_a_model_that_edits(draw):
  with pytest.raises(UserError, match='edits no picture'):
    draw(dataclasses.replace(CONFIG, image_guidance=1.5))


def test_cfg_plus_plus_without_a_scale_draws_without_the_text(draw):
  plain = dataclasses.replace(CONFIG, guidance_interval=(0.0, None))
  kind = dataclasses.replace(plain, guidance_kind='plus_plus')
  without = draw(dataclasses.replace(plain, guidance=1.0), prompts=('', '', ''))
  close = lambda one, other: np.abs(one.astype(int) - other.astype(int)).max() <= 1
  assert close(draw(dataclasses.replace(kind, guidance=0.0)), without)
  half = draw(dataclasses.replace(kind, guidance=0.5))
  assert not close(half, without)
  assert (half != draw(dataclasses.replace(plain, guidance=0.5))).any()


def test_cfg_zero_star_takes_no_first_step(model_and_weights):
  model, weights = model_and_weights
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  flow = dataclasses.replace(
    model, noise=NoiseSchedule.of(NoiseConfig(process='flow')),
    parameterization=Parameterization('flow_prediction'),
  )
  weights = model.on_mesh(jax.tree.map(np.asarray, dict(weights)), mesh)
  z = {}
  for steps, kind in itertools.product((1, 2), ('zero_star', 'extrapolated')):
    config = SampleConfig('flow_euler', steps=steps, guidance=3.0, guidance_kind=kind)
    z[steps, kind] = np.concatenate(list(flow.sample(
      weights, PROMPTS, config, seed=0, mesh=mesh, batch_size=4, latents=True
    )))
  noise, _ = initial_noise(0, 0, 3, z[1, 'zero_star'].shape[1:])
  np.testing.assert_allclose(z[1, 'zero_star'], noise, atol=1e-5)
  assert np.abs(z[1, 'extrapolated'] - noise).max() > 0.1
  assert np.abs(z[2, 'zero_star'] - noise).max() > 0.1


def test_noise_can_be_given(draw, model_and_weights):
  shape = (3, *model_and_weights[0].space.shape(32, 32))
  noise, _ = initial_noise(0, 0, 3, shape[1:])
  plain = draw()
  np.testing.assert_array_equal(draw(noise=np.asarray(noise)), plain)
  assert (draw(noise=-np.asarray(noise)) != plain).any()
  with pytest.raises(UserError, match='one array for each prompt'):
    draw(noise=np.asarray(noise)[:2])


@pytest.mark.parametrize('seed', [2**32, 2**64 + 7, -1, 1.5, '7', None])
def test_a_seed_that_would_draw_what_another_draws_is_refused(draw, seed):
  with pytest.raises(UserError, match=r'seed is .*; give a whole number from 0 to 4294967295'):
    draw(seed=seed)


def test_an_empty_prompt_draws_without_condition(draw, model_and_weights, compilations):
  """By hand: DDIM with what the network says of the null caption."""
  model, weights = model_and_weights
  null = model.condition(weights, model.rows(['', '', '']))
  denoise, (alphas, sigmas) = model.denoise(weights), sampling_grid(model.noise.table, 3)
  x, _ = initial_noise(5, 0, 3, model.space.shape(*model.trained_size))
  pairs = list(zip(alphas, sigmas, strict=True))
  for (alpha, sigma), (next_alpha, next_sigma) in itertools.pairwise(pairs):
    clean = denoise(x, alpha, sigma, null)
    x = next_alpha * clean + next_sigma * (x - alpha * clean) / sigma
  wanted = to_uint8(model.space.decode(weights, x)).astype(int)
  mixed = draw(seed=5, prompts=('', 'cat face', ' \t'))
  assert np.abs(mixed - wanted)[[0, 2]].max() <= 1 < np.abs(mixed - wanted)[1].max()
  unguided = dataclasses.replace(CONFIG, guidance=1.0)
  assert np.abs(draw(unguided, seed=5, prompts=['', '', '']) - wanted).max() <= 1
  compilations.clear()
  everywhere = dataclasses.replace(CONFIG, guidance_interval=(0.0, None))
  assert np.abs(draw(everywhere, seed=5, prompts=['', ' ', '\n']) - wanted).max() <= 1
  assert not compilations  # Guidance costs nothing: it is the same program as without.
  against = draw(seed=5, prompts=['', '', ''], negative='blue flag')
  assert np.abs(against - wanted).max() > 1


def test_weighted_prompts_are_read_where_that_is_asked_for(draw, compilations):
  """Those without weights as ever; others of as many chunks run the same program."""
  weighted = dataclasses.replace(CONFIG, prompt_syntax='weighted')
  plain, found = draw(), draw(weighted)
  assert np.abs(found.astype(int) - plain).max() <= 1
  compilations.clear()
  other = draw(weighted, prompts=('red (apple:1.6)', 'cat face', '(sun)'), negative='[cat]')
  assert (other != found).any(axis=(1, 2, 3)).all() and not compilations
  long = ('red apple ' * 12, 'cat face', 'sun')
  assert (draw(weighted, prompts=long)[0] != found[0]).any()
  assert weighted.in_force()['prompt_syntax'] == 'weighted' not in CONFIG.in_force()


def test_numbers_of_one_bucket_have_one_shape(model_and_weights):
  schedule = model_and_weights[0].noise
  lengths = [len(SampleConfig(steps=n).numbers(schedule).grid[0]) for n in (1, 8, 9, 20, 900, 1000)]
  assert lengths == [9, 9, 17, 25, 901, 1001] and BUCKETS == tuple(sorted(BUCKETS))


def test_metadata_names_what_has_an_effect():
  assert SampleConfig().in_force() == {
    'sampler': 'dpmpp_2m', 'steps': '20', 'spacing': 'trailing', 'guidance': '4',
  }
  every = SampleConfig(guidance_rescale=0.7, guidance_interval=(0.3, None), threshold='dynamic')
  more = {
    'guidance_rescale': '0.7', 'guidance_interval': '0.3 inf', 'threshold': 'dynamic',
    'threshold_limit': '4', 'threshold_percentile': '0.995',
  }
  assert every.in_force() == SampleConfig().in_force() | more
  published = SampleConfig('unipc', options={'order': 3}, steps_offset=1, set_alpha_to_one=False)
  assert published.in_force() == SampleConfig('unipc').in_force() | {
    'options': 'order=3', 'steps_offset': '1', 'set_alpha_to_one': 'False',
  }
  unguided = dataclasses.replace(every, guidance=1.0, threshold='static').in_force()
  assert unguided.keys() == {'sampler', 'steps', 'spacing', 'guidance', 'threshold',
                             'threshold_limit'}


def test_guidance_leads_away_from_perturbed_attention_and_a_worse_model(model_and_weights):
  """One step of DDIM to clean data is the guided estimate itself."""
  model, weights = model_and_weights
  rng = np.random.default_rng(0)
  worse = {n: v + 0.1 * rng.normal(size=v.shape) for n, v in weights['denoiser'].items()}
  model, weights = dataclasses.replace(model, worse=model.denoiser), {**weights, 'worse': worse}
  x, keys = initial_noise(0, 0, 2, model.space.shape(tiny.SIZE, tiny.SIZE))
  text = Condition(text=jnp.asarray(rng.normal(size=(2, 10, 16)), jnp.float32))

  def sample(**settings):
    config = SampleConfig('ddim', steps=1, guidance=1.0, **settings)
    numbers = config.numbers(model.noise)
    return model.sample_z(weights, x, keys, text, text, config.program, numbers)

  estimate = lambda network, params: dataclasses.replace(model, denoiser=network).denoise(
    {**weights, 'denoiser': params}
  )(x, jnp.zeros(()), jnp.ones(()), text)
  plain = estimate(model.denoiser, weights['denoiser'])
  np.testing.assert_allclose(sample(), plain, atol=1e-5)
  perturbed = model.denoiser.with_compute(perturbed='mid_block')
  bad = estimate(perturbed, weights['denoiser'])
  assert np.abs(bad - plain).max() > 1e-3
  with_bad = sample(perturbed_attention=2.0)
  np.testing.assert_allclose(with_bad, plain + 2 * (plain - bad), atol=1e-4)
  poor = estimate(model.denoiser, worse)
  both = sample(perturbed_attention=2.0, autoguidance=1.5)
  np.testing.assert_allclose(both, with_bad + 0.5 * (plain - poor), atol=1e-4)
  with pytest.raises(UserError, match="no self-attention in 'up_blocks'"):
    model.denoiser.with_compute(perturbed='up_blocks')


def test_autoguidance_needs_a_worse_model(draw):
  with pytest.raises(UserError, match='give --worse DIR'):
    draw(dataclasses.replace(CONFIG, autoguidance=2.0))
