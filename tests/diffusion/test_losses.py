"""Losses and noise by hand, weightings and score matching against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import losses
from diffusion_jax.diffusion.losses import (
  WEIGHTINGS,
  add_noise,
  huber_delta,
  offset_noise,
  perturb_input,
  pseudo_huber,
  sliced_score_matching,
  squared_error,
  weight,
  weighted_loss,
  weighting,
)
from diffusion_jax.diffusion.parameterization import (
  BLIND_AT_ZERO_SNR,
  PREDICTIONS,
  Parameterization,
)
from diffusion_jax.errors import UserError
from tests.diffusion.quadrature import normal_nodes


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def test_the_forward_process_has_its_mean_and_variance():
  x0 = jnp.full((1, 40000), 1.5)
  alpha, sigma = jnp.array([0.8]), jnp.array([0.6])
  x = add_noise(x0, jax.random.normal(jax.random.key(0), x0.shape), alpha, sigma)
  np.testing.assert_allclose(x.mean(), 0.8 * 1.5, atol=4 * 0.6 / 200)
  np.testing.assert_allclose(x.std(), 0.6, rtol=4 / np.sqrt(80000))


def test_offset_noise_shares_one_offset_per_image_and_channel():
  noise = offset_noise(jax.random.key(0), (2000, 8, 8, 2), 0.5)
  np.testing.assert_allclose(noise.var(), 1.25, rtol=0.02)
  # The mean over 64 pixels keeps the offset (0.25) and 1/64 of the pixel noise.
  np.testing.assert_allclose(noise.mean(axis=(1, 2)).var(), 0.25 + 1 / 64, rtol=0.08)
  plain = offset_noise(jax.random.key(0), (2000, 8, 8, 2), 0.0)
  np.testing.assert_allclose(plain.mean(axis=(1, 2)).var(), 1 / 64, rtol=0.08)


def test_perturbed_inputs_have_more_noise_around_the_same_target():
  eps = jax.random.normal(jax.random.key(0), (1, 40000))
  seen = perturb_input(jax.random.key(1), eps, 0.5)
  np.testing.assert_allclose(seen.var(), 1.25, rtol=0.03)
  np.testing.assert_allclose((seen - eps).std(), 0.5, rtol=0.02)
  assert perturb_input(jax.random.key(1), eps, 0.0) is eps


def test_squared_error_is_per_example_and_at_least_float32():
  x = jnp.stack([jnp.zeros((2, 2, 1)), jnp.full((2, 2, 1), 3.0)])
  np.testing.assert_allclose(squared_error(x, jnp.ones_like(x)), [1.0, 4.0])
  assert squared_error(x, x).dtype == jnp.float64
  assert squared_error(x.astype(jnp.bfloat16), x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_pseudo_huber_is_the_square_of_small_and_the_size_of_large_errors():
  error = jnp.array([[1e-3], [3.0], [1e4]])
  zero = jnp.zeros_like(error)
  found = pseudo_huber(error, zero, 0.5)
  np.testing.assert_allclose(found[1], 2 * 0.5 * (np.sqrt(9.25) - 0.5), rtol=1e-12)
  np.testing.assert_allclose(found[0], 1e-6, rtol=1e-5)
  np.testing.assert_allclose(found[2], 1e4 - 0.5, rtol=1e-6)
  np.testing.assert_allclose(pseudo_huber(error, zero, 1e8), squared_error(error, zero), rtol=1e-6)
  per_example = pseudo_huber(jnp.full((2, 1), 3.0), jnp.zeros((2, 1)), jnp.array([0.5, 2.0]))
  np.testing.assert_allclose(per_example, [found[1], 4 * (np.sqrt(13) - 2)], rtol=1e-12)
  assert jax.grad(lambda e: pseudo_huber(e, zero, 0.5).sum())(zero)[0] == 0


def test_the_huber_schedule_falls_exponentially():
  np.testing.assert_allclose(huber_delta(jnp.array([0.0, 0.5, 1.0]), 0.01), [1, 0.1, 0.01])


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_the_weighted_loss_is_weight_times_error(prediction):
  rng = np.random.default_rng(0)
  x0, eps, output = map(jnp.asarray, rng.normal(size=(3, 2, 5)))
  alpha, sigma = jnp.array([0.9, 0.3]), jnp.array([0.4, 0.8])
  parameterization = Parameterization(prediction, 0.5)
  wanted = parameterization.target(x0, eps, alpha, sigma)
  simple = weighted_loss(parameterization, output, x0, eps, alpha, sigma)
  np.testing.assert_allclose(simple, ((output - wanted) ** 2).mean(1), rtol=1e-12)
  # Perfect but for one error in x_0 of 0.1: uniform weighting on x_0 sees just that.
  moved = parameterization.target(x0 + 0.1, eps - 0.1 * (alpha / sigma)[:, None], alpha, sigma)
  found = weighted_loss(parameterization, moved, x0, eps, alpha, sigma, weighting('uniform'))
  np.testing.assert_allclose(found, [0.01, 0.01], rtol=1e-10)
  huber = weighted_loss(
    parameterization, output, x0, eps, alpha, sigma,
    error=lambda a, b: pseudo_huber(a, b, 0.1),
  )
  np.testing.assert_allclose(huber, pseudo_huber(output, wanted, 0.1), rtol=1e-12)


@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize('name', [None, *WEIGHTINGS])
def test_zero_terminal_snr_has_finite_losses_and_gradients(prediction, name):
  """Float32, at alpha = 0 and, for all but the score, whose target is infinite, at sigma = 0."""
  last = 0.0 if prediction != 'score' else 1e-3
  alpha, sigma = jnp.array([0.0, 1.0], jnp.float32), jnp.array([1.0, last], jnp.float32)
  x0, eps = jnp.full((2, 3), 0.5, jnp.float32), jnp.full((2, 3), -0.7, jnp.float32)
  made = weighting(name) if name else None
  parameterization = Parameterization(prediction)
  loss = lambda output: weighted_loss(parameterization, output, x0, eps, alpha, sigma, made)
  value, slope = loss(x0), jax.grad(lambda output: loss(output).sum())(x0)
  assert value.shape == (2,) and value.dtype == jnp.float32
  assert np.isfinite(value).all() and np.isfinite(slope).all()
  exact = parameterization.target(x0, eps, alpha, sigma)
  np.testing.assert_array_equal(loss(exact), 0)


@pytest.mark.parametrize(
  'prediction,formula',
  [
    ('epsilon', lambda snr, g: np.minimum(snr, g) / snr),
    ('sample', lambda snr, g: np.minimum(snr, g)),
    ('v_prediction', lambda snr, g: np.minimum(snr, g) / (snr + 1)),
  ],
)
def test_min_snr_weights(prediction, formula):
  snr = np.array([1e-3, 0.5, 5.0, 7.0, 900.0])
  alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
  made = weighting('min_snr', gamma=5.0)
  found = weight(made, Parameterization(prediction), jnp.asarray(alpha), jnp.asarray(sigma))
  np.testing.assert_allclose(found, formula(snr, 5.0), rtol=1e-12)
  at_zero = weight(made, Parameterization(prediction), jnp.zeros(1), jnp.ones(1))
  limit = 1.0 if prediction in BLIND_AT_ZERO_SNR else 0.0
  np.testing.assert_allclose(at_zero, [limit], atol=1e-8)


def test_per_example_means():
  np.testing.assert_allclose(losses.per_example(jnp.arange(6.0).reshape(2, 3, 1)), [1, 4])


SNR = np.array([1e-4, 0.03, 0.5, 1.0, 4.0, 5.0, 7.0, 900.0])
SIGMA = 1 / np.sqrt(SNR)  # At alpha = 1.


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


# (weighting, options, prediction, formula in SNR). v is at alpha^2 + sigma^2 = 1.
FORMULAS = [
  ('uniform', {}, 'sample', lambda r: 1 + 0 * r),
  ('uniform', {}, 'epsilon', lambda r: 1 / r),
  ('uniform', {}, 'v_prediction', lambda r: 1 / (r + 1)),
  ('snr', {}, 'sample', lambda r: r),
  ('snr', {}, 'epsilon', lambda r: 1 + 0 * r),
  ('snr', {}, 'v_prediction', lambda r: r / (r + 1)),
  ('truncated_snr', {}, 'sample', lambda r: np.maximum(r, 1)),
  ('truncated_snr', {}, 'epsilon', lambda r: np.maximum(1, 1 / r)),
  ('truncated_snr', {}, 'v_prediction', lambda r: np.maximum(r, 1) / (r + 1)),
  ('snr_plus_one', {}, 'sample', lambda r: r + 1),
  ('snr_plus_one', {}, 'epsilon', lambda r: 1 + 1 / r),
  ('snr_plus_one', {}, 'v_prediction', lambda r: 1 + 0 * r),
  ('min_snr', {'gamma': 5.0}, 'sample', lambda r: np.minimum(r, 5)),
  ('min_snr', {'gamma': 5.0}, 'epsilon', lambda r: np.minimum(r, 5) / r),
  ('min_snr', {'gamma': 5.0}, 'v_prediction', lambda r: np.minimum(r, 5) / (r + 1)),
  ('soft_min_snr', {'gamma': 4.0}, 'sample', lambda r: 1 / (1 / r + 1 / 4)),
  ('soft_min_snr', {'gamma': 4.0}, 'epsilon', lambda r: 4 / (r + 4)),
  ('soft_min_snr', {'gamma': 4.0}, 'v_prediction', lambda r: 4 * r / ((r + 4) * (r + 1))),
  ('p2', {'gamma': 0.5, 'k': 2.0}, 'epsilon', lambda r: 1 / np.sqrt(2 + r)),
  ('p2', {}, 'epsilon', lambda r: 1 / (1 + r)),
  ('p2', {}, 'sample', lambda r: r / (1 + r)),
  ('p2', {}, 'v_prediction', lambda r: r / (1 + r) ** 2),
  ('sigmoid', {'bias': -1.0}, 'epsilon', lambda r: sigmoid(-1 - np.log(r))),
  ('sigmoid', {'bias': -1.0}, 'sample', lambda r: r * sigmoid(-1 - np.log(r))),
  ('sigmoid', {'bias': -1.0}, 'v_prediction', lambda r: r / (r + 1) * sigmoid(-1 - np.log(r))),
  ('debiased', {}, 'epsilon', lambda r: 1 / np.sqrt(r)),
  ('debiased', {}, 'sample', np.sqrt),
  ('debiased', {}, 'v_prediction', lambda r: np.sqrt(r) / (r + 1)),
  ('edm', {'data_std': 0.5}, 'sample', lambda r: (1 / r + 0.25) / (0.25 / r)),
  ('edm', {'data_std': 0.5}, 'epsilon', lambda r: (1 / r + 0.25) / 0.25),
  ('edm', {'data_std': 0.5}, 'v_prediction', lambda r: (r + 4) / (r + 1)),
]


@pytest.mark.parametrize('name,options,prediction,formula', FORMULAS)
def test_formulas_at_unit_variance(name, options, prediction, formula):
  alpha, sigma = np.sqrt(SNR / (1 + SNR)), np.sqrt(1 / (1 + SNR))
  found = weight(weighting(name, **options), Parameterization(prediction), alpha, sigma)
  np.testing.assert_allclose(found, formula(SNR), rtol=1e-12)


@pytest.mark.parametrize('name,options,prediction,formula', [
  # Karras et al. 2022, table 1: lambda(sigma) on D, and 1 on F.
  ('edm', {'data_std': 0.5}, 'sample', lambda s: (s**2 + 0.25) / (0.5 * s) ** 2),
  ('edm', {'data_std': 0.5}, 'edm', lambda s: 1 + 0 * s),
  # Soft min-SNR on F as k-diffusion writes it, gamma = 1 / data_std^2.
  ('soft_min_snr', {'gamma': 4.0}, 'edm', lambda s: (s * 0.5) ** 2 / (s**2 + 0.25) ** 2),
  # |score error|^2 counted by sigma^2, as NCSN does, is the simple loss on epsilon.
  ('snr', {}, 'score', lambda s: s**2),
  ('snr', {}, 'epsilon', lambda s: 1 + 0 * s),
])
def test_formulas_at_alpha_one(name, options, prediction, formula):
  found = weight(
    weighting(name, **options), Parameterization(prediction, 0.5), jnp.ones(8), jnp.asarray(SIGMA)
  )
  np.testing.assert_allclose(found, formula(SIGMA), rtol=1e-12)


def test_flow_velocity_weighs_one_over_the_squared_noise():
  """eps - x_0 on alpha = 1 - t, sigma = t: an error e in it is t e in x_0."""
  t = np.linspace(0.05, 0.95, 7)
  found = weight(weighting('uniform'), Parameterization('flow_prediction'), 1 - t, t)
  np.testing.assert_allclose(found, t**2, rtol=1e-12)


@pytest.mark.parametrize('name', WEIGHTINGS)
@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_the_same_error_costs_the_same_in_every_parameterisation(name, prediction):
  """A weighting is a choice about noise levels: converting the output must not change the loss."""
  alpha, sigma = jnp.array([0.95, 0.5, 0.05]), jnp.array([0.2, 0.7, 1.3])
  x, x0, guess = jnp.ones((3, 1)), jnp.full((3, 1), 0.3), jnp.full((3, 1), 0.9)
  as_other = lambda v: Parameterization('sample').convert(prediction, v, x, alpha, sigma)
  error = (as_other(guess) - as_other(x0))[:, 0] ** 2
  made = weighting(name)
  found = weight(made, Parameterization(prediction), alpha, sigma) * error
  np.testing.assert_allclose(found, made((alpha / sigma) ** 2) * 0.36, rtol=1e-11)


@pytest.mark.parametrize('name', WEIGHTINGS)
@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_both_ends_are_finite_with_finite_gradients_in_float32(name, prediction):
  ends = jnp.array([0.0, 1.0], jnp.float32), jnp.array([1.0, 0.0], jnp.float32)
  made = Parameterization(prediction)
  total = lambda alpha, sigma: weight(weighting(name), made, alpha, sigma).sum()
  value, slopes = jax.value_and_grad(total, (0, 1))(*ends)
  assert value.dtype == jnp.float32
  assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)
  assert (weight(weighting(name), Parameterization(prediction), *ends) >= 0).all()


@pytest.mark.parametrize('name,prediction,wanted', [
  ('min_snr', 'epsilon', 1.0), ('min_snr', 'v_prediction', 0.0), ('min_snr', 'sample', 0.0),
  ('soft_min_snr', 'epsilon', 1.0), ('sigmoid', 'epsilon', 1.0), ('p2', 'epsilon', 1.0),
  ('snr', 'v_prediction', 0.0), ('snr_plus_one', 'v_prediction', 1.0),
  ('truncated_snr', 'v_prediction', 1.0), ('edm', 'v_prediction', 4.0),
])
def test_limits_at_zero_terminal_snr(name, prediction, wanted):
  found = weight(weighting(name), Parameterization(prediction), jnp.zeros(1), jnp.ones(1))
  np.testing.assert_allclose(found, [wanted], atol=2e-8)


def test_unknown_names_are_refused():
  with pytest.raises(UserError, match='min_snr'):
    weighting('max_snr')


VARIANCE = 1.6


def sliced(k):
  """E of the sliced loss of the score -k x on N(0, VARIANCE) data, by quadrature."""
  x, v, weights = normal_nodes(np.sqrt(VARIANCE), 1.0)
  return weights @ sliced_score_matching(lambda x: -k * x, x, v)


def test_the_sliced_loss_is_minimised_by_the_score():
  """It is k^2 variance / 2 - k."""
  for k in (0.0, 0.3, 1 / VARIANCE, 2.0):
    closed = k**2 * VARIANCE / 2 - k
    np.testing.assert_allclose(sliced(k), closed, rtol=1e-12, atol=1e-12)
  slope = jax.grad(lambda k: sliced(k))(1 / VARIANCE)
  np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_slices_along_all_axes_give_the_trace():
  """E over v: the unit vectors times sqrt(d) give tr(ds/dx) + |s|^2 / 2 of a nonlinear score."""
  score = lambda x: jnp.stack([jnp.sin(x[:, 0] * x[:, 1]), x[:, 0] ** 2 - x[:, 1] ** 3], 1)
  x = jnp.array([[0.4, -1.1]])
  directions = jnp.sqrt(2.0) * jnp.eye(2)
  twice = jnp.repeat(x, 2, 0)
  wanted = 0.4 * 0 + np.cos(0.4 * -1.1) * -1.1 - 3 * 1.1**2 + (score(x) ** 2).sum() / 2
  np.testing.assert_allclose(
    sliced_score_matching(score, twice, directions).mean(), wanted, rtol=1e-12
  )


def test_values_are_per_example():
  ones = jnp.ones((3, 2, 2))
  assert sliced_score_matching(lambda x: -x, ones, ones).shape == (3,)
