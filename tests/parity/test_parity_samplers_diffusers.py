"""Trajectories in float64 against the schedulers of diffusers, run live on the same exact denoiser.

The schedulers' float32 tables are replaced by float64 ones, and torch.float32, to which some of
them cast x in every step, by torch.float64. DPMSolverSDEScheduler needs torchsde; it is the
dpmpp_sde of k-diffusion, which is compared elsewhere. The differences that remain:
  - DPMSolverMultistepScheduler, sde-dpmsolver++ of order 3: its quadratic term has the sign of 1/2
    wrong, so that it does not vanish with the step; k-diffusion's is compared instead.
  - DEIS and SA-Solver have no step to sigma = 0 there (NaN): they are compared on a grid without.
  - PNDM's Runge-Kutta midpoints lie halfway in the timestep, ours in log-SNR: the schedule compared
    is one where these coincide.
"""

from functools import partial
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion_jax.diffusion.samplers import sampler
from tests.diffusion import exact_mixture

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # Numpy's, of the schedulers.

SHAPE = (2, 1, 1, 2)
T, N = 80, 8
rng = np.random.default_rng(0)
X = rng.standard_normal(SHAPE)
NOISES = rng.standard_normal((2 * N, *SHAPE))

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-3, 0.15, T))
LOG_LINEAR = 1 / (1 + np.geomspace(0.01, 30, T) ** 2)
LEVELS = np.linspace(15.0 ** (1 / 7), 0.03 ** (1 / 7), N) ** 7
TO_CLEAN, UNCLEAN = np.append(LEVELS, 0.0), np.append(LEVELS, 0.02)


def denoise(x, alpha, sigma):
  """exact_mixture.denoise in torch, for scalars alpha and sigma."""
  weights, means, variances = map(
    torch.tensor, (exact_mixture.WEIGHTS, exact_mixture.MEANS, exact_mixture.VARIANCES)
  )
  spread = alpha**2 * variances + sigma**2
  x = x[..., None, :]
  logits = weights.log() - (x - alpha * means) ** 2 / (2 * spread) - spread.log() / 2
  return (logits.softmax(-2) * (means + alpha * variances / spread * (x - alpha * means))).sum(-2)


@pytest.fixture(autouse=True)
def in_float64():
  default = torch.get_default_dtype()
  torch.set_default_dtype(torch.float64)
  with mock.patch.object(torch, 'float32', torch.float64):
    yield
  torch.set_default_dtype(default)


@pytest.fixture
def draws(monkeypatch):
  """draws(scheduler): makes it take NOISES in turn."""

  def patch(scheduler, noises=NOISES):
    given = iter(torch.tensor(noises))
    module = __import__(type(scheduler).__module__, fromlist=['x'])
    monkeypatch.setattr(module, 'randn_tensor', lambda *_, **__: next(given))

  return patch


def ours(function, alphas, sigmas, noises=NOISES, x=X, denoiser=exact_mixture.denoise):
  """States [n ...] of our sampler on the grid of these arrays."""
  with jax.enable_x64(True):
    noises, grid = jnp.asarray(noises), (jnp.asarray(alphas), jnp.asarray(sigmas))
    draw = lambda index, like: noises[index]
    run = partial(function, denoiser, keys=draw, trajectory=True)
    return np.asarray(jax.jit(run)(x=jnp.asarray(x), grid=grid).states)


def assert_same(found, wanted):
  wanted = np.stack([np.asarray(state) for state in wanted])
  assert found.shape == wanted.shape and found.dtype == wanted.dtype == np.float64
  assert np.abs(found - wanted).max() < 1e-10 * np.abs(wanted).max()


def of_table(steps, alpha_bar=ALPHA_BAR, clean=True):
  """Our grid of these timesteps."""
  alpha_bar = np.append(alpha_bar[np.asarray(steps)], [1.0] * clean)
  return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def on_table(scheduler, alpha_bar=ALPHA_BAR):
  """Gives a scheduler a float64 table of alpha-bar, and N steps."""
  scheduler.alphas_cumprod = torch.tensor(alpha_bar)
  scheduler.set_timesteps(N)
  return scheduler


def eps_on_table(x, t, alpha_bar=ALPHA_BAR):
  a, s = np.sqrt(alpha_bar[int(t)]), np.sqrt(1 - alpha_bar[int(t)])
  return (x - a * denoise(x, a, s)) / s


