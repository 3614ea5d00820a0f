"""Sizes of the mesh, and the places of devices in it.

The table of rules: every parameter has one, and arrays really are split.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from diffusion_jax.errors import UserError
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.controlnet import ControlNet, ControlNetConfig
from diffusion_jax.models.network import Network
from diffusion_jax.models.perceptual import Discriminator, lpips_shapes
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig
from diffusion_jax.models.vision.dinov2 import DINOv2, DINOv2Config
from diffusion_jax.parallel import layout
from diffusion_jax.parallel.layout import AXES, constrain, parameter_spec
from diffusion_jax.parallel.mesh import (
  MeshConfig,
  in_batches,
  local_rows,
  make_mesh,
  place,
  put_batch,
  put_params,
  shard_like,
  shard_params,
  to_host,
)
from tests import tiny


def sizes(mesh):
  return {axis: size for axis, size in mesh.shape.items() if size > 1}


def ids(devices):
  return np.vectorize(lambda device: device.id)(devices)


@pytest.mark.parametrize(('config', 'wanted'), [
  (MeshConfig(), {'data': 8}),
  (MeshConfig(data=2, fsdp=-1, tensor=2), {'data': 2, 'fsdp': 2, 'tensor': 2}),
  (MeshConfig(data=1, fsdp=8), {'fsdp': 8}),
  (MeshConfig(fsdp=2, spatial=2), {'data': 2, 'fsdp': 2, 'spatial': 2}),
  (MeshConfig(dcn_data=2), {'data': 8}),
  (MeshConfig(data=1, fsdp=-1, dcn_data=2), {'data': 2, 'fsdp': 4}),
  (MeshConfig(data=1, fsdp=-1, dcn_data=1, dcn_fsdp=2), {'fsdp': 8}),
  (MeshConfig(fsdp=2, dcn_data=-1, dcn_fsdp=2), {'data': 2, 'fsdp': 4}),
])
def test_minus_one_takes_what_is_left(config, wanted):
  mesh = make_mesh(config)
  assert mesh.axis_names == AXES and sizes(mesh) == wanted
  assert mesh.axis_types == (AxisType.Auto,) * len(AXES)
  assert sorted(ids(mesh.devices).flat) == list(range(8))


@pytest.mark.parametrize(('config', 'words'), [
  (MeshConfig(data=3), 'does not fit 8 devices: mesh.data=3, mesh.fsdp=1'),
  (MeshConfig(data=4), 'does not fit 8 devices'),
  (MeshConfig(data=-1, tensor=3), 'does not fit 8 devices'),
  (MeshConfig(data=-1, fsdp=-1), 'more than one of mesh.data, mesh.fsdp'),
  (MeshConfig(fsdp=0), 'mesh.fsdp is 0'),
  (MeshConfig(tensor=-2), 'mesh.tensor is -2'),
  (MeshConfig(tensor=2, spatial=2), 'mesh.tensor and mesh.spatial are both above 1'),
  (MeshConfig(data=8, dcn_data=2), 'does not fit 4 devices of each of 2 slices'),
  (MeshConfig(dcn_data=3), '8 devices cannot be cut into 3 equal slices'),
  (MeshConfig(dcn_data=0), 'mesh.dcn_data is 0'),
  (MeshConfig(dcn_data=-1, dcn_fsdp=-1), 'more than one of mesh.dcn_data, mesh.dcn_fsdp'),
])
def test_sizes_that_do_not_fit(config, words):
  with pytest.raises(UserError, match=words):
    make_mesh(config)


def test_slices_are_blocks_and_the_inner_axes_stay_within_one():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, dcn_data=2))
  np.testing.assert_array_equal(ids(mesh.devices)[:, :, 0], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, spatial=2, dcn_data=1, dcn_fsdp=2))
  np.testing.assert_array_equal(ids(mesh.devices)[0, :, :, 0], [[0, 1], [2, 3], [4, 5], [6, 7]])


@dataclasses.dataclass(frozen=True)
class Device:
  """What a device of several slices tells of itself; no machine at hand has such."""

  id: int
  slice_index: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'


# Two slices of two processes with two devices each, as jax.devices() might list them.
SLICED = [Device(n, n // 2 % 2, n // 2) for n in range(8)]


@pytest.mark.parametrize('config', [
  MeshConfig(), MeshConfig(data=1, fsdp=-1), MeshConfig(data=2, tensor=2, dcn_data=1, dcn_fsdp=2),
])
def test_devices_that_tell_their_slice_lie_as_jax_lays_them(config):
  mesh = make_mesh(config, SLICED)
  dcn = [1, 2, 1, 1] if config.dcn_fsdp == 2 else [2, 1, 1, 1]
  ici = [size // over for size, over in zip(mesh.devices.shape, dcn, strict=True)]
  jaxs = mesh_utils.create_hybrid_device_mesh(ici, dcn, SLICED)
  np.testing.assert_array_equal(ids(mesh.devices), ids(jaxs))
  half = mesh.devices[: len(mesh.devices) // 2] if dcn[0] == 2 else mesh.devices[:, :1]
  assert {device.slice_index for device in half.flat} == {0}


def test_three_slices_on_two_axes_each_way():
  slices = [[Device(10 * n + i, n, n) for i in range(2)] for n in range(6)]
  grid = ids(place(slices, [1, 2], [3, 2]))
  np.testing.assert_array_equal(grid, [[0, 1, 10, 11], [20, 21, 30, 31], [40, 41, 50, 51]])


@pytest.mark.parametrize(('config', 'devices', 'words'), [
  (MeshConfig(dcn_data=1), SLICED, 'does not fit 2 slices: mesh.dcn_data=1, mesh.dcn_fsdp=1'),
  (MeshConfig(dcn_data=3), SLICED, 'does not fit 2 slices'),
  (MeshConfig(), SLICED[:-1], 'slices have 4, 3 devices'),
])
def test_slices_that_do_not_fit(config, devices, words):
  with pytest.raises(UserError, match=words):
    make_mesh(config, devices)


@dataclasses.dataclass(frozen=True)
class Plain:
  """A device that knows no slice, of one of several processes."""

  id: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def test_elsewhere_a_slice_is_a_group_of_processes_and_no_part_of_one():
  devices = [Plain(n, n // 2) for n in reversed(range(8))]
  mesh = make_mesh(MeshConfig(data=1, fsdp=-1, dcn_data=2), devices)
  np.testing.assert_array_equal(ids(mesh.devices)[:, :, 0, 0], [[0, 1, 2, 3], [4, 5, 6, 7]])
  with pytest.raises(UserError, match=r'8 slices would cut .* a divisor of the 4 processes'):
    make_mesh(MeshConfig(dcn_data=8), devices)


CONTROLNET = ControlNetConfig.for_unet(dataclasses.replace(
  tiny.UNET, num_class_embeds=6, addition_embed_type='text_time', addition_time_embed_dim=4,
  projection_class_embeddings_input_dim=32,
))

DINOV2 = DINOv2Config(
  hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, use_swiglu_ffn=True,
  num_register_tokens=2,
)


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(('name', 'shape', 'wanted'), [
  ('unet.attn1.to_q.kernel', (16, 32), P('fsdp', 'tensor')),
  ('attn1.to_out.0.kernel', (32, 16), P('tensor', 'fsdp')),
  ('mlp.fc1.kernel', (8, 32), P('fsdp', 'tensor')),
  ('mlp.fc2.kernel', (32, 8), P('tensor', 'fsdp')),
  ('conv1.kernel', (3, 3, 4, 8), P(None, None, 'fsdp', 'tensor')),
  ('conv2.kernel', (3, 3, 4, 8), P(None, None, 'tensor', 'fsdp')),
  ('conv_in.kernel', (3, 3, 3, 8), P(None, None, None, 'tensor')),
  ('attention.output.dense.kernel', (16, 16), P('tensor', 'fsdp')),
  ('mlp.weights_out.kernel', (32, 16), P('tensor', 'fsdp')),
  ('layer_scale1.lambda1', (16,), P(None)),
  ('embeddings.cls_token', (1, 1, 16), P(None)),
  ('embeddings.position_embeddings', (1, 16, 16), P(None, 'tensor', 'fsdp')),
  ('token_embedding.embedding', (300, 16), P('tensor', 'fsdp')),
  ('norm1.scale', (8,), P(None)),
  ('conv1.bias', (8,), P(None)),
  ('logit_scale', (), P()),
])
def test_rules(mesh, name, shape, wanted):
  found = parameter_spec(name, shape, mesh.shape)
  pad = lambda p: (*p, *[None] * (len(shape) - len(p)))
  assert pad(found) == pad(wanted)


def test_a_name_without_rule_is_an_error(mesh):
  gate = {'block.gate': jnp.ones((4, 4))}
  with pytest.raises(ValueError, match=r"'block\.gate'; add one by .*add_rules"):
    shard_params(gate, mesh)


def test_rules_from_outside_come_first(mesh, monkeypatch):
  monkeypatch.setattr(layout, 'RULES', list(layout.RULES))
  rules = (r'block\.gate$', P('fsdp')), (r'own\.kernel$', P())
  for _ in range(2):
    layout.add_rules(*rules)
  assert layout.RULES[:2] == list(rules) and layout.RULES.count(rules[0]) == 1
  assert parameter_spec('block.gate', (4, 4), mesh.shape)[0] == 'fsdp'
  assert parameter_spec('own.kernel', (4, 4), mesh.shape) == P(None, None)


@pytest.mark.parametrize('network', [
  (UNet, tiny.UNET), (ControlNet, CONTROLNET), (AutoencoderKL, tiny.AUTOENCODER),
  (Discriminator, tiny.DISCRIMINATOR), (CLIP, tiny.CLIP), (DINOv2, DINOV2),
  (Classifier, ClassifierConfig((8, 16), class_names=('a', 'b'))),
])
def test_every_parameter_has_a_rule_and_most_weights_are_split(mesh, network):
  shapes = Network.of(*network).shapes
  shardings = shard_params(shapes, mesh)
  assert shardings.keys() == shapes.keys()
  parts = {n: np.prod(s.shard_shape(shapes[n].shape)) / shapes[n].size
           for n, s in shardings.items()}
  assert min(parts.values()) <= 0.5
  held = sum(parts[n] * shapes[n].size for n in shapes) / sum(p.size for p in shapes.values())
  assert held < 0.75


def test_lpips_has_rules(mesh):
  assert shard_params(lpips_shapes(), mesh).keys() == lpips_shapes().keys()


def test_params_are_split_and_come_back_whole(mesh):
  values = {'a.to_q.kernel': np.arange(32.0).reshape(4, 8), 'a.to_q.bias': np.arange(8.0)}
  on_mesh = put_params(values, mesh)
  assert on_mesh['a.to_q.kernel'].addressable_shards[0].data.shape == (2, 4)
  assert on_mesh['a.to_q.bias'].addressable_shards[0].data.shape == (8,)
  for name, value in to_host(on_mesh).items():
    np.testing.assert_array_equal(value, values[name])


def test_optimizer_state_is_split_like_its_parameter(mesh):
  params = {'a.to_q.kernel': jnp.ones((4, 8)), 'a.to_q.bias': jnp.ones(8)}
  state = jax.eval_shape(optax.adam(1e-3).init, params)
  shardings = shard_like(state, params, mesh)
  adam = shardings[0]
  assert adam.mu['a.to_q.kernel'].spec == adam.nu['a.to_q.kernel'].spec == P('fsdp', 'tensor')
  assert adam.count.spec == P()


def test_a_batch_is_split_over_data_and_fsdp(mesh):
  batch = put_batch({'image': np.arange(24.0).reshape(8, 3)}, mesh)
  shards = batch['image'].addressable_shards
  assert {shard.data.shape for shard in shards} == {(2, 3)}
  rows = {tuple(np.asarray(shard.data)[:, 0]) for shard in shards}
  assert rows == {(0, 3), (6, 9), (12, 15), (18, 21)}


def test_one_process_holds_every_row_once(mesh):
  np.testing.assert_array_equal(local_rows(mesh, 12), np.arange(12))


@pytest.mark.parametrize(('shape', 'shard'), [
  ((8, 16, 16, 3), (2, 8, 16, 3)),  # An image: rows over spatial.
  ((8, 5, 16, 3), (2, 5, 16, 3)), ((8, 4, 6), (2, 4, 6)), ((8,), (2,)),
])
def test_rows_of_images_are_split_over_spatial(shape, shard):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, spatial=2))
  batch = put_batch({'x': np.arange(math.prod(shape), dtype=np.float32).reshape(shape)}, mesh)
  assert {part.data.shape for part in batch['x'].addressable_shards} == {shard}
  np.testing.assert_array_equal(to_host(batch['x']).ravel(), np.arange(math.prod(shape)))


@pytest.mark.parametrize(('kind', 'shape', 'wanted'), [
  ('image', (8, 4, 4, 6), P(('data', 'fsdp'), 'spatial', None, None)),
  ('features', (8, 4, 4, 6), P(('data', 'fsdp'), 'spatial', None, 'tensor')),
  ('queries', (8, 4, 2, 6), P(('data', 'fsdp'), 'spatial', 'tensor', None)),
  ('queries', (8, 5, 1, 6), P(('data', 'fsdp'), 'spatial', None, None)),
  ('keys', (6, 4, 2, 6), P(None, None, 'tensor', None)),
])
def test_activations_are_constrained_under_a_mesh_alone(mesh, kind, shape, wanted):
  x = jnp.ones(shape)
  assert 'sharding_constraint' not in str(jax.make_jaxpr(lambda x: constrain(x, kind))(x))
  with jax.set_mesh(mesh):
    (equation,) = jax.make_jaxpr(lambda x: constrain(x, kind))(x).eqns
  assert equation.params['sharding'].spec == wanted
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    assert not jax.make_jaxpr(lambda x: constrain(x, kind))(x).eqns


def test_batches_pad_and_cut_without_a_trace():
  mesh = make_mesh(MeshConfig())
  x = np.arange(19.0).reshape(19, 1)
  seen = []
  function = jax.jit(lambda p, x: (seen.append(x.shape), x * p)[1])
  out = list(in_batches(function, 2.0, x, mesh=mesh, batch_size=5))
  assert [len(part) for part in out] == [8, 8, 3] and seen == [(8, 1)]
  np.testing.assert_array_equal(np.concatenate(out), 2 * x)
