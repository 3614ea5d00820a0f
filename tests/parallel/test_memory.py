"""No device holds the whole: initialisation, Stable Diffusion XL's state, rematerialisation."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.backend.xla import jit
from diffusion_jax.errors import UserError
from diffusion_jax.formats.unet import UNETS
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.lora import LoRAConfig, targets, with_lora
from diffusion_jax.models.network import Network
from diffusion_jax.models.perceptual import Discriminator
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.train.compile import held
from diffusion_jax.train.optimizer import OptimizerConfig, make_optimizer
from diffusion_jax.train.state import abstract_state, initializer
from diffusion_jax.train.tasks.task import Task
from diffusion_jax.types import Condition
from tests import tiny

FSDP = MeshConfig(data=1, fsdp=8)
FSDP_TENSOR = MeshConfig(data=1, fsdp=4, tensor=2)
SMALL = dict(
  sample_size=8, layers_per_block=1, norm_num_groups=4, cross_attention_dim=64,
  attention_head_dim=2,
)
WIDE = UNetConfig(block_out_channels=(64,), down_block_types=('DownBlock2D',),
                  up_block_types=('UpBlock2D',), **SMALL)
DEEP = DiTConfig(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
                 num_layers=6, sample_size=16, num_embeds_ada_norm=3)


class Training(Task):
  """Holds a network's parameters; this is about where they are, not what is done with them."""

  def __init__(self, network: Network):
    self.network = network

  def initialize(self, key):
    return self.network.initialize(key)

  def loss(self, *_):
    raise NotImplementedError


class Known(Training):
  """Begins with zeros of the shapes that are known: tracing a large network's takes seconds."""

  def initialize(self, key):
    return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in self.network.shapes.items()}


def state_of(network: Network, mesh, kind=Training):
  """(task, optimizer, abstract state) with Adam and an average."""
  task, optimizer = kind(network), make_optimizer(OptimizerConfig(), network.shapes, 10, 'cpu')
  return task, optimizer, abstract_state(task, optimizer, True, mesh)


def test_initialisation_never_holds_the_whole_model_on_a_device():
  network, mesh = Network.of(UNet, WIDE), make_mesh(FSDP)
  task, optimizer, state = state_of(network, mesh)
  memory = initializer(task, optimizer, 0, state).lower(None).compile().memory_analysis()
  pointers = 8 * len(jax.tree.leaves(state))
  assert memory.output_size_in_bytes == pytest.approx(held(state) + pointers, rel=1e-3)
  whole = 4 * sum(p.size for p in network.shapes.values())
  largest = 4 * max(p.size for p in network.shapes.values())
  assert held(state) < 4 * 0.14 * whole  # Parameters, two moments, average.
  assert memory.temp_size_in_bytes < largest < whole / 9


@pytest.fixture(scope='module')
def sdxl():
  return Network.of(UNet, UNETS['sdxl'])


