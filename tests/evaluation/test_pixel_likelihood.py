"""Bits per dimension of pixels: the values of direct calls, and what the page shows of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.bound_by_step import bound_by_step
from diffusion_jax.diffusion.likelihood import flow_likelihood
from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import scores_of
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.likelihood import image_keys
from diffusion_jax.evaluation.pixel_likelihood import PixelLikelihood
from diffusion_jax.models.unet2d import UNet2DConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines import assembly
from diffusion_jax.pipelines.model import DENOISER
from diffusion_jax.pipelines.spaces import PixelSpace
from diffusion_jax.types import Condition
from diffusion_jax.viz.evaluation import write_evaluation_page
from tests import tiny_pipeline

SIZE, COUNT = 8, 3
UNET = UNet2DConfig(
  sample_size=SIZE, in_channels=3, out_channels=6, block_out_channels=(4,), layers_per_block=1,
  down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',), norm_num_groups=2,
  attention_head_dim=None,
)


@pytest.fixture(scope='module')
def model():
  """Without a condition, with a learned variance."""
  found, _ = assembly.assemble(
    UNET, PixelSpace(), {}, ScheduleConfig('linear', 1e-3, 0.2, num_train_timesteps=20),
    Parameterization('epsilon'),
  )
  return found, {DENOISER: tiny_pipeline.random_params(UNET)}


@pytest.fixture(scope='module')
def pictures():
  images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
  return [{'image': image, 'captions': [''], 'id': str(i)} for i, image in enumerate(images)]


@pytest.fixture(scope='module')
def evaluator(pictures):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  return PixelLikelihood(
    train=pictures, test=pictures, mesh=mesh, images=COUNT, batch_size=2, draws=4,
    solver='heun', ode_steps=2,
  )


@pytest.fixture(scope='module')
def scores(model, evaluator):
  return scores_of(evaluator.run(*model, jax.random.key(5)), first='model')


def test_rows_are_the_means_of_direct_calls(scores, model, pictures, evaluator):
  (made, weights), records = model, shuffled(pictures, COUNT)
  x0 = jnp.asarray(np.stack([r['image'] for r in records]) / np.float32(127.5) - 1)
  key_noise, key_offset = jax.random.split(jax.random.key(5))
  keys = jax.random.wrap_key_data(image_keys(key_noise, COUNT))
  network = made.denoiser.bind(weights[DENOISER])

  def given(x, alpha, sigma):
    t = jnp.broadcast_to(made.noise.label(alpha, sigma), (len(x),))
    eps, v = jnp.split(network(x, t, Condition()), 2, axis=-1)
    return (x - sigma * eps) / alpha, jnp.clip((v + 1) / 2, 0, 1)

  draws = dict(draws=4, offset=jax.random.uniform(key_offset), variance='learned')
  terms = jax.jit(lambda x: bound_by_step(given, x, *made.noise.levels(), keys, **draws))(x0)
  row = scores['model']
  for name, value in (('bound', terms.total), ('prior', terms.prior), ('steps', terms.diffusion),
                      ('decoder', terms.decoder)):
    assert row[f'bits_per_dim_{name}'] == pytest.approx(float(value.mean()), rel=1e-3), name
  error = np.std(np.asarray(terms.total), ddof=1) / COUNT**0.5
  assert row['bits_per_dim_bound_stderr'] == pytest.approx(error, rel=0.01)
  by_step = scores['bound_by_step']
  assert by_step['timesteps'] == terms.timesteps.tolist()
  np.testing.assert_allclose(by_step['model'], terms.steps.mean(axis=1), rtol=1e-3)
  # The density of dequantized pixels, as the mass of a bin of width 2 / 255.
  shift = jnp.stack([jax.random.uniform(jax.random.fold_in(key, 2**30), x0.shape[1:])
                     for key in keys]) - 0.5
  flow = jax.jit(lambda x: flow_likelihood(
    lambda *at: given(*at)[0], x, made.noise.smooth_process, keys, solver='heun', steps=2, t_min=0.0
  ))(x0 + shift * 2 / 255)
  wanted = float(flow.bits.mean() + np.log2(255 / 2))
  assert row['bits_per_dim_flow'] == pytest.approx(wanted, rel=1e-3)
  assert set(row) == set(evaluator.metrics)


def test_the_bound_has_three_terms_and_a_chart_by_timestep(scores, tmp_path):
  for column in ('model', 'untrained'):
    one = {name: scores[column][f'bits_per_dim_{name}'] for name in
           ('bound', 'prior', 'steps', 'decoder')}
    assert one.pop('bound') == pytest.approx(sum(one.values()), rel=1e-5)
  assert scores['model'] != scores['untrained']
  assert scores['settings']['variance'] == 'learned' and scores['settings']['timesteps'] == 20
  write_evaluation_page(tmp_path / 'page.html', scores)
  text = (tmp_path / 'page.html').read_text()
  assert 'Bound by timestep' in text and 'bits per dimension of each step' in text


def test_the_number_of_images_is_checked_first(model, pictures, evaluator):
  many = PixelLikelihood(train=pictures, test=pictures, mesh=evaluator.mesh, images=6)
  with pytest.raises(UserError, match='6 samples cannot be scored; choose 2 to 5'):
    next(many.run(*model, jax.random.key(0)))
