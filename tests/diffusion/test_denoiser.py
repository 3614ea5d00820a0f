"""Denoisers made of networks; guidance on Gaussian mixtures, where it has a closed form."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import denoiser
from diffusion_jax.diffusion.denoiser import make_denoiser
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.noise import NoiseSchedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization, noise_label
from diffusion_jax.errors import UserError
from tests.diffusion.exact_mixture import component

MIXTURE = GaussianMixture(
  np.array([0.2, 0.5, 0.3]),
  np.array([[-1.0, 0.5], [2.0, 1.0], [0.0, -1.5]]),
  np.array([0.3, 0.1, 0.2]),
)
ALPHA, SIGMA = 0.8, 0.6
CLASSES = np.array([0, 2, 1, 1])


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)


def denoise(x, alpha, sigma, text):
  """Exact for data whose component has the probabilities text [b k]."""
  one = lambda x, weights: MIXTURE._replace(weights=weights).denoise(x[None], alpha, sigma)[0]
  return jax.vmap(one)(x, text)


TEXT, NULL = np.eye(3)[CLASSES], np.stack([MIXTURE.weights] * 4)
unconditional = MIXTURE.denoise
conditional = lambda x, alpha, sigma: denoise(x, alpha, sigma, TEXT)


def scores(x):
  """Scores of the noised data [b 2]: of all of it, and of each row's class."""
  noised = MIXTURE.diffused(ALPHA, SIGMA)
  own = [component(noised, k).score(x[i, None])[0] for i, k in enumerate(CLASSES)]
  return noised.score(x), jnp.stack(own)


def score_of(x0, x):
  return (ALPHA * x0 - x) / SIGMA**2


def away_from(worse, better, scale, **how):
  """worse + scale (better - worse), as autoguidance has it."""
  return denoiser.classifier_free(
    lambda x, alpha, sigma, _: better(x, alpha, sigma), jnp.ones(1), jnp.ones(1), 1,
    others=[(worse, scale - 1)], **how,
  )


def images(seed, spread=1.0):
  return spread * jax.random.normal(jax.random.key(seed), (3, 4, 4, 2), jnp.float64)


def constant(x0):
  return lambda x, alpha, sigma: x0


@pytest.mark.parametrize('scale', [0.0, 1.0, 3.5, np.array([0.0, 1.0, 2.0, 5.0])])
def test_classifier_free_guides_the_score(x, scale):
  guided = denoiser.classifier_free(denoise, TEXT, NULL, scale)(x, ALPHA, SIGMA)
  every, own = scores(x)
  wanted = every + np.reshape(scale, (-1, 1)) * (own - every)
  np.testing.assert_allclose(score_of(guided, x), wanted, rtol=1e-10, atol=1e-12)


def test_a_negative_prompt_takes_the_place_of_the_null_caption(x):
  negative = np.eye(3)[[1, 1, 0, 2]]
  guided = denoiser.classifier_free(denoise, TEXT, negative, 2.0)(x, ALPHA, SIGMA)
  wanted = 2 * conditional(x, ALPHA, SIGMA) - denoise(x, ALPHA, SIGMA, negative)
  np.testing.assert_allclose(guided, wanted, rtol=1e-12)


@pytest.mark.parametrize('scale,image_scale', [(3.0, 1.5), (1, 1.5), (3.0, 0.0)])
def test_an_edit_is_guided_by_text_and_picture(x, scale, image_scale):
  calls = []

  def spy(x, alpha, sigma, text):
    calls.append(len(x))
    return denoise(x, alpha, sigma, text), 2 * x

  picture = np.eye(3)[[1, 1, 0, 2]]
  guided = denoiser.classifier_free(spy, TEXT, NULL, scale, image=picture, image_scale=image_scale)
  found, fraction = guided(x, ALPHA, SIGMA)
  edited, shown, free = (denoise(x, ALPHA, SIGMA, told) for told in (TEXT, picture, NULL))
  wanted = free + image_scale * (shown - free) + scale * (edited - shown)
  np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
  np.testing.assert_array_equal(fraction, 2 * x)
  assert calls == [3 * len(x)]
  if scale != 1:
    both = denoiser.classifier_free(denoise, TEXT, NULL, scale, image=picture, image_scale=1)
    wanted = denoiser.classifier_free(denoise, TEXT, picture, scale)(x, ALPHA, SIGMA)
    np.testing.assert_allclose(both(x, ALPHA, SIGMA), wanted, rtol=1e-10, atol=1e-12)


