"""PriorTransformer against diffusers, with random weights; Karlo's by its count."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.networks import save_params
from diffusion_jax.formats.prior import PRIOR
from diffusion_jax.models import network
from diffusion_jax.models.prior import PriorTransformerConfig
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

SHAPE = dict(
  num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=6, num_embeddings=5,
)


def test_output_and_files(tmp_path, randomized, ported, quick_jit, assert_same_weights):
  theirs = randomized(diffusers.PriorTransformer(**SHAPE))
  config, graphdef, params = ported('prior', theirs)
  rng = np.random.default_rng(0)
  x, text, pooled = (
    rng.normal(size=shape).astype(np.float32) for shape in ((3, 6), (3, 5, 6), (3, 6))
  )
  t, mask = np.array([0, 7, 990]), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
  tensor = torch.tensor
  wanted = theirs(
    tensor(x), tensor(t), tensor(pooled), tensor(text), tensor(mask).bool()
  ).predicted_image_embedding.detach()
  run = quick_jit(lambda params, mask, text: network.merge(graphdef, params)(
    jnp.asarray(x), jnp.asarray(t, jnp.float32), Condition(text=text, pooled=pooled, mask=mask)
  ))
  np.testing.assert_allclose(run(params, mask, text), wanted, atol=1e-4)
  # Padding is not seen.
  other = np.where(mask[..., None] == 1, text, 99.0)
  np.testing.assert_allclose(run(params, mask, other), wanted, atol=1e-4)
  save_params(tmp_path / 'ours', config, params)
  back = diffusers.PriorTransformer.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)


def test_karlo_by_its_count():
  with torch.device('meta'):
    theirs = diffusers.PriorTransformer()
  ours = PRIOR.shapes(PriorTransformerConfig())
  wanted = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
  assert sum(value.size for value in ours.values()) == sum(map(np.prod, wanted.values()))
  assert len(ours) == len(wanted)
