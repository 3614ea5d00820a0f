"""Every optimizer against optax on a quadratic; moments of 8 bits; meshes; going on from a save."""


import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from diffusion_jax.checkpoint.checkpoints import Checkpoints
from diffusion_jax.config import OptimizerConfig
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, to_host
from diffusion_jax.train.compile import held
from diffusion_jax.train.optimizer import decay_mask, gradients_at, make_optimizer
from diffusion_jax.train.optimizers.moments import (
  BLOCK,
  Blocks,
  Code,
  dynamic_code,
  noise_like,
  stored,
  to_bfloat16,
)
from diffusion_jax.train.optimizers.muon import BY_ADAMW, axes_of, matrices_of
from diffusion_jax.train.state import abstract_state, initializer
from diffusion_jax.train.step import make_step
from tests.regression import Regression
from tests.train.test_optimizer import BY_OPTAX, OPTIONS

SHAPES = {
  'conv.kernel': (3, 3, 4, 6), 'layers.fc1.kernel': (2, 5, 4), 'fc.kernel': (6, 3),
  'conv_in.kernel': (3, 3, 2, 4), 'fc.bias': (5,),
}
STEPS, RATE, DECAY = 6, 0.05, 0.1


def _random(seed, shapes=SHAPES):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def _gradient(params, target, hardness):
  """Of the sum of hardness / 2 * (p - target)^2."""
  return {name: hardness[name] * (p - target[name]) for name, p in params.items()}


def _muon(mask):
  """optax's, where a matrix is one, and plain AdamW for the rest."""
  dims = contrib.MuonDimensionNumbers
  axes = {'conv.kernel': dims((0, 1, 2), 3), 'layers.fc1.kernel': dims((1,), 2),
          'fc.kernel': dims((0,), 1)}
  own = contrib.muon(
    RATE, weight_decay=DECAY, consistent_rms=0.2, muon_weight_dimension_numbers=lambda params: {
      name: axes.get(name) for name in params
    },
  )
  return own, optax.adamw(RATE, 0.9, 0.99, weight_decay=DECAY, mask=mask)


def _config(name, **more):
  return OptimizerConfig(**{
    'name': name, 'learning_rate': 1.0 if name == 'prodigy' else RATE, 'b2': 0.99,
    'weight_decay': DECAY, 'clip_norm': 0.0, **more,
  })


def _descend(optimizer, params, target, hardness):
  """(parameters after STEPS steps, state), the gradient taken where the optimizer says."""

  def one(both, _):
    params, state = both
    grads = _gradient(gradients_at(state, params), target, hardness)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), ()

  return jax.jit(lambda p: jax.lax.scan(one, (p, optimizer.init(p)), None, length=STEPS)[0])(params)


def _quadratic(shapes=SHAPES):
  return _random(0, shapes), _random(1, shapes), jax.tree.map(jnp.exp, _random(2, shapes))