def test_text_may_be_a_tree(x):
  two = lambda x, alpha, sigma, text: denoise(x, alpha, sigma, text['a'] + text['b'])
  halves = [{'a': 0.25 * text, 'b': 0.75 * text} for text in (TEXT, NULL)]
  found = denoiser.classifier_free(two, *halves, 2.0)(x, ALPHA, SIGMA)
  wanted = denoiser.classifier_free(denoise, TEXT, NULL, 2.0)(x, ALPHA, SIGMA)
  np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize(
  'scale,interval,wanted',
  [
    (1.0, None, {4: 5}),
    (1, (0.3, 2.0), {4: 5}),
    (2.0, None, {8: 5}),
    (2.0, (0.3, 2.0), {8: 2, 4: 3}),  # 0.3 is outside, 2.0 inside.
    (2.0, (0.3, np.inf), {8: 4, 4: 1}),
  ],
)
def test_calls_while_sampling(x, scale, interval, wanted):
  calls = []
  alphas = jnp.array([0.0, 0.2, 0.5, 0.8, 1.0])
  sigmas = jnp.array([1.0, 0.8, 1.0, 0.6, 0.3])

  def spy(x, alpha, sigma, text):
    jax.debug.callback(lambda: calls.append(len(x)))
    return denoise(x, alpha, sigma, text)

  guided = denoiser.classifier_free(spy, TEXT, NULL, scale, interval=interval)
  run = jax.jit(lambda x: jax.lax.scan(lambda x, p: (guided(x, *p), None), x, (alphas, sigmas))[0])
  run(x).block_until_ready()
  jax.effects_barrier()
  assert Counter(calls) == wanted


@pytest.mark.parametrize('alpha,sigma,inside', [(0.5, 1.0, True), (1.0, 0.3, False), (0, 1, False)])
def test_outside_the_interval_the_model_is_conditional(x, alpha, sigma, inside):
  guided = denoiser.classifier_free(denoise, TEXT, NULL, 3.0, interval=(0.3, 2.0))
  scale = 3.0 if inside else 1.0
  wanted = denoiser.classifier_free(denoise, TEXT, NULL, scale)(x, alpha, sigma)
  np.testing.assert_allclose(guided(x, alpha, sigma), wanted, rtol=1e-12)


def test_another_scale_rescale_or_interval_does_not_compile_again(x):
  traced = []

  @jax.jit
  def run(x, scale, rescale, interval):
    traced.append(1)
    options = {'rescale': rescale, 'interval': interval}
    return denoiser.classifier_free(denoise, TEXT, NULL, scale, **options)(x, ALPHA, SIGMA)

  for scale, rescale, high in ((2.0, 0.0, 5.0), (4.0, 0.7, 5.0), (1.0, 0.0, 0.1)):
    static = denoiser.classifier_free(
      denoise, TEXT, NULL, scale, rescale=rescale, interval=(0.0, high)
    )
    found = run(x, scale, rescale, (0.0, high))
    np.testing.assert_allclose(found, static(x, ALPHA, SIGMA), rtol=1e-12)
  assert len(traced) == 1