@pytest.mark.parametrize(('config', 'wanted'), [
  (FSDP, 1_289_313_936), (FSDP_TENSOR, 1_289_273_616), (MeshConfig(), 10_269_854_736),
])
def test_stable_diffusion_xl_on_eight_devices(sdxl, config, wanted):
  mesh = make_mesh(config)
  _, _, state = state_of(sdxl, mesh, Known)
  moments = state.opt_state
  for part in (state.params, state.ema, moments.mu, moments.nu):
    assert held(part) == wanted
  whole = [leaf.size for leaf in state.params.values()
           if leaf.sharding.shard_shape(leaf.shape) == leaf.shape]
  if mesh.shape['data'] == 1:
    assert wanted == 4 * ((2_567_463_684 - sum(whole)) // 8 + sum(whole))
    assert sum(whole) < 0.001 * 2_567_463_684  # Biases and norms.


def test_the_compiled_step_of_stable_diffusion_xl_is_given_that_state(sdxl):
  """The committed figures of benchmarks/sharding_memory.py, which compiles for minutes."""
  measured = json.loads((tiny.ROOT / 'benchmarks' / 'sharding_memory.json').read_text())
  (found,) = [one for one in measured if (one['model'], one['mesh']) == ('sdxl', '8x1')]
  _, _, state = state_of(sdxl, make_mesh(FSDP), Known)
  assert (found['parameter_bytes'], found['adam_bytes'], found['average_bytes']) == (
    held(state.params), held(state.opt_state), held(state.ema)
  )
  assert found['latents'] == 128 and found['remat'] == 'block'
  given = found['argument_bytes'] - held(state)
  assert 0 < given < 2**20  # Latents, text and sizes of one example.


def gradients(network: Network, *inputs):
  """Temporary bytes and values of the gradients of a loss of the network's output."""
  # Zeros, with which some layers begin, would hide all that lies before them.
  rng = np.random.default_rng(0)
  params = {n: (n.endswith('scale') + 0.05 * rng.normal(size=s.shape)).astype(np.float32)
            for n, s in network.shapes.items()}
  function = jit(  # As the step.
    jax.grad(lambda params: jnp.square(network.bind(params)(*inputs)).mean()),
  )
  compiled = function.lower(params).compile()
  elsewhere = function.trace(params).lower(lowering_platforms=('tpu',)).as_text()
  return compiled.memory_analysis().temp_size_in_bytes, compiled(params), elsewhere


UNET_INPUTS = jnp.ones((4, 16, 16, 4)), jnp.arange(4.0), Condition(jnp.ones((4, 5, 64)))
DIT_INPUTS = (
  jax.random.normal(jax.random.key(1), (8, 32, 32, 4)), jnp.arange(8.0),
  Condition(labels=jnp.arange(8) % 3),
)


@pytest.mark.parametrize(('module', 'config', 'inputs', 'most'), [
  (UNet, WIDE, UNET_INPUTS, 0.8), (DiT, DEEP, DIT_INPUTS, 0.45),
])
def test_rematerialised_gradients_are_the_same_and_take_less_memory(module, config, inputs, most):
  plain = Network.of(module, config)
  kept, wanted, text = gradients(plain, *inputs)
  assert 'pinned_host' not in text
  for remat in ('block', 'offload'):
    network = Network.of(module, config, remat=remat)
    assert network.shapes.keys() == plain.shapes.keys() and network.compute.remat == remat
    temporary, found, text = gradients(network, *inputs)
    assert temporary < most * kept
    for name, value in wanted.items():
      scale = float(jnp.abs(value).max())
      np.testing.assert_allclose(found[name], value, atol=1e-4 * scale + 1e-9, err_msg=name)
    # Simulated devices have one memory, so that the host's is seen in the program for others.
    assert ('pinned_host' in text) == (remat == 'offload')


@pytest.mark.parametrize(('module', 'config', 'blocks'), [
  (AutoencoderKL, tiny.AUTOENCODER, 16), (CLIP, tiny.CLIP, 2),
])
def test_other_networks_compute_their_blocks_again(module, config, blocks):
  network = Network.of(module, config, remat='block')
  pixels = jnp.ones((1, tiny.SIZE, tiny.SIZE, 3))

  def loss(params):
    model = network.bind(params)
    if module is CLIP:
      hidden, _ = model.encode_text(jnp.zeros((1, tiny.LENGTH), jnp.int32))
      return hidden.sum() + model.encode_image(pixels).sum()
    return model.decode(model.encode(pixels)[0]).sum()

  jaxpr = str(jax.make_jaxpr(jax.grad(loss))(network.shapes))
  assert len(re.findall(r'= (?:checkpoint|remat2?)\[', jaxpr)) == blocks


def test_adapters_keep_it_and_networks_without_blocks_refuse_it():
  network = Network.of(UNet, WIDE, remat='block')
  adapted = with_lora(network, targets(network, LoRAConfig()))
  assert adapted.bind(adapted.shapes).up_blocks[0].remat == 'block'
  with pytest.raises(UserError, match='Discriminator has no blocks'):
    Network.of(Discriminator, tiny.DISCRIMINATOR, remat='block')
  with pytest.raises(UserError, match="remat is 'all'; choose one of none, block, offload"):
    Network.of(UNet, WIDE, remat='all')