def run_table(scheduler, x=X, alpha_bar=ALPHA_BAR, options=lambda i: {}):
  x, states = torch.tensor(x), []
  for i, t in enumerate(scheduler.timesteps):
    x = scheduler.step(eps_on_table(x, t, alpha_bar), t, x, **options(i)).prev_sample
    states.append(x)
  return states


@pytest.mark.parametrize('eta', [0.0, 0.6, 1.0])
@pytest.mark.parametrize('spacing', ['leading', 'trailing'])
def test_ddim(eta, spacing):
  scheduler = on_table(diffusers.DDIMScheduler(T, clip_sample=False, timestep_spacing=spacing))
  wanted = run_table(
    scheduler, options=lambda i: {'eta': eta, 'variance_noise': torch.tensor(NOISES[i])}
  )
  assert_same(ours(sampler('ddim', eta=eta), *of_table(scheduler.timesteps)), wanted)


@pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large'])
def test_ddpm(variance, draws):
  scheduler = on_table(diffusers.DDPMScheduler(T, clip_sample=False, variance_type=variance))
  draws(scheduler)
  wanted = run_table(scheduler)
  assert_same(ours(sampler('ddpm', variance=variance), *of_table(scheduler.timesteps)), wanted)


def test_ddpm_with_learned_variance(draws):
  scheduler = on_table(
    diffusers.DDPMScheduler(T, clip_sample=False, variance_type='learned_range')
  )
  draws(scheduler)
  x, wanted = torch.tensor(X), []
  for t in scheduler.timesteps:
    output = torch.cat([eps_on_table(x, t), torch.tanh(x)], dim=1)  # the share is (v + 1) / 2
    x = scheduler.step(output, t, x).prev_sample
    wanted.append(x)
  learned = lambda x, a, s: (exact_mixture.denoise(x, a, s), (jnp.tanh(x) + 1) / 2)
  found = ours(
    sampler('ddpm', variance='learned'), *of_table(scheduler.timesteps), denoiser=learned
  )
  assert_same(found, wanted)