@pytest.mark.parametrize('space', denoiser.RESCALE_SPACES)
def test_rescale_is_lin_et_al_in_each_space(space):
  x, better, worse = images(0), images(1), images(2)
  guided = away_from(constant(worse), constant(better), 4.0, rescale=0.7, rescale_in=space)
  there, back = {
    'sample': (lambda x0: x0, lambda out: out),
    'epsilon': (lambda x0: (x - ALPHA * x0) / SIGMA, lambda out: (x - SIGMA * out) / ALPHA),
    'v_prediction': (
      lambda x0: ALPHA * (x - ALPHA * x0) / SIGMA - SIGMA * x0, lambda v: ALPHA * x - SIGMA * v
    ),
  }[space]
  positive, negative = np.asarray(there(better)), np.asarray(there(worse))
  out = negative + 4 * (positive - negative)
  std = lambda a: a.std(axis=(1, 2, 3), keepdims=True)
  out = 0.7 * out * std(positive) / std(out) + 0.3 * out
  np.testing.assert_allclose(guided(x, ALPHA, SIGMA), back(out), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('space', denoiser.RESCALE_SPACES)
@pytest.mark.parametrize('alpha,sigma', [(0.0, 1.0), (1.0, 0.0)])
def test_rescale_is_finite_at_both_ends(space, alpha, sigma):
  x, better, worse = images(0), images(1), images(2)

  def total(alpha, sigma, x):
    options = {'rescale': 0.7, 'rescale_in': space}
    guided = away_from(lambda x, a, s: worse, lambda x, a, s: better + x, 4.0, **options)
    return guided(x, alpha, sigma).sum()

  for value in (total(alpha, sigma, x), *jax.grad(total, (0, 1, 2))(alpha, sigma, x)):
    assert jnp.isfinite(value).all()
  flat = away_from(constant(0 * x), constant(0 * x), 4.0, rescale=0.7, rescale_in=space)
  assert jnp.isfinite(flat(0 * x, alpha, sigma)).all()


def test_extrapolating_x0_epsilon_or_v_is_the_same(x):
  own, every = conditional(x, ALPHA, SIGMA), unconditional(x, ALPHA, SIGMA)
  guided = denoiser.classifier_free(denoise, TEXT, NULL, 3.0)(x, ALPHA, SIGMA)
  eps = [(x - ALPHA * x0) / SIGMA for x0 in (every, own)]
  v = [ALPHA * e - SIGMA * x0 for e, x0 in zip(eps, (every, own), strict=True)]
  by_eps = (x - SIGMA * (eps[0] + 3 * (eps[1] - eps[0]))) / ALPHA
  by_v = ALPHA * x - SIGMA * (v[0] + 3 * (v[1] - v[0]))
  np.testing.assert_allclose(guided, by_eps, rtol=1e-10)
  np.testing.assert_allclose(guided, by_v, rtol=1e-10)


def test_others_are_left_behind_beside_the_null_caption(x):
  """Autoguidance and perturbed attention, each with a scale, and classifier-free guidance."""
  blurred = MIXTURE._replace(variances=MIXTURE.variances + 0.2).denoise
  good, bad, null = (d(x, ALPHA, SIGMA) for d in (conditional, blurred, unconditional))
  others = [(blurred, 2.0), (unconditional, 0.5)]
  alone = denoiser.classifier_free(denoise, TEXT, NULL, 1, others=others[:1])
  np.testing.assert_allclose(alone(x, ALPHA, SIGMA), good + 2 * (good - bad), rtol=1e-12)
  every = denoiser.classifier_free(denoise, TEXT, NULL, 3.0, others=others)
  wanted = null + 3 * (good - null) + 2 * (good - bad) + 0.5 * (good - null)
  np.testing.assert_allclose(every(x, ALPHA, SIGMA), wanted, rtol=1e-12)
  outside = denoiser.classifier_free(denoise, TEXT, NULL, 1, others=others, interval=(1.0, 2.0))
  np.testing.assert_allclose(outside(x, ALPHA, SIGMA), good, rtol=1e-12)


def test_dynamic_threshold_is_imagens():
  """clip(x_0, -s, s) / s with s from 1 to the limit, which wins where it is below 1."""
  x0 = images(3, spread=1.5).at[1].multiply(0.1)  # The second image lies within the range.
  flat = np.abs(np.asarray(x0)).reshape(3, -1)
  found = denoiser.dynamic_threshold(constant(x0), 0.95)(x0, ALPHA, SIGMA)
  s = np.maximum(np.percentile(flat, 95, axis=1), 1).reshape(3, 1, 1, 1)
  np.testing.assert_allclose(found, np.clip(x0, -s, s) / s, rtol=1e-12)
  np.testing.assert_allclose(found[1], x0[1], rtol=1e-12)
  assert (s[0] > 1.2).all() and np.abs(found).max() == 1
  for limit in (1.2, 0.5):  # Both are less than the percentile of the first image.
    found = denoiser.dynamic_threshold(constant(x0), 0.95, limit)(x0, ALPHA, SIGMA)
    np.testing.assert_allclose(found[0], np.clip(x0[0], -limit, limit) / limit, rtol=1e-12)
  np.testing.assert_allclose(found[1], np.clip(x0[1], -0.5, 0.5) / 0.5, rtol=1e-12)


def test_a_threshold_may_keep_the_estimate_beside_the_clipped_one():
  x0 = images(3, spread=1.5)
  for threshold in (denoiser.static_threshold, denoiser.dynamic_threshold):
    clipped, kept = threshold(constant(x0), 0.8, keep_estimate=True)(x0, ALPHA, SIGMA)
    np.testing.assert_array_equal(kept, x0)
    np.testing.assert_array_equal(clipped, threshold(constant(x0), 0.8)(x0, ALPHA, SIGMA))


def test_static_threshold_clips():
  x0 = images(3, spread=1.5)
  found = denoiser.static_threshold(constant(x0), 0.8)(x0, ALPHA, SIGMA)
  np.testing.assert_array_equal(found, np.clip(x0, -0.8, 0.8))
  assert (np.abs(x0) > 0.8).any()


def test_the_dtype_is_kept():
  text, null, scale = np.float32(TEXT), np.float32(NULL), np.float64(2)
  guided = denoiser.classifier_free(
    denoise, text, null, scale, rescale=jnp.float64(0.5), interval=(0.1, 9.0)
  )
  assert guided(jnp.ones((4, 2), jnp.float32), ALPHA, SIGMA).dtype == jnp.float32


def test_an_unknown_space_is_refused():
  with pytest.raises(UserError, match='v_prediction'):
    denoiser.classifier_free(denoise, TEXT, NULL, 2.0, rescale_in='velocity')


def test_a_network_sees_scaled_inputs_and_its_label():
  seen = []

  def network(x, label):
    seen.append((x, label))
    return jnp.zeros_like(x)

  x = jnp.full((2, 3), 4.0)
  alpha, sigma = jnp.ones(()), jnp.asarray(2.0)
  scaled = make_denoiser(network, Parameterization('edm', 0.5), noise_label)(x, alpha, sigma)
  plain = make_denoiser(network, Parameterization(), lambda a, s: 7 * s)(x, alpha, sigma)
  np.testing.assert_allclose(seen[0][0], 4 / np.sqrt(4.25))
  np.testing.assert_allclose(seen[0][1], [np.log(2) / 4] * 2)
  np.testing.assert_allclose(scaled, 0.25 / 4.25 * x)
  np.testing.assert_allclose(seen[1][0], x)
  np.testing.assert_allclose(seen[1][1], [14, 14])
  np.testing.assert_allclose(plain, x)
  assert np.isfinite(noise_label(jnp.zeros(()), jnp.ones(())))


def test_one_level_per_example():
  """alpha and sigma [b] mean the same as b calls."""
  network = lambda x, label: x * label[:, None] + 1
  denoise = make_denoiser(network, Parameterization('edm'), noise_label)
  x, alpha, sigma = jnp.ones((3, 2)), jnp.array([0.9, 0.6, 0.1]), jnp.array([0.4, 0.8, 0.99])
  together = denoise(x, alpha, sigma)
  alone = jnp.concatenate([denoise(x[i : i + 1], alpha[i], sigma[i]) for i in range(3)])
  np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_the_network_is_handed_the_timestep_of_a_table():
  noise = NoiseSchedule.of(ScheduleConfig())
  seen = []

  def network(x, t):
    seen.append(t)
    return jnp.zeros_like(x, jnp.bfloat16)

  alpha, sigma = noise.table(jnp.array(321))
  x = jnp.ones((2, 1, 1, 1))
  x0 = make_denoiser(network, Parameterization(), noise.label)(x, alpha, sigma)
  np.testing.assert_allclose(seen[0], [321, 321], atol=0.02)
  assert x0.dtype == x.dtype
  np.testing.assert_allclose(x0, x / alpha, rtol=1e-6)
