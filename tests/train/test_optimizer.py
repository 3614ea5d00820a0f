"""The optimizer against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.backend.cpu import global_norm
from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.registry import OPTIMIZERS
from diffusion_jax.train.optimizer import (
  OptimizerConfig,
  decay_mask,
  learning_rate_schedule,
  learning_rates,
  make_optimizer,
)
from tests import tiny

PARAMS = {
  'body.kernel': jnp.array([[1.0, -2.0], [3.0, 0.5]]), 'body.bias': jnp.array([0.2, -0.1]),
  'head.kernel': jnp.array([[0.7, 0.3]]),
}
GRADS = {
  'body.kernel': jnp.array([[0.1, -0.2], [0.05, 0.3]]), 'body.bias': jnp.array([0.1, -0.4]),
  'head.kernel': jnp.array([[-0.2, 0.15]]),
}


def _updates(config, gradients, params=PARAMS, platform='cpu'):
  """Updates that the optimizer makes of these gradients, one after another."""
  optimizer = make_optimizer(config, params, 100, platform)
  state, out = optimizer.init(params), []
  for gradient in gradients:
    update, state = optimizer.update(gradient, state, params)
    out.append(update)
  return out


@pytest.mark.parametrize(('schedule', 'final', 'wanted'), [
  ('constant', 0.0, {10: 1.0, 60: 1.0, 109: 1.0}),
  ('linear', 0.0, {10: 1.0, 35: 0.75, 60: 0.5, 110: 0.0}),
  ('linear', 0.1, {60: 0.55, 110: 0.1, 500: 0.1}),
  ('cosine', 0.0, {10: 1.0, 35: (1 + 0.5**0.5) / 2, 60: 0.5, 110: 0.0}),
  ('cosine', 0.1, {60: 0.55, 110: 0.1}),
])
def test_schedules_have_the_known_values(schedule, final, wanted):
  config = OptimizerConfig(
    learning_rate=2.0, schedule=schedule, warmup_steps=10, final_fraction=final
  )
  rate = learning_rate_schedule(config, 110)
  warm_up = {0: 0.1, 4: 0.5, 9: 1.0}
  for step, value in (warm_up | wanted).items():
    np.testing.assert_allclose(rate(step), 2.0 * value, atol=1e-6, err_msg=str(step))


def test_without_warm_up_the_first_update_has_the_peak():
  assert learning_rate_schedule(OptimizerConfig(learning_rate=0.3), 10)(0) == 0.3


def test_first_update_is_the_sign_of_the_gradient_and_the_decay():
  config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, clip_norm=0.0)
  update, = _updates(config, [GRADS])
  for name, p in PARAMS.items():
    decay = 0.1 * p if p.ndim == 2 else 0.0
    wanted = -0.01 * (GRADS[name] / (jnp.abs(GRADS[name]) + 1e-8) + decay)
    np.testing.assert_allclose(update[name], wanted, rtol=1e-5, err_msg=name)


def test_clipping_scales_to_the_norm_and_leaves_smaller_gradients():
  params = {'w': jnp.zeros(2)}
  config = OptimizerConfig(learning_rate=1.0, b1=0.9, b2=0.99, clip_norm=1.0)
  small, large = np.array([0.3, 0.4]), np.array([30.0, 40.0])
  second = _updates(config, [{'w': jnp.array(small)}, {'w': jnp.array(large)}], params)[1]
  clipped = large / 50
  m = (0.9 * 0.1 * small + 0.1 * clipped) / (1 - 0.9**2)
  v = (0.99 * 0.01 * small**2 + 0.01 * clipped**2) / (1 - 0.99**2)
  np.testing.assert_allclose(second['w'], -m / (np.sqrt(v) + 1e-8), rtol=1e-5)


def test_norms_biases_vectors_and_the_temperature_are_spared_from_decay():
  shapes = Network.of(CLIP, tiny.CLIP).shapes
  mask = decay_mask(shapes)
  spared = {name for name, decays in mask.items() if not decays}
  assert spared == {
    name for name in shapes if name.endswith(('bias', 'scale', 'class_embedding'))
  }
  assert 'logit_scale' in spared and len(spared) < len(mask)


def test_group_factor_is_exact():
  plain, = _updates(OptimizerConfig(), [GRADS])
  slow, = _updates(OptimizerConfig(groups=(('^head', 0.25), ('head|body', 1))), [GRADS])
  np.testing.assert_array_equal(slow['head.kernel'], 0.25 * plain['head.kernel'])
  np.testing.assert_array_equal(slow['body.kernel'], plain['body.kernel'])


def test_factor_zero_freezes_against_decay_and_leaves_the_clipping():
  config = OptimizerConfig(weight_decay=0.5, clip_norm=1.0, groups=(('^head', 0),))
  huge = {**GRADS, 'head.kernel': jnp.full((1, 2), 1e6)}
  frozen = _updates(config, [GRADS, huge])
  without = _updates(config, [{**GRADS, 'head.kernel': jnp.zeros((1, 2))}] * 2)
  for update, other in zip(frozen, without, strict=True):
    assert not update['head.kernel'].any()
    np.testing.assert_array_equal(update['body.kernel'], other['body.kernel'])


def test_a_norm_that_is_given_is_that_of_clipping_unless_some_are_frozen():
  def first_moments(groups, **norm):
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.1, groups=groups), PARAMS, 10, 'cpu')
    return optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, **norm)[1].mu

  twice = 2 * global_norm(GRADS)
  for name, moment in first_moments((), norm=twice).items():
    np.testing.assert_allclose(moment, first_moments(())[name] / 2, rtol=1e-6)
  frozen = (('^head', 0),)
  jax.tree.map(
    np.testing.assert_array_equal, first_moments(frozen, norm=twice), first_moments(frozen)
  )


def test_a_pattern_without_effect_is_named():
  with pytest.raises(UserError, match=r"'\^tail' matches no parameter"):
    make_optimizer(OptimizerConfig(groups=(('^tail', 0.1),)), PARAMS, 10, 'cpu')


@pytest.mark.parametrize(('arguments', 'words'), [
  ({'name': 'adamm'}, r"optimizer\.name is 'adamm'; did you mean adam"),
  ({'name': 'sgd', 'options': {'momentun': 0.9}}, 'options do not fit sgd .*momentun'),
  ({'schedule': 'cosinus'}, 'cosinus.*choose one of constant, linear, cosine'),
  ({'groups': (('head',),)}, r"groups\[0\] is .'head',., a tuple; it must be tuple"),
  ({'clip_norm': -1.0}, 'clip_norm is -1.0; give at least 0'),
])
def test_wrong_settings_say_what_is_wrong(arguments, words):
  with pytest.raises(UserError, match=words):
    typed(OptimizerConfig, arguments, 'config.optimizer.')


def test_every_group_has_its_own_logged_rate():
  config = OptimizerConfig(learning_rate=0.1, groups=(('^head', 0.5), ('body', 0.2)))
  rates = {name: float(rate(0)) for name, rate in learning_rates(config, 10).items()}
  assert rates == pytest.approx(
    {'learning_rate': 0.1, 'learning_rate/head': 0.05, 'learning_rate/body': 0.02}
  )
  assert jax.tree.structure(PARAMS) == jax.tree.structure(_updates(config, [GRADS])[0])


def test_an_update_that_is_not_used_moves_nothing_whatever_the_gradient():
  optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), PARAMS, 100, 'cpu')
  _, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
  broken = {**GRADS, 'body.bias': jnp.array([jnp.nan, jnp.inf])}
  updates, after = optimizer.update(broken, state, PARAMS, use=jnp.array(False))
  assert all((update == 0).all() for update in updates.values())
  jax.tree.map(np.testing.assert_array_equal, after, state)
  used, later = optimizer.update(GRADS, after, PARAMS, use=jnp.array(True))
  assert int(later.count) == 2 and all((update != 0).any() for update in used.values())


def test_the_norm_is_that_of_all_numbers():
  tree = {'a': jnp.array([3.0]), 'b': jnp.full((2, 2, 3), 1.0), 'c': jnp.array(2.0)}
  np.testing.assert_allclose(global_norm(tree), 5.0, rtol=1e-6)


def _mask(params):
  return {name: p.ndim >= 2 for name, p in params.items()}


BY_OPTAX = {
  'adamw': lambda rate: optax.adamw(rate, 0.8, 0.95, 1e-6, weight_decay=0.1, mask=_mask),
  'adam': lambda rate: optax.chain(
    optax.add_decayed_weights(0.1, _mask), optax.adam(rate, 0.8, 0.95, 1e-6)
  ),
  'sgd': lambda rate: optax.chain(
    optax.add_decayed_weights(0.1, _mask), optax.sgd(rate, momentum=0.9, nesterov=True)
  ),
  'lion': lambda rate: optax.lion(rate, 0.8, 0.95, weight_decay=0.1, mask=_mask),
  'lamb': lambda rate: optax.lamb(rate, 0.8, 0.95, 1e-6, weight_decay=0.1, mask=_mask),
  'adafactor': lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2),
}
OPTIONS = {
  'sgd': {'momentum': 0.9, 'nesterov': True}, 'adafactor': {'min_dim_size_to_factor': 2},
}


def test_every_optimizer_is_held_against_optax():
  """Here or in test_optimizers."""
  assert {*BY_OPTAX, 'muon', 'prodigy', 'schedule_free'} == set(OPTIMIZERS)


def _config(name, **more):
  decay = 0.0 if name == 'adafactor' else 0.1
  return OptimizerConfig(
    name, learning_rate=0.01, schedule='cosine', warmup_steps=2, b1=0.8, b2=0.95, eps=1e-6,
    weight_decay=decay, options=OPTIONS.get(name, {}), **more,
  )


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('name', BY_OPTAX)
def test_updates_are_those_of_optax(name, platform):
  config = _config(name, clip_norm=0.3)
  gradients = [jax.tree.map(lambda g, k=k: g * (1 + k) - 0.02 * k, GRADS) for k in range(4)]
  updates = _updates(config, gradients, platform=platform)
  rate = learning_rate_schedule(config, 100)
  wanted = optax.chain(optax.clip_by_global_norm(0.3), BY_OPTAX[name](rate))
  state = wanted.init(PARAMS)
  for gradient, update in zip(gradients, updates, strict=True):
    other, state = wanted.update(gradient, state, PARAMS)
    for key in PARAMS:
      np.testing.assert_allclose(update[key], other[key], rtol=2e-5, atol=1e-8, err_msg=key)


@pytest.mark.parametrize('name', BY_OPTAX)
def test_groups_and_unused_steps_are_alike_for_every_optimizer(name):
  groups = (('^head', 0), ('bias', 0.5))
  optimizer = make_optimizer(_config(name, groups=groups), PARAMS, 100, 'cpu')
  plain, = _updates(_config(name, groups=(('^head', 0),)), [GRADS], platform='gpu')
  before = optimizer.init(PARAMS)
  updates, after = optimizer.update(GRADS, before, PARAMS)
  assert not updates['head.kernel'].any()
  np.testing.assert_allclose(updates['body.bias'], 0.5 * plain['body.bias'], rtol=1e-6)
  broken = jax.tree.map(lambda g: g * jnp.nan, GRADS)
  none, still = optimizer.update(broken, after, PARAMS, use=jnp.array(False))
  assert all((update == 0).all() for update in none.values())
  jax.tree.map(np.testing.assert_array_equal, still, after)


def test_the_one_pass_adamw_has_the_same_state_as_the_other():
  config = OptimizerConfig()
  states = [
    make_optimizer(config, PARAMS, 10, platform).init(PARAMS) for platform in ('cpu', 'tpu')
  ]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
