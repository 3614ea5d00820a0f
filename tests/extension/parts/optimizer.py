"""An optimizer: each parameter goes the learning rate against the sign of its gradient."""

import optax

from diffusion_jax.registry import OPTIMIZERS, register


def sign_descent(config, schedule, mask):
  """The transformation; weight decay where the mask has it."""
  return optax.chain(
    optax.scale_by_sign(), optax.add_decayed_weights(config.weight_decay, mask),
    optax.scale_by_learning_rate(schedule),
  )


register(OPTIMIZERS, 'sign_descent', f'{__name__}:sign_descent')
