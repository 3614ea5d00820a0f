"""The table of rules: every parameter has one, and arrays really are split."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from diffusion_jax.layout import constrain, parameter_spec
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.classifier import Classifier, ClassifierConfig
from diffusion_jax.models.controlnet import ControlNet, ControlNetConfig
from diffusion_jax.models.dinov2 import DINOv2, DINOv2Config
from diffusion_jax.models.discriminator import Discriminator
from diffusion_jax.models.functional import Network
from diffusion_jax.models.lpips import lpips_shapes
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.unet import UNet
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.parallel.sharding import (
  in_batches,
  local_rows,
  put_batch,
  put_params,
  shard_like,
  shard_params,
  to_host,
)
from tests import tiny

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
  with pytest.raises(ValueError, match=r"'block\.gate'; add one to RULES"):
    shard_params({'block.gate': jnp.ones((4, 4))}, mesh)


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