def test_plms():
  scheduler = diffusers.PNDMScheduler(T, skip_prk_steps=True, set_alpha_to_one=True)
  wanted = run_table(on_table(scheduler))[1:]  # The first step has two calls.
  steps = np.arange(N)[::-1] * (T // N)
  assert_same(ours(sampler('plms'), *of_table(steps)), wanted)


def test_pndm():
  scheduler = diffusers.PNDMScheduler(T, skip_prk_steps=False, set_alpha_to_one=True)
  on_table(scheduler, LOG_LINEAR)
  wanted = run_table(scheduler, alpha_bar=LOG_LINEAR)
  wanted = [*wanted[3:12:4], *wanted[12:]]  # Four calls in each of the first three steps.
  steps = np.arange(N)[::-1] * (T // N)
  assert_same(ours(sampler('pndm'), *of_table(steps, LOG_LINEAR)), wanted)


def test_lcm(draws):
  # So large a timestep scaling leaves c_skip = 0 and c_out = 1: the denoiser as it is.
  scheduler = on_table(
    diffusers.LCMScheduler(T, original_inference_steps=T, timestep_scaling=1e12)
  )
  draws(scheduler)
  assert_same(ours(sampler('lcm'), *of_table(scheduler.timesteps)), run_table(scheduler))


@pytest.mark.parametrize('gamma', [0.0, 0.3, 1.0])
def test_tcd(gamma, draws):
  scheduler = on_table(diffusers.TCDScheduler(T, original_inference_steps=T))
  draws(scheduler)
  wanted = run_table(scheduler, options=lambda i: {'eta': gamma})
  steps = np.append(scheduler.timesteps.numpy(), 0)  # It ends at the first timestep, not clean.
  landing = of_table(np.floor((1 - gamma) * steps[1:]).astype(int), clean=False)
  with jax.enable_x64(True):
    third = tuple(map(jnp.asarray, landing))
    function = lambda denoise, x, grid, *args, **how: sampler('tcd')(
      denoise, x, (*grid, third), *args, **how
    )
    assert_same(ours(function, *of_table(steps, clean=False)), wanted)


def in_sigma(scheduler, sigmas):
  """Puts float64 noise levels into a scheduler, which then starts at the first."""
  scheduler.set_timesteps(N)
  scheduler.sigmas = torch.tensor(sigmas)
  scheduler.set_begin_index(0)
  scheduler.is_scale_input_called = True
  return scheduler


def run_ve(scheduler, levels, calls=N):
  """alpha = 1: model outputs are eps at the noise level of each call."""
  x, states = torch.tensor(LEVELS[0] * X), []
  for i in range(calls):
    eps = (x - denoise(x, 1.0, levels[i])) / levels[i]
    x = scheduler.step(eps, scheduler.timesteps[i], x).prev_sample
    states.append(x)
  return states


def ours_ve(name):
  return ours(sampler(name), np.ones(N + 1), TO_CLEAN, x=LEVELS[0] * X)


@pytest.mark.parametrize(
  'name,kind',
  [
    ('euler', diffusers.EulerDiscreteScheduler),
    ('euler_ancestral', diffusers.EulerAncestralDiscreteScheduler),
    ('lms', diffusers.LMSDiscreteScheduler),
  ],
)
def test_one_call_in_sigma(name, kind, draws):
  scheduler = in_sigma(kind(), TO_CLEAN)
  if 'ancestral' in name:
    draws(scheduler)
  assert_same(ours_ve(name), run_ve(scheduler, TO_CLEAN))


def doubled(values):
  return np.concatenate([values[:1], np.repeat(values[1:-1], 2), values[-1:]])


def test_heun():
  levels = doubled(TO_CLEAN)
  wanted = run_ve(in_sigma(diffusers.HeunDiscreteScheduler(), levels), levels, 2 * N - 1)
  assert_same(ours_ve('heun'), [*wanted[1::2], wanted[-1]])


def test_dpm2():
  levels = np.append(doubled(TO_CLEAN), [0.0, 0.0])
  between = np.append(np.sqrt(TO_CLEAN[1:] * TO_CLEAN[:-1]), 0.0)
  between = np.append([0.0], np.repeat(between, 2))
  scheduler = in_sigma(diffusers.KDPM2DiscreteScheduler(), levels)
  scheduler.sigmas_interpol = torch.tensor(between)
  at = [between[i] if i % 2 else levels[i] for i in range(2 * N - 1)]
  wanted = run_ve(scheduler, at, 2 * N - 1)
  assert_same(ours_ve('dpm2'), [*wanted[1::2], wanted[-1]])


def test_dpm2_ancestral(draws):
  here, there = TO_CLEAN[:-1], TO_CLEAN[1:]
  up = there * np.sqrt(1 - (there / here) ** 2)
  down = there**2 / here
  between = np.append(np.sqrt(here[:-1] * down[:-1]), 0.0)
  levels = np.append(doubled(TO_CLEAN), [0.0, 0.0])
  scheduler = in_sigma(diffusers.KDPM2AncestralDiscreteScheduler(), levels)
  pad = lambda values: torch.tensor(np.append(values[:1], np.repeat(values[1:], 2)))
  scheduler.sigmas_up, scheduler.sigmas_down = pad(up), pad(down)
  scheduler.sigmas_interpol = pad(between)
  draws(scheduler)
  at = [between[i // 2] if i % 2 else here[i // 2] for i in range(2 * N - 1)]
  wanted = run_ve(scheduler, at, 2 * N - 1)
  assert_same(ours_ve('dpm2_ancestral'), [*wanted[1::2], wanted[-1]])


def run_vp(scheduler, levels, options=lambda i: {}):
  """Model outputs are x_0, states those of a variance-preserving process."""
  x, states = torch.tensor(X), []
  for i, t in enumerate(scheduler.timesteps):
    alpha = 1 / np.sqrt(1 + levels[i] ** 2)
    x0 = denoise(x, alpha, alpha * levels[i])
    x = scheduler.step(x0, t, x, **options(i)).prev_sample
    states.append(x)
  return states


def ours_vp(function, levels):
  return ours(function, 1 / np.sqrt(1 + levels**2), levels / np.sqrt(1 + levels**2))


def vp_scheduler(kind, levels, **options):
  return in_sigma(kind(prediction_type='sample', **options), levels)


MULTISTEP = dict(lower_order_final=False, final_sigmas_type='zero')


@pytest.mark.parametrize(
  'name,ours_options,options',
  [
    ('dpmpp_2m', {}, {'algorithm_type': 'dpmsolver++', 'solver_order': 2}),
    ('dpmpp_2m_sde', {'eta': 0.0, 'slope': 'exact'},
     {'algorithm_type': 'dpmsolver++', 'solver_order': 2, 'solver_type': 'heun'}),
    ('dpmpp_2m_sde', {}, {'algorithm_type': 'sde-dpmsolver++', 'solver_order': 2}),
    ('dpmpp_2m_sde', {'slope': 'exact'},
     {'algorithm_type': 'sde-dpmsolver++', 'solver_order': 2, 'solver_type': 'heun'}),
    ('dpmpp_3m_sde', {'eta': 0.0},
     {'algorithm_type': 'dpmsolver++', 'solver_order': 3, 'solver_type': 'heun'}),
  ],
)
def test_dpmpp_multistep(name, ours_options, options):
  scheduler = vp_scheduler(
    diffusers.DPMSolverMultistepScheduler, TO_CLEAN, **MULTISTEP, **options
  )
  wanted = run_vp(
    scheduler, TO_CLEAN, lambda i: {'variance_noise': torch.tensor(NOISES[i])}
  )
  assert_same(ours_vp(sampler(name, **ours_options), TO_CLEAN), wanted)


@pytest.mark.parametrize('variant', ['bh1', 'bh2'])
@pytest.mark.parametrize('order', [1, 2, 3])
def test_unipc(order, variant):
  levels = TO_CLEAN if variant == 'bh2' else UNCLEAN  # bh1 to sigma = 0 is NaN there.
  scheduler = vp_scheduler(
    diffusers.UniPCMultistepScheduler, levels, solver_order=order, solver_type=variant
  )
  wanted = run_vp(scheduler, levels)
  assert_same(ours_vp(sampler('unipc', order=order, variant=variant), levels), wanted)


@pytest.mark.parametrize('order', [1, 2, 3])
def test_deis(order):
  levels = UNCLEAN
  scheduler = vp_scheduler(
    diffusers.DEISMultistepScheduler, levels, solver_order=order, lower_order_final=False
  )
  assert_same(ours_vp(sampler('deis', order=order), levels), run_vp(scheduler, levels))


@pytest.mark.parametrize('order,corrector_order', [(1, 2), (2, 2), (3, 3), (3, 4)])
def test_sa_solver(order, corrector_order, draws):
  levels = UNCLEAN
  scheduler = vp_scheduler(
    diffusers.SASolverScheduler, levels, predictor_order=order, corrector_order=corrector_order,
    algorithm_type='data_prediction',
  )
  tau = {int(t): torch.tensor(0.8 * (0.1 <= level <= 3)) for t, level in
         zip(scheduler.timesteps, levels, strict=False)}
  scheduler.tau_func = lambda t: tau[int(t)]
  draws(scheduler)
  function = sampler(
    'sa_solver', order=order, corrector_order=corrector_order, tau=0.8, low=0.1, high=3.0
  )
  assert_same(ours_vp(function, levels), run_vp(scheduler, levels))


def run_flow(scheduler, levels, calls):
  x, states = torch.tensor(X), []
  for i in range(calls):
    v = (x - denoise(x, 1 - levels[i], levels[i])) / levels[i]
    x = scheduler.step(v, scheduler.timesteps[i], x).prev_sample
    states.append(x)
  return states


FLOW = np.linspace(1, 0, N + 1)


def test_flow_euler():
  scheduler = in_sigma(diffusers.FlowMatchEulerDiscreteScheduler(), FLOW)
  found = ours(sampler('flow_euler'), 1 - FLOW, FLOW)
  assert_same(found, run_flow(scheduler, FLOW, N))


def test_flow_heun():
  levels = doubled(FLOW)
  scheduler = in_sigma(diffusers.FlowMatchHeunDiscreteScheduler(), levels)
  wanted = run_flow(scheduler, levels, 2 * N - 1)
  assert_same(ours(sampler('flow_heun'), 1 - FLOW, FLOW), [*wanted[1::2], wanted[-1]])


def test_predictor_corrector(draws):
  """And, in its predictor, `euler_maruyama`. One image, as theirs takes norms over the batch."""
  scheduler = diffusers.ScoreSdeVeScheduler(N, snr=0.16)
  scheduler.set_timesteps(N)
  scheduler.discrete_sigmas = torch.tensor(LEVELS[::-1].copy())
  noises, x = NOISES[:, :1], torch.tensor(LEVELS[0] * X[:1])
  draws(scheduler, noises)
  wanted = []
  for i, level in enumerate(LEVELS):
    gradient = lambda x, level=level: (denoise(x, 1.0, level) - x) / level**2
    x = scheduler.step_correct(gradient(x), x).prev_sample
    step = scheduler.step_pred(gradient(x), (N - 1 - i + 0.25) / (N - 1), x)
    x = step.prev_sample
    wanted.append(x)
  wanted[-1] = step.prev_sample_mean  # Ours, as their pipeline, adds no noise in the last step.
  found = ours(
    sampler('predictor_corrector'), np.ones(N + 1), TO_CLEAN, noises, x=LEVELS[0] * X[:1]
  )
  assert_same(found, wanted)