@pytest.mark.parametrize('name', BY_OPTAX)
def test_descends_as_optax_does(name):
  problem, decay = _quadratic(), 0.0 if name == 'adafactor' else DECAY
  config = _config(name, b1=0.8, b2=0.95, eps=1e-6, options=OPTIONS.get(name, {}),
                   weight_decay=decay)
  ours, _ = _descend(make_optimizer(config, problem[0], 100, 'cpu'), *problem)
  wanted, _ = _descend(BY_OPTAX[name](RATE), *problem)
  for key in SHAPES:
    np.testing.assert_allclose(ours[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=key)
    assert np.abs(ours[key] - problem[0][key]).max() > 1e-3


def test_muon_takes_convolutions_as_matrices_and_stacked_layers_one_by_one():
  problem = _quadratic()
  ours, _ = _descend(make_optimizer(_config('muon'), problem[0], 100, 'cpu'), *problem)
  matrices, rest = (_descend(made, *problem)[0] for made in _muon(decay_mask(problem[0])))
  for key in SHAPES:
    wanted = rest if key in ('conv_in.kernel', 'fc.bias') else matrices
    np.testing.assert_allclose(ours[key], wanted[key], rtol=1e-3, atol=1e-4, err_msg=key)
  assert axes_of('a.kernel', (2, 3, 3, 4, 6)) == ((1, 2, 3), 4)
  names = {'conv_in.kernel': 4, 'a.0.proj_out.kernel': 2, 'proj_out.kernel': 2, 'lora.a': 2,
           'token.embedding': 2, 'fc.bias': 1}
  shapes = {name: jnp.zeros((3,) * rank) for name, rank in names.items()}
  assert matrices_of(shapes, BY_ADAMW).keys() == {'a.0.proj_out.kernel', 'lora.a'}
  assert matrices_of(shapes, '').keys() == {n for n in names if n.endswith(('kernel', 'lora.a'))}


def test_prodigy_is_that_of_optax_but_spares_what_does_not_decay():
  every = _quadratic()
  for decay, problem in ((0.0, every), (DECAY, [
    {name: p for name, p in part.items() if not name.endswith('bias')} for part in every
  ])):
    made = make_optimizer(_config('prodigy', weight_decay=decay), problem[0], 100, 'cpu')
    ours, state = _descend(made, *problem)
    wanted, other = _descend(contrib.prodigy(1.0, (0.9, 0.99), weight_decay=decay), *problem)
    assert float(state.estim_lr) == pytest.approx(float(other.estim_lr), rel=1e-4)
    assert float(state.estim_lr) > 1e-6
    for key in problem[0]:
      np.testing.assert_allclose(ours[key], wanted[key], rtol=1e-4, atol=1e-6, err_msg=key)
  large, none = (
    make_optimizer(_config('prodigy', weight_decay=decay), every[0], 100, 'cpu')
    for decay in (1e3, 0.0)
  )
  one, two = jax.jit(lambda params, grads: [
    made.update(grads, made.init(params), params)[0] for made in (large, none)
  ])(*every[:2])
  np.testing.assert_array_equal(one['fc.bias'], two['fc.bias'])
  assert np.abs(one['fc.kernel'] - two['fc.kernel']).max() > 1e-5


def test_schedule_free_keeps_the_average_as_its_parameters():
  """optax keeps y; its average, made of y and z, is what ours has as parameters."""
  problem = _quadratic()
  config = _config('schedule_free', warmup_steps=3)
  ours, state = _descend(make_optimizer(config, problem[0], 100, 'cpu'), *problem)
  rate = lambda n: RATE * jnp.minimum((n + 1) / 3, 1.0)
  within = optax.chain(
    optax.scale_by_rms(0.99, 1e-8, eps_in_sqrt=False, bias_correction=True),
    optax.add_decayed_weights(DECAY, decay_mask(problem[0])), optax.scale_by_learning_rate(rate),
  )
  # Whose count begins at 1.
  y, other = _descend(contrib.schedule_free(within, lambda n: rate(n - 1), b1=0.9), *problem)
  x = contrib.schedule_free_eval_params(other, y)
  for key in SHAPES:
    np.testing.assert_allclose(ours[key], x[key], rtol=1e-4, atol=1e-5, err_msg=key)
    np.testing.assert_allclose(state.z[key], other.z[key], rtol=1e-4, atol=1e-5, err_msg=key)
    at = gradients_at(state, ours)[key]
    np.testing.assert_allclose(at, y[key], rtol=1e-4, atol=1e-5, err_msg=key)
    assert np.abs(at - ours[key]).max() > 1e-3


@pytest.mark.parametrize('name', ['muon', 'prodigy', 'schedule_free'])
def test_groups_freezing_and_unused_steps(name):
  params, grads = _random(0), _random(1)
  config = _config(name, groups=((r'^conv\.', 0), ('fc1', 0.5)))
  slow, plain = (
    make_optimizer(c, params, 100, 'cpu') for c in (config, _config(name, groups=(('^conv.k', 0),)))
  )
  updates, state = jax.jit(slow.update)(grads, slow.init(params), params)
  others, _ = jax.jit(plain.update)(grads, plain.init(params), params)
  assert not updates['conv.kernel'].any() and others['fc.kernel'].any()
  for key, factor in (('layers.fc1.kernel', 0.5), ('fc.kernel', 1.0)):
    np.testing.assert_allclose(updates[key], factor * others[key], rtol=1e-4, atol=1e-8)
  broken = jax.tree.map(lambda g: g * jnp.nan, grads)
  none, still = jax.jit(slow.update)(broken, state, params, use=jnp.array(False))
  assert all((update == 0).all() for update in none.values())
  jax.tree.map(np.testing.assert_array_equal, still, state)


@pytest.mark.parametrize(('arguments', 'words'), [
  ({'name': 'schedule_free', 'schedule': 'cosine'}, "schedule is 'cosine', but schedule_free"),
  ({'name': 'schedule_free', 'b1': 0.0}, 'b1 is 0, the share of the average'),
  ({'name': 'prodigy', 'learning_rate': 1e-4}, 'which prodigy multiplies .* set it to 1'),
  ({'name': 'muon', 'options': {'momentun': 0.9}}, "fit muon .*'momentun'.; did you mean mom"),
  ({'name': 'muon', 'options': {'momentum': 1.5}}, 'options.momentum is 1.5; give'),
  ({'name': 'muon', 'options': {'by_adamw': '('}}, 'is no regular expression'),
  ({'name': 'adafactor', 'moments': 'int8_dynamic'}, 'adafactor with .* no moments'),
  ({'name': 'sgd', 'moments': 'bfloat16'}, 'sgd with .* no moments'),
  ({'name': 'lion', 'moments': 'int8_linear', 'options': {'mu_dtype': 'bfloat16'}},
   'options.mu_dtype is another type for the same'),
])
def test_what_cannot_be_combined_is_refused(arguments, words):
  with pytest.raises(UserError, match=words):
    make_optimizer(OptimizerConfig(**arguments), _random(0), 10, 'cpu')


def test_the_dynamic_code_is_that_of_its_definition():
  """Ends, steps and counts as in bitsandbytes' create_dynamic_map."""
  signed, positive = dynamic_code(True), dynamic_code(False)
  assert len(signed) == len(positive) == len(set(signed)) == len(set(positive)) == 256
  np.testing.assert_allclose(signed[:2], [-0.99296875, -0.97890625], rtol=1e-6)
  np.testing.assert_allclose(signed[126:130], [-5.5e-7, 0, 5.5e-7, 3.25e-6], rtol=1e-5)
  np.testing.assert_allclose(signed[-2:], [0.99296875, 1], rtol=1e-6)
  np.testing.assert_allclose(positive[:4], [0, 3.25e-7, 7.75e-7, 2.125e-6], rtol=1e-5)
  np.testing.assert_allclose(positive[-2:], [0.996484375, 1], rtol=1e-6)
  assert [((signed > 0.1**e) & (signed < 0.1 ** (e - 1))).sum() for e in range(1, 8)] == [
    64, 32, 16, 8, 4, 2, 1
  ]


@pytest.mark.parametrize('name', ['int8_dynamic', 'int8_linear'])
@pytest.mark.parametrize('signed', [True, False])
def test_blocks_have_the_nearest_value_of_their_code(name, signed):
  """Against a loop over the blocks: 700 are 3 blocks of 234; of 3 x 520 x 4 the blocks lie along
  the 520, which are two of 260 and so three of 174."""
  code, rng = Code(name, signed), np.random.default_rng(0)
  for shape, axis, width, count in (((6, 700), 1, 234, 3), ((3, 520, 4), 1, 174, 3)):
    x = (rng.normal(size=shape) * 10.0 ** rng.uniform(-5, 0, size=shape)).astype('f4')
    x = x if signed else np.square(x)
    blocks = code.encode(jnp.asarray(x), jnp.full(shape, 0.5))
    assert blocks.codes.dtype == jnp.uint8 and blocks.codes.shape == shape
    assert blocks.scales.shape == (*shape[:axis], count, *shape[axis + 1:]) and width <= BLOCK
    found = np.moveaxis(np.asarray(code.decode(blocks)), axis, -1)
    scales = np.moveaxis(np.asarray(blocks.scales), axis, -1)
    for row, got, scale in zip(
      np.moveaxis(x, axis, -1).reshape(-1, shape[axis]), found.reshape(-1, shape[axis]),
      scales.reshape(-1, count), strict=True,
    ):
      for i in range(count):
        part = slice(i * width, (i + 1) * width)
        assert scale[i] == np.abs(row[part]).max()
        every = code.values * scale[i]
        least = np.abs(row[part][:, None] - every).min(1)
        away = np.abs(row[part] - got[part])
        raised = (not signed) & (row[part] < every[1])  # Which never becomes zero.
        assert (away <= least * (1 + 1e-5) + 1e-7 * scale[i])[~raised].all()
        assert (got[part][row[part] > 0] != 0).all() or signed
  assert not np.asarray(code.decode(code.encode(jnp.zeros((2, 300)), jnp.zeros((2, 300))))).any()


def test_rounding_at_random_has_the_right_mean():
  x = jnp.broadcast_to(jnp.linspace(-1, 1, 41)[:, None], (41, 4000)).astype(jnp.float32)
  noise = noise_like(x, jnp.uint32(5))
  assert abs(float(noise.mean()) - 0.5) < 5e-3 and noise.min() >= 0 and noise.max() < 1
  assert abs(np.corrcoef(noise.ravel()[1:], noise.ravel()[:-1])[0, 1]) < 1e-2
  other = noise_like(x, jnp.uint32(6))
  assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 1e-2
  code = Code('int8_linear', True)
  for got, step in (
    (to_bfloat16(x, noise).astype(jnp.float32), 2**-8),
    (code.decode(code.encode(x, noise)), 1 / 127),
  ):
    assert float(jnp.abs(got - x).max()) <= step
    np.testing.assert_allclose(got.mean(1), x[:, 0], atol=step / 25)
  exact = jnp.float32(0.5).astype(jnp.bfloat16).astype(jnp.float32)[None]
  assert to_bfloat16(exact, jnp.ones(1) * 0.999)[0] == 0.5


WIDE = {'kernel': (64, 128), 'bias': (128,)}
@pytest.mark.parametrize(('name', 'moments', 'bound'), [
  ('adamw', 'bfloat16', 0.01), ('adamw', 'int8_dynamic', 0.05), ('adamw', 'int8_linear', 0.2),
  ('lion', 'int8_dynamic', 0.05), ('muon', 'int8_dynamic', 0.02), ('prodigy', 'bfloat16', 0.01),
  ('schedule_free', 'int8_linear', 0.1),
])
def test_moments_of_fewer_bits_lead_to_nearly_the_same_place(name, moments, bound):
  """bound: on how far off that is, as a fraction of the way gone in six steps."""
  problem = _quadratic(WIDE)
  (wanted, whole), (found, small) = (
    _descend(make_optimizer(_config(name, moments=kind), problem[0], 100, 'cpu'), *problem)
    for kind in ('float32', moments)
  )
  way = np.linalg.norm(wanted['kernel'] - problem[0]['kernel'])
  assert 0 < np.linalg.norm(found['kernel'] - wanted['kernel']) / way < bound
  few, many = (sum(x.nbytes for x in jax.tree.leaves(state)) for state in (small, whole))
  assert few / many < (0.85 if name in ('prodigy', 'schedule_free') else 0.6)


def test_a_small_second_moment_follows_its_gradients_only_with_rounding_at_random():
  """Its mean falls from 1 to 0.25, in steps of less than bfloat16 can tell."""
  params = {'kernel': jnp.zeros((64, 128))}
  made = optax.scale_by_rms(0.999, initial_scale=1.0)
  optimizer = stored(optax.GradientTransformationExtraArgs(
    made.init, lambda grads, state, params, use: made.update(grads, state, params)
  ), 'bfloat16', 'rms')

  def one(state, _):
    return optimizer.update({'kernel': jnp.full((64, 128), 0.5)}, state, params)[1], ()

  state = jax.lax.scan(one, optimizer.init(params), None, length=1000)[0]
  wanted = 0.25 + 0.75 * 0.999**1000
  assert abs(float(state.state.nu['kernel'].astype(jnp.float32).mean()) - wanted) < 5e-3
  value = jnp.ones((), jnp.bfloat16)
  for _ in range(10):
    value = (0.999 * value.astype(jnp.float32) + 0.001 * 0.25).astype(jnp.bfloat16)
  assert value == 1  # To the nearest it would stay.


class Wide(Regression):
  """A regression with a kernel that is large enough for blocks."""

  def initialize(self, key):
    return {'kernel': jax.random.normal(key, (64, 128)), 'bias': jnp.zeros(128)}


def _batch(step, mesh):
  rng = np.random.default_rng(step)
  x, y = rng.normal(size=(16, 64)), rng.normal(size=(16, 128))
  return put_batch({'x': x.astype('f4'), 'y': y.astype('f4')}, mesh)


def _steps(optimizer, mesh, ema=0.0):
  """(jitted step, fresh state, its shapes)."""
  task = Wide()
  abstract = abstract_state(task, optimizer, ema > 0, mesh)
  step = make_step(task, optimizer, abstract, batch_size=16, ema_halflife_images=ema or 1.0)
  return step, initializer(task, optimizer, 0, abstract)(None), abstract


MESHES = (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2))
KINDS = {
  'adamw': 'int8_dynamic', 'adafactor': 'float32', 'muon': 'int8_linear',
  'schedule_free': 'bfloat16',
}


