"""Parameterisations: every conversion and back, at the ends too."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.parameterization import (
  BLIND_AT_ZERO_SNR,
  PREDICTIONS,
  Parameterization,
  clamp_log_snr,
  noise_label,
)
from diffusion_jax.errors import UserError

STD = 0.5
LEVELS = [
  *((np.cos(angle), np.sin(angle)) for angle in (0.02, 0.3, np.pi / 4, 1.2, 1.55)),  # VP
  *((1.0, sigma) for sigma in (0.05, 1.0, 20.0)),  # VE
  *((1 - t, t) for t in (0.001, 0.03, 0.5, 0.97, 0.999)),  # flow
]
NO_SIGNAL, NO_NOISE = (0.0, 1.0), (1.0, 0.0)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draws(levels):
  rng = np.random.default_rng(0)
  x0, eps = rng.normal(size=(2, len(levels), 3, 2))
  alpha, sigma = np.array(levels).T
  x = alpha[:, None, None] * x0 + sigma[:, None, None] * eps
  return tuple(map(jnp.asarray, (x0, eps, x, alpha, sigma)))


@pytest.mark.parametrize('source,wanted', [*itertools.product(PREDICTIONS, PREDICTIONS)])
def test_every_conversion_and_back(source, wanted):
  """To the definition of the other, and back to the first, over VP, VE and flow levels."""
  x0, eps, x, alpha, sigma = draws(LEVELS)
  given = Parameterization(source, STD).target(x0, eps, alpha, sigma)
  other = Parameterization(source, STD).convert(wanted, given, x, alpha, sigma)
  scale = lambda values: np.abs(values).max(axis=(1, 2), keepdims=True)
  exact = Parameterization(wanted, STD).target(x0, eps, alpha, sigma)
  assert (np.abs(other - exact) / scale(exact) < 1e-12).all()
  back = Parameterization(wanted, STD).convert(source, other, x, alpha, sigma)
  assert (np.abs(back - given) / scale(given) < 1e-12).all()


@pytest.mark.parametrize('source', PREDICTIONS)
def test_conversions_at_the_ends(source):
  """Whatever a prediction determines at alpha = 0 or sigma = 0 comes out exactly."""
  blind = lambda name, level: name in (BLIND_AT_ZERO_SNR if level == NO_SIGNAL else ('sample',))
  for level in (NO_SIGNAL, NO_NOISE):
    x0, eps, x, alpha, sigma = draws([level])
    given = Parameterization(source, STD).target(x0, eps, alpha, sigma)
    if level == NO_NOISE and source in ('score', 'edm'):
      # Neither tells eps at sigma = 0: the score is infinite, F is -eps data_std.
      found = Parameterization(source, STD).to_x0(jnp.ones_like(x), x, alpha, sigma)
      np.testing.assert_allclose(found, x0)
      if source == 'score':
        continue
    if not blind(source, level):
      for wanted in PREDICTIONS:
        if wanted == 'score' and level == NO_NOISE:
          continue
        found = Parameterization(source, STD).convert(wanted, given, x, alpha, sigma)
        exact = Parameterization(wanted, STD).target(x0, eps, alpha, sigma)
        np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-14)
    else:
      known = 1 if level == NO_SIGNAL else 0
      found = Parameterization(source, STD).to_pair(given, x, alpha, sigma)[known]
      np.testing.assert_allclose(found, (x0, eps)[known], rtol=1e-12)
      same = Parameterization(source, STD).convert(source, given, x, alpha, sigma)
      np.testing.assert_allclose(same, given)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_all_ends_are_finite_with_finite_gradients_in_float32(prediction):
  for level in (NO_SIGNAL, NO_NOISE, (1e-3, 1.0), (1.0, 1e-3)):
    x0, eps, x, alpha, sigma = (v.astype(jnp.float32) for v in draws([level]))

    def everything(output, x0, alpha, sigma, eps=eps, x=x):
      pair = Parameterization(prediction).to_pair(output, x, alpha, sigma)
      wanted = Parameterization(prediction).target(x0, eps, alpha, sigma)
      return sum(v.sum() for v in (*pair, wanted, Parameterization(prediction).gain(alpha, sigma)))

    value, slopes = jax.value_and_grad(everything, (0, 1, 2, 3))(x0 / 2, x0, alpha, sigma)
    assert value.dtype == jnp.float32
    assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)


def test_targets_by_hand():
  """x_0 = 2, eps = 3, alpha = .8, sigma = .6: x = 3.4."""
  found = {
    name: Parameterization(name, STD).target(2.0 * jnp.ones(1), 3.0 * jnp.ones(1), 0.8, 0.6)[0]
    for name in PREDICTIONS
  }
  spread = np.sqrt(0.16 + 0.36)
  skip, out = 0.8 * 0.25 / spread**2, 0.6 * 0.5 / spread
  assert found == pytest.approx({
    'epsilon': 3, 'sample': 2, 'v_prediction': 0.8 * 3 - 0.6 * 2, 'score': -3 / 0.6,
    'edm': (2 - skip * 3.4) / out, 'flow_prediction': 1,
  })


def test_the_score_is_the_gradient_of_the_kernel():
  log_q = lambda x: -((x - 0.8 * 2) ** 2) / (2 * 0.36)
  wanted = jax.grad(log_q)(0.8 * 2 + 0.6 * 3)
  found = Parameterization('score').target(jnp.array([[2.0]]), jnp.array([[3.0]]), 0.8, 0.6)
  np.testing.assert_allclose(found[0, 0], wanted, rtol=1e-12)


@pytest.mark.parametrize('sigma', [0.002, 0.5, 80.0])
def test_preconditioning_is_karras_table_1(sigma):
  edm, level = Parameterization('edm', STD), (jnp.ones(()), jnp.asarray(sigma))
  total, zero, one = sigma**2 + STD**2, jnp.zeros((1, 1)), jnp.ones((1, 1))
  skip, out = edm.to_x0(zero, one, *level), edm.to_x0(one, zero, *level)
  np.testing.assert_allclose(skip, [[STD**2 / total]], rtol=1e-12)
  np.testing.assert_allclose(out, [[sigma * STD / np.sqrt(total)]], rtol=1e-12)
  np.testing.assert_allclose(edm.scale_input(one, *level), [[1 / np.sqrt(total)]], rtol=1e-12)
  np.testing.assert_allclose(noise_label(*level), np.log(sigma) / 4, rtol=1e-12)


@pytest.mark.parametrize('level', LEVELS)
def test_edm_keeps_unit_variances(level):
  """Input and target of F have variance 1 for data of that spread."""
  alpha, sigma = map(jnp.asarray, level)
  edm, zero, one = Parameterization('edm', STD), jnp.zeros((1, 1)), jnp.ones((1, 1))
  scale = edm.scale_input(one, alpha, sigma)
  np.testing.assert_allclose(scale**2 * ((alpha * STD) ** 2 + sigma**2), 1, rtol=1e-12)
  of_x0, of_eps = edm.target(one, zero, alpha, sigma), edm.target(zero, one, alpha, sigma)
  np.testing.assert_allclose(of_x0**2 * STD**2 + of_eps**2, 1, rtol=1e-12)


def test_edm_on_unit_data_with_unit_variance_is_minus_v():
  x0, eps, _, alpha, sigma = draws(LEVELS[:5])
  edm = Parameterization('edm').target(x0, eps, alpha, sigma)
  v = Parameterization('v_prediction').target(x0, eps, alpha, sigma)
  np.testing.assert_allclose(edm, -v, rtol=1e-12)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_gain_is_the_derivative_of_x0(prediction):
  for level in LEVELS:
    alpha, sigma = map(jnp.asarray, level)
    made = Parameterization(prediction, STD)
    one = lambda y, a=alpha, s=sigma, p=made: p.to_x0(y[None], jnp.array([0.7]), a, s)[0]
    found = made.gain(alpha, sigma)
    np.testing.assert_allclose(found, jax.grad(one)(jnp.asarray(0.2)), rtol=1e-11)


def test_log_snr_is_clamped_at_20():
  for level, wanted in ((NO_SIGNAL, -20), (NO_NOISE, 20), ((0.6, 0.8), 2 * np.log(0.75))):
    alpha, sigma = clamp_log_snr(*map(jnp.asarray, level))
    np.testing.assert_allclose(2 * jnp.log(alpha / sigma), wanted, rtol=1e-12)


def test_unknown_predictions_are_refused():
  with pytest.raises(UserError, match='epsilon'):
    Parameterization('noise')
