"""Every weighting against its published formula, on the predictions for which it is published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.losses import WEIGHTINGS, weight, weighting
from diffusion_jax.diffusion.parameterization import PREDICTIONS, Parameterization
from diffusion_jax.errors import UserError

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
