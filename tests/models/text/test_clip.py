"""CLIP's towers: published sizes, what skipping layers means, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.clip import TEXT_ENCODERS
from diffusion_jax.formats.networks import format_of
from diffusion_jax.models import network
from diffusion_jax.models.text.clip import (
  CLIPConfig,
  CLIPTextConfig,
  CLIPTextModel,
  CLIPTextProjectionConfig,
  CLIPVisionConfig,
  CLIPVisionProjectionConfig,
)

LARGE = CLIPVisionConfig(
  hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
  patch_size=14,
)
HUGE = CLIPVisionProjectionConfig(
  hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
  patch_size=14, hidden_act='gelu', projection_dim=1024,
)


@pytest.mark.parametrize(('config', 'scalars', 'tensors'), [
  (TEXT_ENCODERS['clip_l'], 123_060_480, 196),
  (TEXT_ENCODERS['clip_l_projection'], 123_650_304, 197),
  (TEXT_ENCODERS['openclip_h'], 340_387_840, 372),
  (TEXT_ENCODERS['openclip_bigg'], 694_659_840, 517),
  (CLIPConfig(TEXT_ENCODERS['clip_l'], LARGE, 768), 427_616_513, 590),
  (HUGE, 632_076_800, 520),
])
def test_published_sizes(config, scalars, tensors):
  shapes = format_of(config).shapes(config)
  assert (network.count(shapes), len(shapes)) == (scalars, tensors)


TEXT = CLIPTextConfig(
  hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, vocab_size=20,
  max_position_embeddings=6, eos_token_id=2,
)


def build(module, config, random_params, **kw):
  graphdef, shapes = network.abstract(lambda rngs: module(config, rngs=rngs, **kw))
  return graphdef, random_params(shapes)


def test_skipped_layers_cost_nothing_unless_pooled(random_params):
  graphdef, params = build(CLIPTextModel, TEXT, random_params)
  ids = jnp.ones((1, 6), int)

  def flops(skip, which):
    run = lambda p: network.merge(graphdef, p).encode_text(ids, skip=skip)[which]
    return jax.jit(run).lower(params).compile().cost_analysis()['flops']

  full, less, pooled = flops(0, 0), flops(2, 0), flops(2, 1)
  assert less < 0.5 * full < 0.6 * pooled


def test_an_extra_embedding_is_no_end_of_text(random_params, quick_jit):
  graphdef, params = build(CLIPTextModel, TEXT, random_params)
  extra = params['text_model.embeddings.token_embedding.embedding'][3:5]
  added, plain = jnp.array([[0, 20, 21, 19, 1, 1]]), jnp.array([[0, 3, 4, 19, 1, 1]])
  run = quick_jit(
    lambda ids: network.merge(graphdef, params).encode_text(ids, extra_embeddings=extra)
  )
  for found, wanted in zip(run(added), run(plain), strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-6)
  assert bool(jnp.isnan(run(added.at[0, 1].set(22))[0]).any())


@pytest.mark.parametrize(('make', 'words'), [
  (lambda: CLIPTextProjectionConfig(projection_dim=0), 'projection_dim is 0; give'),
  (lambda: CLIPTextProjectionConfig(hidden_size=7), 'must divide hidden_size=7'),
  (lambda: CLIPVisionProjectionConfig(projection_dim=-1), 'projection_dim is -1; give'),
])
def test_wrong_configs_say_what_is_wrong(make, words):
  with pytest.raises(UserError, match=words):
    make()


@pytest.mark.parametrize(('module', 'config', 'call', 'words'), [
  (CLIPTextModel, TEXT, lambda n: n.encode_text(jnp.ones((1, 3), int), skip=3), 'from 0 to 2'),
  (CLIPTextModel, TEXT, lambda n: n.encode_text(jnp.ones((1, 7), int)), 'l <= 6'),
  (CLIPTextModel, TEXT, lambda n: n.encode_text(
    jnp.ones((1, 3), int), extra_embeddings=jnp.ones((2, 9))), r'must be \[n 8\]'),
])
def test_wrong_inputs_say_what_is_wrong(module, config, call, words):
  graphdef, shapes = network.abstract(lambda rngs: module(config, rngs=rngs))
  with pytest.raises(UserError, match=words):
    jax.eval_shape(lambda params: call(network.merge(graphdef, params)), shapes)
