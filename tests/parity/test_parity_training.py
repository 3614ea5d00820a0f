"""Gradients of the whole training loss against diffusers: its schedule, its U-Net, its target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.noise import NoiseSchedule, ScheduleConfig
from diffusion_jax.diffusion.objective import Objective, ObjectiveConfig
from diffusion_jax.models import network
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

UNET = dict(
  sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
  cross_attention_dim=6, attention_head_dim=2, down_block_types=('CrossAttnDownBlock2D',),
  up_block_types=('CrossAttnUpBlock2D',),
)


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_gradients_of_the_training_loss(
  prediction, randomized, ported, quick_jit, assert_same_gradients
):
  theirs = randomized(diffusers.UNet2DConditionModel(**UNET))
  _, graphdef, params = ported('unet', theirs)
  rng, key = np.random.default_rng(0), jax.random.key(0)
  x0 = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
  text = rng.normal(size=(3, 5, 6)).astype(np.float32)
  objective = Objective(
    ObjectiveConfig(prediction=prediction), NoiseSchedule.of(ScheduleConfig())
  )
  seen = []
  objective.losses(lambda x, t: (seen.append((x, t)), x)[1], jnp.asarray(x0), key, None)
  (x, t), = (tuple(map(np.asarray, pair)) for pair in seen)

  scheduler = diffusers.DDPMScheduler(
    beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012
  )
  bar = scheduler.alphas_cumprod.numpy()[t.astype(int)].reshape(-1, 1, 1, 1)
  nchw = lambda a: torch.tensor(np.asarray(a, np.float32).transpose(0, 3, 1, 2))
  clean, eps = nchw(x0), nchw((x - bar**0.5 * x0) / (1 - bar) ** 0.5)
  steps = torch.tensor(t.astype(int))
  target = eps if prediction == 'epsilon' else scheduler.get_velocity(clean, eps, steps)
  output = theirs(scheduler.add_noise(clean, eps, steps), steps, torch.tensor(text)).sample
  wanted = torch.nn.functional.mse_loss(output, target)
  wanted.backward()

  def loss(params):
    unet = network.merge(graphdef, params)
    return objective.losses(lambda x, t: unet(x, t, Condition(text)), x0, key, None).loss.mean()

  value, gradients = quick_jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-4)
  assert_same_gradients(theirs, gradients)
