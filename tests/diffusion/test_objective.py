"""Training losses against closed forms on Gaussian data; times against their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from diffusion_jax.config import typed
from diffusion_jax.diffusion import losses, objective, processes
from diffusion_jax.diffusion.bounds import bits_per_dim, prior_term
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule, ScheduleConfig
from diffusion_jax.diffusion.objective import (
  LossHistory,
  Objective,
  ObjectiveConfig,
  update_history,
)
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError

U = np.linspace(0.001, 0.999, 101)


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.usefixtures('float64')
def test_stratified_times_are_evenly_spaced_on_the_circle():
  for seed in range(3):
    u = np.sort(objective.uniform(jax.random.key(seed), 7, stratified=True))
    gaps = np.diff(np.append(u, u[0] + 1))
    np.testing.assert_allclose(gaps, 1 / 7, rtol=1e-12)
    assert 0 <= u[0] < u[-1] < 1
  first = [objective.uniform(jax.random.key(seed), 7, stratified=True)[0] for seed in range(400)]
  assert stats.kstest(first, 'uniform').pvalue > 0.01


@pytest.mark.usefixtures('float64')
def test_uniform_times_are_independent():
  u = objective.uniform(jax.random.key(0), 2000)
  assert stats.kstest(np.asarray(u), 'uniform').pvalue > 0.01
  assert np.diff(np.sort(u)).max() > 2 / 2000  # Not stratified.


@pytest.mark.usefixtures('float64')
def test_logit_normal_has_its_distribution():
  for mean, std in ((0.0, 1.0), (-0.6, 1.4)):
    t = np.asarray(objective.QUANTILES['logit_normal'](jnp.asarray(U), mean, std))
    np.testing.assert_allclose(stats.norm.cdf((np.log(t / (1 - t)) - mean) / std), U, rtol=1e-9)


@pytest.mark.usefixtures('float64')
def test_log_normal_has_its_distribution():
  sigma = np.asarray(objective.QUANTILES['log_normal'](jnp.asarray(U)))
  np.testing.assert_allclose(stats.norm.cdf((np.log(sigma) + 1.2) / 1.2), U, rtol=1e-9)
  median = objective.QUANTILES['log_normal'](jnp.asarray(0.5))
  np.testing.assert_allclose(median, np.exp(-1.2), rtol=1e-12)


@pytest.mark.parametrize('scale', [-1.0, 0.0, 0.81, 1.29, 1.75])
@pytest.mark.usefixtures('float64')
def test_mode_has_its_distribution(scale):
  """t = f(u') of a uniform u' (Esser et al. 2024, eq. 20), f falling, so that t grows with u."""
  f = lambda u: 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
  t = objective.mode(jnp.asarray(U), scale)
  np.testing.assert_allclose(t, f(1 - U), rtol=1e-12, atol=1e-15)
  assert (np.diff(t) > 0).all()
  density = lambda u: 1 / jax.grad(lambda u: objective.mode(u, scale))(jnp.asarray(u))
  if scale > -1:
    np.testing.assert_allclose(density(0.5), 1 / (1 - scale * (np.pi / 2 - 1)), rtol=1e-9)
    np.testing.assert_allclose(density(0.0), 1 / (1 + scale), rtol=1e-9)


@pytest.mark.parametrize('quantile', objective.QUANTILES.values(), ids=objective.QUANTILES)
@pytest.mark.usefixtures('float64')
def test_both_ends_are_finite(quantile):
  for dtype in (jnp.float32, jnp.float64):
    found = quantile(jnp.array([0.0, 1.0], dtype))
    assert found.dtype == dtype and np.isfinite(found).all()


@pytest.mark.usefixtures('float64')
def test_times_become_timesteps():
  u = jnp.array([0.0, 0.0999, 0.1, 0.999999, 1.0])
  timestep = lambda u: NoiseSchedule.of(ScheduleConfig(num_train_timesteps=10)).at(u).label
  np.testing.assert_array_equal(timestep(u), [0, 0, 1, 9, 9])
  spread = timestep(objective.uniform(jax.random.key(3), 50, stratified=True))
  np.testing.assert_array_equal(np.bincount(spread), [5] * 10)


@pytest.mark.usefixtures('float64')
def test_history_keeps_the_last_losses_of_each_timestep():
  history = objective.init_history(3, 2)
  update = jax.jit(objective.update_history)
  history = update(history, jnp.array([1, 1, 2]), jnp.array([5.0, 6.0, 7.0]))
  np.testing.assert_array_equal(history.losses, [[0, 0], [5, 6], [7, 0]])
  np.testing.assert_array_equal(history.count, [0, 2, 1])
  history = update(history, jnp.array([1, 0, 1]), jnp.array([8.0, 1.0, 9.0]))
  np.testing.assert_array_equal(history.losses, [[1, 0], [8, 9], [7, 0]])
  np.testing.assert_array_equal(history.count, [1, 2, 1])


@pytest.mark.usefixtures('float64')
def test_importance_is_the_root_mean_square_loss_once_the_history_is_full():
  losses = jnp.array([[3.0, 4.0], [0.0, 0.0], [1.0, 7.0]])
  root = np.sqrt([12.5, 0, 25])
  found = objective.importance(LossHistory(losses, jnp.array([2, 2, 2])), 0.01)
  np.testing.assert_allclose(found, 0.99 * root / root.sum() + 0.01 / 3, rtol=1e-12)
  np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
  early = objective.importance(LossHistory(losses, jnp.array([2, 2, 1])), 0.01)
  np.testing.assert_allclose(early, 1 / 3, rtol=1e-12)
  no_loss = objective.importance(LossHistory(0 * losses, jnp.array([2, 2, 2])), 0.01)
  np.testing.assert_allclose(no_loss, 1 / 3, rtol=1e-12)


@pytest.mark.usefixtures('float64')
def test_importance_sampling_is_unbiased():
  """Over a fine grid of u, timesteps come in their shares, and weights restore the plain mean."""
  probability, loss = jnp.array([0.1, 0.45, 0.05, 0.4]), jnp.array([3.0, -1.0, 10.0, 0.5])
  t, weight = objective.by_importance((jnp.arange(1000) + 0.5) / 1000, probability)
  np.testing.assert_array_equal(np.bincount(t), [100, 450, 50, 400])
  np.testing.assert_allclose((weight * loss[t]).mean(), loss.mean(), rtol=1e-12)
  ends, _ = objective.by_importance(jnp.array([0.0, 1.0]), probability)
  np.testing.assert_array_equal(ends, [0, 3])


STD = 0.7
TABLE = NoiseSchedule.of(ScheduleConfig(
  beta_schedule='linear', beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=False
))
KARRAS = NoiseSchedule(processes.karras())
N = 4096


def _data(n=N):
  return STD * jax.random.normal(jax.random.key(5), (n, 1, 1, 2))


def _exact(prediction, levels, data_std=1.0, scaled=False):
  """network(x, label): the best output for data N(0, STD^2), found from the label alone."""

  def network(x, label):
    if levels.table is not None:
      alpha, sigma = levels.table(label.astype(int))
    else:
      alpha, sigma = jnp.ones_like(label), jnp.exp(4 * label)
    alpha, sigma = (part[:, None, None, None] for part in (alpha, sigma))
    if scaled:
      x = x * jnp.sqrt((alpha * data_std) ** 2 + sigma**2)
    x0 = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x
    return Parameterization('sample', data_std).convert(prediction, x0, x, alpha, sigma)

  return network


def _run(config, levels, network, history=None, n=N):
  objective = Objective(config, levels)
  return jax.jit(lambda: objective.losses(network, _data(n), jax.random.key(1), history))()


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'score'])
def test_the_loss_of_the_best_network_is_the_posterior_variance(prediction):
  """E|error|^2 of x_0 is the conditional variance, and of each prediction that times gain^2."""
  config = ObjectiveConfig(prediction=prediction, weighting='uniform')
  out = _run(config, TABLE, _exact(prediction, TABLE))
  variance = STD**2 * out.level.sigma**2 / (out.level.alpha**2 * STD**2 + out.level.sigma**2)
  # Two dimensions an example: the mean of |e|^2 / variance has deviation 1 / sqrt(N).
  assert float((out.loss / variance).mean()) == pytest.approx(1, abs=4 / N**0.5)


def test_edm_sees_scaled_inputs_and_has_unit_weight():
  """Karras et al. 2022, table 1: with their weight, F's own error is unweighted."""
  config = ObjectiveConfig(
    prediction='edm', weighting='edm', weighting_options={'data_std': STD}, times='log_normal',
    data_std=STD,
  )
  seen = []
  exact = _exact('edm', KARRAS, STD, scaled=True)
  network = lambda x, label: (seen.append((x, label)), exact(x, label))[1]
  run = lambda: (Objective(config, KARRAS).losses(network, _data(), jax.random.key(1)), seen)
  out, seen = jax.jit(run)()
  np.testing.assert_allclose(out.loss, out.error, rtol=1e-4)
  # The best D is c_skip x: F is 0, and its target has unit variance at every noise level.
  assert float(out.loss.mean()) == pytest.approx(1, abs=5 / N**0.5)
  (x, label), = seen
  assert float(x.std()) == pytest.approx(1, abs=0.03)
  log_sigma = np.log(np.asarray(out.level.sigma))
  assert log_sigma.mean() == pytest.approx(-1.2, abs=0.1)
  assert log_sigma.std() == pytest.approx(1.2, abs=0.1)
  np.testing.assert_allclose(label, log_sigma / 4, atol=1e-4)


@pytest.mark.parametrize('levels', [TABLE, KARRAS], ids=['table', 'process'])
def test_a_level_is_found_by_its_ratio(levels):
  ratio = jnp.asarray([0.05, 0.5, 3.0, 60.0])
  level = levels.at_ratio(ratio)
  near = 0.02 if levels is TABLE else 1e-4
  np.testing.assert_allclose(level.sigma / level.alpha, ratio, rtol=near)
  np.testing.assert_allclose(levels.label(level.alpha, level.sigma), level.label, rtol=1e-3)


def test_the_bound_is_the_sum_of_its_closed_forms():
  """Each term of Ho et al. 2020, eq. 5 for the best network on N(0, STD^2)."""
  betas = {'beta_schedule': 'linear', 'beta_start': 0.02, 'beta_end': 0.6}
  levels = NoiseSchedule.of(ScheduleConfig(**betas, num_train_timesteps=12))
  config = ObjectiveConfig(loss='bound', stratified=True, prediction='sample')
  out = _run(config, levels, _exact('sample', levels), n=10 * N)
  alpha, sigma = levels.table.alphas, levels.table.sigmas
  left = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # Of x_0 given x.
  prior = (alpha[-1] ** 2 * STD**2 + sigma[-1] ** 2 - 1 - 2 * np.log(sigma[-1])) / 2
  added = sigma[1:] ** 2 - (alpha[1:] / alpha[:-1] * sigma[:-1]) ** 2
  variance = added * (sigma[:-1] / sigma[1:]) ** 2
  divergence = (alpha[:-1] * added / sigma[1:] ** 2) ** 2 * left[1:] / variance / 2
  # The decoder has no posterior variance: it takes that of the step before.
  decoder = (np.log(2 * np.pi * variance[0]) + left[0] / variance[0]) / 2
  wanted = (prior + 12 * np.append(decoder, divergence)) / np.log(2)
  sums = np.bincount(out.level.label, out.loss, minlength=12)
  np.testing.assert_allclose(sums / np.bincount(out.level.label), wanted, rtol=0.1)


def test_the_continuous_bound_is_the_entropy():
  """With the best network, prior and decoder added (Kingma et al. 2021, eq. 11)."""
  levels = NoiseSchedule(processes.linear(), t_min=0.05)
  config = ObjectiveConfig(loss='vdm', stratified=True, prediction='sample')
  loss = _run(config, levels, lambda x, label: _best(x, label), n=4 * N).loss.mean()
  alpha, sigma = levels.process(jnp.asarray(0.05))
  # The decoder's: the entropy of x_0 given x at t_min.
  left = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
  entropy = lambda variance: 0.5 * np.log2(2 * np.pi * np.e * float(variance))
  assert float(loss) + entropy(left) == pytest.approx(entropy(STD**2), abs=0.1)


def _best(x, label):
  ratio = jnp.exp(4 * label)
  alpha, sigma = (part[:, None, None, None] for part in (
    1 / jnp.sqrt(1 + ratio**2), ratio / jnp.sqrt(1 + ratio**2)
  ))
  return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x


def test_the_hybrid_loss_trains_the_variance_alone_by_the_bound():
  config = ObjectiveConfig(loss='hybrid', learned_variance=True, bound_weight=1.0)
  objective, x0 = Objective(config, TABLE), _data(64)
  exact = _exact('epsilon', TABLE)

  def loss(scale, v):
    network = lambda x, t: jnp.concatenate([scale * exact(x, t), jnp.full_like(x, v)], axis=-1)
    out = objective.losses(network, x0, jax.random.key(1))
    return out.loss.mean(), out.error.mean()

  gradient = jax.jit(jax.grad(lambda *a: loss(*a)[0], argnums=(0, 1)))
  of_mean, of_variance = gradient(0.9, 0.3)
  simple = jax.jit(jax.grad(lambda scale: loss(scale, 0.3)[1]))(0.9)
  np.testing.assert_allclose(of_mean, simple, rtol=1e-4)
  assert abs(float(of_variance)) > 1e-3


def test_the_hybrid_loss_adds_the_bound_without_its_prior():
  network = lambda x, t: jnp.concatenate([0.9 * _exact('epsilon', TABLE)(x, t), 0.3 + 0 * x], -1)
  x0, last = _data(64), (TABLE.alphas[-1], TABLE.sigmas[-1])

  def run(loss):
    config = ObjectiveConfig(loss=loss, learned_variance=True, bound_weight=0.5)
    return Objective(config, TABLE).losses(network, x0, jax.random.key(1))

  hybrid, bound = run('hybrid'), run('bound')
  terms = bound.loss - bits_per_dim(prior_term(x0, *last, np.hypot(*last)), x0)
  np.testing.assert_allclose(hybrid.loss, hybrid.error + 0.5 * terms, rtol=1e-4)


def test_sliced_score_matching_is_lowest_at_the_score():
  config = ObjectiveConfig(prediction='score', loss='sliced')
  exact = _exact('score', TABLE)
  values = [
    float(_run(config, TABLE, lambda x, t, k=k: k * exact(x, t)).loss.mean())
    for k in (0.5, 1.0, 1.5)
  ]
  assert values[1] < values[0] and values[1] < values[2]
  # A score k times the true one s costs (k^2 / 2 - k) E|s|^2.
  assert (values[0] - values[1]) / (values[2] - values[1]) == pytest.approx(1, abs=0.25)


def test_directions_of_the_sliced_loss_are_independent_of_the_perturbed_input():
  """Of the score |x|^2 x / 2 with Jacobian |x|^2 / 2 + x x^T, over independent signs v."""
  n, d, seen = N, 16, []

  def network(x, label):
    seen.append(x)
    return 0.5 * x * (x**2).sum(axis=(1, 2, 3), keepdims=True)

  def run(loss):
    config = ObjectiveConfig(prediction='score', loss=loss, input_perturbation=1.0)
    x0 = jnp.zeros((n, 2, 2, d // 4))
    return Objective(config, TABLE).losses(network, x0, jax.random.key(3))

  # The same key gives the simple loss the same input, which the sliced one differentiates.
  x = np.asarray(jax.jit(lambda: (run('simple'), seen[-1])[1])(), np.float64).reshape(n, d)
  out = jax.jit(lambda: run('sliced'))()
  square, fourth = (x**2).sum(axis=1), (x**4).sum(axis=1)
  found = np.asarray(out.loss, np.float64) * d / np.asarray(out.level.sigma, np.float64) ** 2
  rest = found - (d * square / 2 + square + square**3 / 8)
  variance = 2 * (square**2 - fourth)  # Of (v x)^2 over v.
  assert abs(rest.mean()) < 4.5 * (variance.mean() / n) ** 0.5
  assert rest.var() == pytest.approx(variance.mean(), rel=0.2)


def test_importance_prefers_what_was_lost_and_stays_unbiased():
  config = ObjectiveConfig(times='importance')
  few = NoiseSchedule.of(ScheduleConfig(num_train_timesteps=4, beta_end=0.9))
  objective = Objective(config, few)
  history = objective.history()
  t = jnp.tile(jnp.arange(4), 10)
  history = jax.jit(update_history)(history, t, jnp.where(t == 2, 6.0, 2.0))
  sample = jax.jit(objective.sample_levels, static_argnums=1)
  level, factor = sample(jax.random.key(0), 20_000, history)
  fractions = np.bincount(level.label, minlength=4) / 20_000
  np.testing.assert_allclose(fractions, [1 / 6, 1 / 6, 1 / 2, 1 / 6], atol=0.02)
  value = jnp.asarray([3.0, 1.0, 10.0, 2.0])[level.label]
  assert float((factor * value).mean()) == pytest.approx(4.0, rel=0.03)


def test_huber_offset_and_perturbation_are_those_of_the_objectives():
  """Recomputed from what the network saw, with the same key."""
  key = jax.random.key(1)
  _, key_noise, key_input, _ = jax.random.split(key, 4)
  config = ObjectiveConfig(
    error='pseudo_huber', huber_delta=0.2, offset_noise=0.3, input_perturbation=0.1
  )
  seen = []
  network = lambda x, t: (seen.append(x), 0.5 * x)[1]
  x0 = _data(16)
  out, seen = jax.jit(lambda: (Objective(config, TABLE).losses(network, x0, key), seen))()
  eps = losses.offset_noise(key_noise, x0.shape, 0.3)
  x = losses.add_noise(
    x0, losses.perturb_input(key_input, eps, 0.1), out.level.alpha, out.level.sigma
  )
  np.testing.assert_allclose(seen[0], x, atol=1e-6)
  delta = 0.2 ** (np.asarray(out.level.label) / 1000)
  error = 0.5 * np.asarray(x) - np.asarray(Parameterization().target(x0, eps, 1.0, 1.0))
  d = delta[:, None, None, None]
  by_hand = (2 * d * (np.sqrt(error**2 + d**2) - d)).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(out.loss, by_hand, rtol=1e-4)


@pytest.mark.parametrize(('values', 'words'), [
  ({'loss': 'hybrid'}, 'learned_variance'),
  ({'learned_variance': True}, 'never trains the variance'),
  ({'weighting': 'min_snr', 'weighting_options': {'gama': 5.0}}, 'choose from gamma'),
  ({'weighting_options': {'gamma': 5.0}}, 'it has none'),
  ({'times': 'sometimes'}, 'choose one of uniform'),
  ({'loss': 'bound', 'weighting': 'snr'}, 'no effect'),
  ({'loss': 'bound', 'times': 'mode'}, 'uniform or importance'),
  ({'huber_delta': 0.0}, 'more than 0'),
  ({'input_perturbation': -1.0}, 'at least 0'),
])
def test_what_cannot_be_or_has_no_effect_is_refused(values, words):
  with pytest.raises(UserError, match=words):
    typed(ObjectiveConfig, values, 'objective.')


def test_a_process_has_no_timesteps_to_weigh():
  with pytest.raises(UserError, match='table of timesteps'):
    Objective(ObjectiveConfig(times='importance'), KARRAS)


def test_a_learned_process_lowers_the_variance_of_the_bound():
  """Its mean stays what the ends of the process make it: half the fall of ln(1 + s^2 SNR)."""
  ends = {'gamma_min': -8.0, 'gamma_max': 5.0}
  noise = NoiseSchedule.of(NoiseConfig(process='learned', label='log_snr', process_options=ends))
  objective = Objective(ObjectiveConfig(prediction='sample', loss='vdm', stratified=True), noise)
  network = lambda scale: lambda x, label: scale * _best(x[:, None, None], label)[:, 0, 0]
  x0, optimizer = _data(8192)[:, 0, 0], optax.adam(2e-2)
  losses = jax.jit(lambda scale, process, key, x0=x0: objective.losses_of_learned(
    network, scale, process, x0, key
  ).loss)

  @jax.jit
  def step(process, state, key):
    slope = jax.grad(lambda process: losses(1.0, process, key, x0[:1024]).mean())(process)
    updates, state = optimizer.update(slope, state)
    return optax.apply_updates(process, updates), state

  process = noise.initialize(jax.random.key(3))
  state, first = optimizer.init(process), losses(1.0, process, jax.random.key(99))
  for i in range(100):
    process, state = step(process, state, jax.random.key(i))
  last = losses(1.0, process, jax.random.key(99))
  wanted = (np.log1p(STD**2 * np.exp(8)) - np.log1p(STD**2 * np.exp(-5))) / 2 / np.log(2)
  for found in (first, last):
    assert float(found.mean()) == pytest.approx(wanted, rel=0.02)
  assert last.std() < 0.85 * first.std()
  # The network's gradient is that of the bound itself.
  by_scale = jax.grad(lambda scale: losses(scale, process, jax.random.key(7)).mean())(1.1)
  bound = Objective(objective.config, noise.bind(process))
  alone = lambda scale: bound.losses(
    network(scale), x0, jax.random.split(jax.random.key(7))[0]
  ).loss.mean()
  np.testing.assert_allclose(by_scale, jax.grad(alone)(1.1), rtol=1e-4)


def test_only_the_bound_learns_a_process():
  with pytest.raises(UserError, match='set it to vdm'):
    Objective(ObjectiveConfig(), NoiseSchedule.of(NoiseConfig(process='learned')))
