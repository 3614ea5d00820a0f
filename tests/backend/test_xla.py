"""Programs are compiled for the devices of their mesh or arguments, with the options of XLA there.

Programs of one start of a command are read, not compiled, by the next.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from benchmarks.timing import HIT
from diffusion_jax.backend import cpu, xla
from diffusion_jax.errors import UserError
from diffusion_jax.models.attention import attend, check_attention
from diffusion_jax.models.kernels import check_matmul_precision
from diffusion_jax.models.network import Network
from diffusion_jax.models.unet import UNet
from diffusion_jax.parallel.layout import AXES
from diffusion_jax.types import Condition
from tests import tiny

CHIPS = {
  'tpu': ('tpu', 'TPU v5p', None), 'h100': ('gpu', 'NVIDIA H100 80GB HBM3', (9, 0)),
  'a100': ('gpu', 'NVIDIA A100-SXM4-40GB', (8, 0)), 'amd': ('rocm', 'MI300X', None),
  'cpu': ('cpu', 'cpu', None),
}


def mesh_of(name):
  """An abstract mesh of 4 such chips."""
  platform, kind, _ = CHIPS[name]
  return AbstractMesh(
    (4, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4,
    abstract_device=AbstractDevice(kind, None, platform),
  )


@pytest.mark.parametrize('name', CHIPS)
def test_the_chip_is_that_of_the_mesh(name):
  platform, _, capability = CHIPS[name]
  wanted = xla.Chip('gpu' if platform == 'rocm' else platform, capability)
  assert xla.chip(mesh_of(name)) == wanted
  with jax.sharding.use_abstract_mesh(mesh_of(name)):
    assert xla.chip() == wanted and xla.on_cpu() == (platform == 'cpu')
  assert xla.chip() == xla.Chip('cpu')  # What is here.


def lowered(name, function, *shapes):
  """The text of a program for 4 such chips, lowered in a process that has CPUs alone."""
  mesh = mesh_of(name)
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec('data')))
    for shape in shapes
  ]
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(function).trace(*arguments)
  platform = {'h100': 'cuda', 'a100': 'cuda'}.get(name, CHIPS[name][0])
  return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_program_for_a_chip_that_is_not_here_has_nothing_that_is_meant_for_cpus():
  def program(x):
    x = xla.optimization_barrier(x)
    y = xla.separate(lambda x: (2 * x,))(x)[0]
    return cpu.over_positions(y) + cpu.sum_of_squares([y])

  here, there = lowered('cpu', program, (8, 64, 8)), lowered('tpu', program, (8, 64, 8))
  for words in ('optimization_barrier', 'inlineable', 'dot_general'):
    assert words in here and words not in there


def test_a_network_asks_the_mesh_alone(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: pytest.fail('the default backend was asked'))
  network = Network.of(UNet, tiny.UNET, dtype=jnp.bfloat16)
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  inputs = shape(4, 16, 16, 4), shape(4), Condition(shape(4, 5, tiny.UNET.cross_attention_dim))

  def loss(params, x, t, condition):
    return jnp.square(network.bind(params)(x, t, condition).astype(jnp.float32)).mean()

  text = {}
  for name in ('cpu', 'tpu'):
    with jax.sharding.use_abstract_mesh(mesh_of(name)):
      traced = jax.jit(jax.grad(loss)).trace(network.shapes, *inputs)
    text[name] = traced.lower(lowering_platforms=(name,)).as_text()
  assert 'optimization_barrier' in text['cpu'] and 'optimization_barrier' not in text['tpu']


def test_attention_is_computed_as_suits_the_mesh():
  # Long enough for each platform's own way.
  shape = (4, 4096, 1, 64)
  text = {name: lowered(name, attend, shape, shape, shape) for name in ('cpu', 'tpu')}
  assert 'tpu_custom_call' in text['tpu'] and 'while' in text['cpu']


def test_checks_are_of_the_mesh():
  check_attention('cudnn', jnp.bfloat16, mesh=mesh_of('a100'))
  check_matmul_precision('float8', mesh_of('h100'))
  for name in ('a100', 'tpu', 'cpu'):
    with pytest.raises(UserError, match="'float8' cannot serve here"):
      check_matmul_precision('float8', mesh_of(name))
  with pytest.raises(UserError, match='needs a TPU, and here is gpu'):
    check_attention('splash', jnp.bfloat16, mesh=mesh_of('h100'))


def test_a_program_without_a_mesh_is_for_the_devices_of_its_arguments(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  seen = []
  double = xla.jit(lambda x: (seen.append(xla.chip().platform), 2 * x)[1])
  assert double(jnp.ones(3)).sum() == 6 and seen == ['cpu']
  where = NamedSharding(mesh_of('h100'), PartitionSpec())
  double.trace(jax.ShapeDtypeStruct((3,), jnp.float32, sharding=where))
  assert seen == ['cpu', 'gpu']


@pytest.fixture
def forget():
  """Options are looked up anew, before and after."""
  xla._known_options.cache_clear()
  yield
  xla._known_options.cache_clear()


def test_known_options_are_used_and_unknown_ones_left_out(forget, monkeypatch):
  known = {'xla_cpu_prefer_vector_width': '256'}
  monkeypatch.setitem(xla.OPTIONS, 'cpu', ({'xla_cpu_no_such_option': '1'}, known))
  assert xla.options('cpu') == known and xla.options('tpu') is None
  add = xla.jit(lambda x: x + 1)
  assert add(1) == 2
  # A program within another has the options of that one.
  assert jax.jit(lambda x: 2 * add(x))(1) == 4 and xla.jit(add)(1) == 2


def test_deterministic_programs_have_their_options_and_no_unknown_one(monkeypatch):
  """XLA knows the options of GPUs on every platform, so that those of it are tried here."""
  plain = xla.options('gpu')
  monkeypatch.setitem(xla.DETERMINISTIC, 'cpu', xla.DETERMINISTIC['gpu'])
  xla.use_deterministic(True)
  try:
    assert xla.options('gpu') == xla.DETERMINISTIC['gpu'] and plain is None
    assert xla.jit(lambda x: x + 1)(1) == 2
    monkeypatch.setitem(xla.DETERMINISTIC, 'cpu', {'xla_gpu_no_such_option': True})
    with pytest.raises(jax.errors.JaxRuntimeError, match='xla_gpu_no_such_option'):
      xla.jit(lambda x: x + 2)(1)
  finally:
    xla.use_deterministic(False)


def test_a_separate_part_computes_the_same():
  part = lambda x, y: {'sum': x + y, 'same': y}
  out = jax.jit(lambda x: xla.separate(part)(jnp.sin(x), x))(2.0)
  assert out['sum'] == jnp.sin(2.0) + 2.0 and out['same'] == 2.0


REQUEST = '/jax/compilation_cache/compile_requests_use_cache'
KEYS = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home without anything, where JAX is told nothing of a cache."""
  before = {key: getattr(jax.config, key) for key in KEYS}
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  yield tmp_path
  for key, value in before.items():
    jax.config.update(key, value)
  compilation_cache.reset_cache()


@pytest.mark.parametrize('name', ['sample', 'train'])
def test_a_second_start_compiles_nothing(home, name, command, finished):
  toy = tiny.write_config(home / 'toy.py', tiny.toy_config())
  arguments = {
    'sample': ('--workdir', finished, '--prompt', 'sun'),
    'train': ('--config', toy, '--quiet'),
  }[name]

  def start(number):
    events = []
    heard = lambda event, **more: events.append(event)
    compilation_cache.reset_cache()
    jax.clear_caches()
    out = '--workdir' if name == 'train' else '--out'
    monitoring.register_event_listener(heard)
    try:
      assert command(name, *arguments, out, home / str(number)) == 0
    finally:
      monitoring.unregister_event_listener(heard)
    return events

  start(1)
  assert list((home / '.cache' / 'diffusion_jax' / 'compiled').glob('*-cache'))
  # The first one may have made more, which the process keeps the results of.
  again = start(2)
  assert again.count(HIT) == again.count(REQUEST) > 10
