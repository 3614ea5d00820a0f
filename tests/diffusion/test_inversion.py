"""DDIM undone: its order against exact denoisers, and great circles between noises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import inversion, processes
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.diffusion.samplers import padded, process_grid, sampler, sampling_grid
from diffusion_jax.errors import UserError

MIXTURE = GaussianMixture(
  jnp.array([0.3, 0.7]), jnp.array([[1.0, -1.0], [-0.5, 0.8]]), jnp.array([0.1, 0.4])
)
X = jnp.array([[0.9, -0.8], [-0.4, 0.2], [0.3, 0.3]])
GRIDS = {
  'table': lambda n: sampling_grid(
    Schedule(ScheduleConfig('linear', 1e-4, 0.02, rescale_betas_zero_snr=True)), n
  ),
  'flow': lambda n: process_grid(processes.flow(), n),
  'exploding': lambda n: process_grid(processes.karras(), n, 'karras'),
}


def there_and_back(grid, iterations):
  with jax.enable_x64(True):
    mixture, x = MIXTURE.astype(jnp.float64), X.astype(jnp.float64)
    noise = inversion.invert(mixture.denoise, x, grid, iterations)
    again = sampler('ddim')(mixture.denoise, noise, grid, None)
    return noise, float(jnp.abs(again - x).max())


@pytest.mark.parametrize('name', GRIDS)
@pytest.mark.parametrize('iterations', [1, 2])
def test_the_way_there_and_back_has_its_order(name, iterations):
  errors = [there_and_back(GRIDS[name](n), iterations)[1] for n in (50, 100, 200)]
  orders = np.log2(np.array(errors[:-1]) / errors[1:])
  assert (orders > iterations + 1 - 0.35).all() and errors[-1] < 1e-2, (errors, orders)


def test_enough_iterations_undo_few_steps_to_rounding():
  grid = GRIDS['table'](8)
  errors = [there_and_back(grid, n)[1] for n in (1, 4, 60)]
  assert errors[0] > 3 * errors[1] and errors[2] < 1e-8, errors


def test_the_noise_is_that_of_the_exact_map():
  """Of N(0, s^2) the ODE keeps u / (deviation of u): the end is known, the error of first order."""
  with jax.enable_x64(True):
    s, x = 0.5, X.astype(jnp.float64)
    denoise = lambda x, alpha, sigma: alpha * s**2 * x / (alpha**2 * s**2 + sigma**2)
    found = {n: inversion.invert(denoise, x, GRIDS['flow'](n)) for n in (200, 400)}
    error = {n: float(jnp.abs(noise - x / s).max()) for n, noise in found.items()}
  assert error[400] < 0.01 and 1.8 < error[200] / error[400] < 2.2, error


def test_padding_changes_nothing():
  grid = GRIDS['table'](5)
  found = inversion.invert(MIXTURE.denoise, X, padded(grid, 8))
  np.testing.assert_array_equal(found, inversion.invert(MIXTURE.denoise, X, grid))


def test_what_cannot_be_undone_is_said():
  with pytest.raises(UserError, match='choose at least 1'):
    inversion.invert(MIXTURE.denoise, X, GRIDS['flow'](4), 0)
  with pytest.raises(UserError, match='one step cannot be undone'):
    inversion.check_steps(padded(GRIDS['flow'](1), 8))
  inversion.check_steps(GRIDS['flow'](2))


def test_great_circles():
  start, end = (jax.random.normal(key, (7, 4, 5)) for key in jax.random.split(jax.random.key(0)))
  norm = lambda x: np.linalg.norm(np.reshape(x, (len(x), -1)), axis=1)
  end = end * jnp.asarray(norm(start) / norm(end)).reshape(-1, 1, 1)
  w = jnp.linspace(0, 1, 7)
  found = inversion.slerp(start, end, w)
  np.testing.assert_allclose(norm(found), norm(start), rtol=1e-5)
  np.testing.assert_allclose(found[0], start[0], atol=1e-6)
  np.testing.assert_allclose(found[-1], end[-1], atol=1e-6)
  # The angle to the start grows evenly.
  cosine = lambda a, b: (np.asarray(a) * b).sum((1, 2)) / norm(a) / norm(b)
  whole = np.arccos(cosine(start, end))
  np.testing.assert_allclose(np.arccos(cosine(start, found)), w * whole, atol=2e-3)
  # A line would lose norm; other norms go evenly; parallel ones do not divide by zero.
  assert (norm((start + end) / 2) < 0.9 * norm(start)).all()
  half = jnp.full(7, 0.5)
  longer = norm(inversion.slerp(start, 3 * end, half))
  np.testing.assert_allclose(longer, 2 * norm(start), rtol=1e-5)
  np.testing.assert_allclose(inversion.slerp(start, 3 * start, half), 2 * start, rtol=1e-4)


def test_an_arc_turns_and_grows_evenly():
  ends = np.array([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
  found = np.asarray(inversion.arc(ends, 5))
  np.testing.assert_allclose(found[[0, -1]], ends, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), [2, 2.5, 3, 3.5, 4], rtol=1e-6)
  angles = np.degrees(np.arctan2(found[:, 1], found[:, 0]))
  np.testing.assert_allclose(angles, [0, 22.5, 45, 67.5, 90], atol=1e-4)