@pytest.mark.parametrize('name', KINDS)
def test_eight_devices_train_as_one_and_hold_their_share(name):
  """To the bound of a moment that lies on the edge between two values and is rounded otherwise."""
  results, held_bytes = [], []
  for config in MESHES:
    mesh = make_mesh(config, jax.devices()[: 1 if config is MESHES[0] else 8])
    chosen = _config(name, moments=KINDS[name], options=OPTIONS.get(name, {}))
    optimizer = make_optimizer(chosen, _random(0, WIDE), 10, 'cpu')
    step, state, abstract = _steps(optimizer, mesh)
    for i in range(2):
      state, _ = step(state, {}, _batch(i, mesh))
    results.append(to_host(state.params))
    held_bytes.append(held(abstract.opt_state))
  start = to_host(initializer(Wide(), optimizer, 0, abstract)(None).params)
  way = np.abs(results[0]['kernel'] - start['kernel']).max()
  assert way > 0
  exact = KINDS[name] == 'float32'
  away = np.abs(results[1]['kernel'] - results[0]['kernel'])
  assert away.max() < (1e-3 if exact else 0.3) * way and away.mean() < 1e-3 * way
  if name != 'adafactor':
    assert held_bytes[1] < 0.45 * held_bytes[0]


@pytest.mark.parametrize(('name', 'moments'), [
  ('schedule_free', 'bfloat16'), ('adamw', 'int8_dynamic'),
])
def test_a_saved_run_goes_on_to_the_bit(tmp_path, name, moments):
  """And each step's loss is where schedule-free takes gradients, elsewhere at the parameters."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:2])
  optimizer = make_optimizer(_config(name, moments=moments), _random(0, WIDE), 10, 'cpu')
  step, state, abstract = _steps(optimizer, mesh, ema=50.0)
  for i in range(2):
    state, _ = step(state, {}, _batch(i, mesh))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(2, {'opt_state': state.opt_state, 'params': state.params, 'ema': state.ema,
                       'rest': {'step': state.step, 'key': state.key, 'guard': state.guard}}, {})
  assert checkpoints.wait()
  for i in range(2, 4):
    params, batch = gradients_at(state.opt_state, state.params), _batch(i, mesh)
    losses = [
      float(Wide().loss(p, {}, {}, batch, state.key, 0)[0]) for p in (params, state.params)
    ]
    state, metrics = step(state, {}, batch)
    assert float(metrics['loss'].total / metrics['loss'].count) == pytest.approx(losses[0], 1e-5)
    assert (losses[0] != pytest.approx(losses[1], 1e-3)) == (name == 'schedule_free')
  _, parts, _ = Checkpoints(tmp_path).restore({
    'opt_state': abstract.opt_state, 'params': abstract.params, 'ema': abstract.ema,
    'rest': {'step': abstract.step, 'key': abstract.key, 'guard': abstract.guard},
  })
  again = abstract._replace(**parts.pop('rest'), **parts)
  for i in range(2, 4):
    again, _ = step(again, {}, _batch(i, mesh))
  jax.tree.map(np.testing.assert_array_equal, to_host(again), to_host(state))
  if moments.startswith('int8'):
    assert any(isinstance(x, Blocks) for x in jax.tree.leaves(
      state.opt_state, is_leaf=lambda x: isinstance(x, Blocks)
    ))
