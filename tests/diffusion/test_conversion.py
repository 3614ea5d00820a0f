"""Networks of one prediction and process as models of another, against the formulas by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import losses
from diffusion_jax.diffusion.conversion import Converted, converted
from diffusion_jax.diffusion.denoiser import make_denoiser
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.objective import Objective, ObjectiveConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import sampler
from diffusion_jax.formats.networks import format_of
from diffusion_jax.types import Condition
from tests import tiny_pipeline

VP = NoiseConfig()
ZERO_SNR = NoiseConfig(rescale_betas_zero_snr=True)
FLOW = NoiseConfig(process='flow', label='sigma')
FLOW_TABLE = NoiseConfig(beta_schedule='flow', shift=3.0, label='sigma')
NAMES = ('epsilon', 'v_prediction', 'sample', 'flow_prediction')
# The terms of training: what says nothing at zero terminal SNR is not trained there.
TERMS = [
  *itertools.product(NAMES, (VP,)), *itertools.product(NAMES[1:], (ZERO_SNR, FLOW, FLOW_TABLE))
]
SHAPE = (48, 8, 8, 4)


@pytest.fixture(scope='module')
def network():
  """A U-Net of random weights under one text for all: (x [b h w c], t [b]) -> output."""
  config = tiny_pipeline.SD['unet']
  made, params = format_of(config).network(config), tiny_pipeline.random_params(config)
  text = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 8)), jnp.float32)
  plain = lambda params, x, t: made.bind(params)(
    x, t, Condition(jnp.broadcast_to(text, (len(x), 5, 8)))
  )
  call = jax.jit(plain)
  return lambda x, t: call(params, x, t.astype(jnp.float32))


def in_terms(own, wanted):
  """The parameterization of a network of the terms `own`, as a model of the terms `wanted`."""
  return converted(Parameterization(own[0]), own[1], *wanted)


def asked(config, alpha, sigma):
  """What a network is asked: (alpha, sigma, time, end) of its own levels, float64 [b]."""
  alphas, sigmas = NoiseSchedule.of(config).levels(2)
  with np.errstate(divide='ignore'):
    ratio, first, last = sigma / alpha, sigmas[0] / alphas[0], sigmas[-1] / alphas[-1]
  end = (ratio > last).astype(int) - (ratio < first)
  ratio = np.clip(ratio, first, last)
  angle = np.arctan(ratio)
  a, s = np.cos(angle), np.sin(angle)
  if config in (FLOW, FLOW_TABLE):
    return a / (a + s), s / (a + s), 1000 * s / (a + s), end
  with np.errstate(divide='ignore'):
    time = np.interp(np.log(ratio), np.log(sigmas / alphas), np.arange(1000))
  if config is ZERO_SNR:
    angles = np.arctan2(sigmas, alphas)
    time = np.where(angle > angles[-2], np.interp(angle, angles, np.arange(1000)), time)
  return a, s, time, end


def answer(network, own, x, alpha, sigma):
  """(x_0, eps), float64, by the formulas of each prediction."""
  a, s, time, end = asked(own[1], alpha, sigma)
  wide = lambda values: values[:, None, None, None]
  seen = wide(np.hypot(a, s) / np.hypot(alpha, sigma)) * x
  y = np.asarray(network(jnp.asarray(seen, jnp.float32), jnp.asarray(time)), np.float64)
  a, s, end, alpha, sigma = map(wide, (a, s, end, alpha, sigma))
  x0, eps = {
    'epsilon': lambda: ((seen - s * y) / np.maximum(a, 1e-9), y),
    'sample': lambda: (y, (seen - a * y) / s),
    'v_prediction': lambda: (
      (a * seen - s * y) / (a**2 + s**2), (s * seen + a * y) / (a**2 + s**2)
    ),
    'flow_prediction': lambda: ((seen - s * y) / (a + s), (seen + a * y) / (a + s)),
  }[own[0]]()
  x0, eps = (
    np.where(end < 0, (x - sigma * eps) / np.maximum(alpha, 1e-9), x0),
    np.where(end > 0, (x - alpha * x0) / sigma, eps),
  )
  return x0, eps


def predicted(name, x0, eps, alpha, sigma):
  alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
  return {
    'epsilon': eps, 'sample': x0, 'v_prediction': alpha * eps - sigma * x0,
    'flow_prediction': eps - x0,
  }[name]


def test_the_loss_is_that_of_the_old_network_by_hand(network):
  x0 = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  ends = set()
  for number, (own, wanted) in enumerate(itertools.product(TERMS, TERMS)):
    if own == wanted or (number % 3 and own[0] != 'epsilon'):  # Each of the latter, a third of all.
      continue
    key = jax.random.key(number)
    objective = Objective(
      ObjectiveConfig(wanted[0], stratified=True), NoiseSchedule.of(wanted[1]),
      in_terms(own, wanted),
    )
    found = objective.losses(network, jnp.asarray(x0), key)
    alpha, sigma = (np.asarray(part, np.float64) for part in found.level[:2])
    eps = np.asarray(losses.offset_noise(jax.random.split(key, 4)[1], SHAPE, 0.0))
    x = np.asarray(losses.add_noise(x0, eps, *found.level[:2]), np.float64)
    said = predicted(wanted[0], *answer(network, own, x, alpha, sigma), alpha, sigma)
    true = predicted(wanted[0], x0, eps, alpha, sigma)
    loss = ((said - true) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(found.loss, loss, rtol=2e-3, err_msg=f'{own} {wanted}')
    np.testing.assert_allclose(np.mean(found.loss), loss.mean(), rtol=1e-4)
    ends |= set(asked(own[1], alpha, sigma)[3])
  assert ends == {-1, 0, 1}


def test_at_no_signal_the_estimate_is_that_of_the_last_known_level(network):
  own = Parameterization('epsilon'), VP
  model = in_terms(('epsilon', VP), ('v_prediction', ZERO_SNR))
  x = jax.random.normal(jax.random.key(0), (2, *SHAPE[1:]))
  nothing = jnp.zeros(2), jnp.ones(2)
  v = model.predict(network, x, *nothing, jnp.full(2, 999))
  alphas, sigmas = own[1].table()
  eps = network(x, jnp.full(2, 999.0))
  np.testing.assert_allclose(v, -(x - sigmas[-1] * eps) / alphas[-1], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(model.to_x0(v, x, *nothing), -v, rtol=1e-6)
  # The network is still trained there: v moves by sigma / alpha with what it says.
  slope = jax.grad(
    lambda shift: model.predict(lambda x, t: network(x, t) + shift, x, *nothing, None).mean()
  )(0.0)
  np.testing.assert_allclose(slope, sigmas[-1] / alphas[-1], rtol=1e-4)


@pytest.mark.parametrize('wanted', [('v_prediction', VP), ('flow_prediction', FLOW)])
def test_samples_follow_the_same_path(network, wanted):
  """DDIM's on the old levels, and Euler's at the same ratios, and at many others between."""
  old = Parameterization('epsilon')
  noise, mild = NoiseSchedule.of(VP), lambda x, t: 0.3 * network(x, t) + 0.9 * x
  new, new_noise = in_terms(('epsilon', VP), wanted), NoiseSchedule.of(wanted[1])
  x = jax.random.normal(jax.random.key(1), (2, *SHAPE[1:]))
  keys = jax.random.split(jax.random.key(0), 2)
  scale = lambda a, s: (a + s if wanted[1] is FLOW else np.hypot(a, s))

  def drawn(parameterization, noise, times, name, start):
    ratio = np.exp(np.interp(times, np.arange(1000), np.log(VP.table()[1] / VP.table()[0])))
    a, s = 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
    a, s = (part / (1 if parameterization is old else scale(a, s)) for part in (a, s))
    grid = tuple(np.append(part, end).astype(np.float32) for part, end in ((a, 1), (s, 0)))
    denoise = make_denoiser(mild, parameterization, noise.label)
    return np.asarray(sampler(name)(denoise, start * np.hypot(a[0], s[0]), grid, keys))

  few, many = np.linspace(999, 0, 12), np.linspace(999, 0, 150)
  coarse = drawn(old, noise, few, 'ddim', x)
  np.testing.assert_allclose(drawn(new, new_noise, few, 'euler', x), coarse, rtol=0, atol=2e-3)
  uneven = many**1.5 / 999**0.5
  fine = [drawn(old, noise, many, 'ddim', x), drawn(new, new_noise, uneven, 'euler', x)]
  error, spread = np.abs(fine[0] - fine[1]).max(), np.abs(fine[0] - coarse).max()
  assert error < 0.2 * spread and error < 0.05 * np.abs(fine[0]).max()


def test_conversions_do_not_add_up():
  once = in_terms(('epsilon', VP), ('v_prediction', ZERO_SNR))
  again = converted(once, ZERO_SNR, 'flow_prediction', FLOW)
  assert again == in_terms(('epsilon', VP), ('flow_prediction', FLOW))
  assert converted(again, FLOW, 'epsilon', VP) == Parameterization('epsilon')
  same = converted(once, ZERO_SNR, 'v_prediction', VP)
  assert same == Converted('v_prediction', own=Parameterization('epsilon'))
  assert converted(same, VP, 'sample', ZERO_SNR).levels == VP


def test_a_learned_variance_is_left_as_it_is():
  both = lambda x, t: jnp.concatenate([0.5 * x, 7 + 0 * x], -1)
  x, level = jnp.ones((2, 1, 1, 3)), (jnp.full(2, 0.6), jnp.full(2, 0.8))
  out = in_terms(('epsilon', VP), ('sample', VP)).predict(both, x, *level, jnp.zeros(2))
  np.testing.assert_allclose(out[..., 3:], 7)
  np.testing.assert_allclose(out[..., :3], (1 - 0.8 * 0.5) / 0.6, rtol=1e-6)
