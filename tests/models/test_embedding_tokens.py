"""Embeddings as tokens: principal components in intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.models.embedding_tokens import EmbeddingTokens, EmbeddingTokensConfig, fitted
from diffusion_jax.models.network import Network


def test_tokens_are_intervals_of_principal_components():
  rng = np.random.default_rng(0)
  scales = np.array([4.0, 2.0, 1.0, 0.5])
  turned = np.linalg.qr(rng.normal(size=(4, 4)))[0]
  found = (rng.normal(size=(500, 4)) * scales) @ turned + 3.0
  config = EmbeddingTokensConfig(embedding_dim=4, components=3, intervals=16)
  network = Network.of(EmbeddingTokens, config)
  params = fitted(found, config)
  assert {name: value.shape for name, value in params.items()} == {
    name: leaf.shape for name, leaf in network.shapes.items()
  }
  model = network.bind(jax.tree.map(jnp.asarray, params))
  tokens = model.tokens(jnp.asarray(found, jnp.float32))
  assert tokens.min() == 0 and tokens.max() == 15
  back = np.asarray(model.embeddings(tokens))
  np.testing.assert_array_equal(model.tokens(jnp.asarray(back)), tokens)
  # Within half an interval of each component that is kept; the last one is its mean.
  basis = params['basis_kernel']
  errors = np.abs((back - found) @ basis)
  assert (errors <= params['width_scale'] / 2 + 1e-4).all()
  covariance = np.cov(found.T)
  kept = np.diag(basis.T @ covariance @ basis)
  np.testing.assert_allclose(kept, np.linalg.eigvalsh(covariance)[:0:-1], rtol=1e-4)
  np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)
  outside = model.tokens(jnp.asarray(found * 100, jnp.float32))
  assert outside.min() >= 0 and outside.max() <= 15


def test_no_more_components_than_numbers():
  with pytest.raises(UserError, match='components'):
    EmbeddingTokensConfig(embedding_dim=4, components=5)
