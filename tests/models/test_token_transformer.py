"""DALL-E's transformer: against GPT-2, causal, the same with its cache, and what is drawn of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.network import Network
from diffusion_jax.models.token_transformer import (
  Filter,
  TokenTransformer,
  TokenTransformerConfig,
  filtered,
  sample_tokens,
)

CONFIG = TokenTransformerConfig(
  hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=11,
  text_length=5, image_vocab_size=7, rows=2, columns=3,
)
LENGTH, PLACES = CONFIG.text_length, CONFIG.places


@pytest.fixture(scope='module')
def made():
  """(network, parameters, texts, images)."""
  network, rng = Network.of(TokenTransformer, CONFIG), np.random.default_rng(0)
  params = {
    name: jnp.asarray(rng.normal(size=leaf.shape, scale=0.5), jnp.float32)
    for name, leaf in network.shapes.items()
  }
  params['image_head.bias'] = jnp.zeros(7)  # Or it would decide everything.
  return network, params, rng.integers(0, 11, (3, LENGTH)), rng.integers(0, 7, (3, PLACES))


def test_blocks_are_those_of_gpt2(made):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  network, params, text, image = made
  theirs = transformers.GPT2Model(transformers.GPT2Config(
    vocab_size=3, n_positions=LENGTH + PLACES, n_embd=8, n_layer=2, n_head=2, n_inner=16,
    attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
  )).eval()
  names = {'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2', 'mlp.c_fc': 'mlp.fc1',
           'mlp.c_proj': 'mlp.fc2', 'attn.c_proj': 'self_attn.out_proj'}
  state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
  array = lambda name: torch.tensor(np.asarray(params[name]))
  for layer in range(2):
    own = f'encoder.layers.{layer}.'
    for name, ours in names.items():
      kernel = 'scale' if 'norm' in ours else 'kernel'
      state[f'h.{layer}.{name}.weight'] = array(f'{own}{ours}.{kernel}')
      state[f'h.{layer}.{name}.bias'] = array(f'{own}{ours}.bias')
    for leaf, theirs_leaf in (('kernel', 'weight'), ('bias', 'bias')):
      state[f'h.{layer}.attn.c_attn.{theirs_leaf}'] = torch.cat(
        [array(f'{own}self_attn.{part}_proj.{leaf}') for part in 'qkv'], -1
      )
  state['ln_f.weight'], state['ln_f.bias'] = (
    array(f'final_layer_norm.{leaf}') for leaf in ('scale', 'bias')
  )
  theirs.load_state_dict(state)
  table = lambda name: np.asarray(params[f'{name}_embedding.embedding'])
  number = np.arange(PLACES - 1)
  embedded = np.concatenate([
    table('token')[text] + table('position'),
    table('image')[image[:, :-1]] + table('row')[number // 3] + table('column')[number % 3],
  ], axis=1)
  states = theirs(inputs_embeds=torch.tensor(embedded)).last_hidden_state.detach().numpy()
  logits = jax.jit(lambda p: network.bind(p)(text, image))(params)
  head = lambda name, x: x @ np.asarray(params[f'{name}.kernel']) + params[f'{name}.bias']
  np.testing.assert_allclose(logits[0], head('text_head', states[:, : LENGTH - 1]), atol=1e-4)
  np.testing.assert_allclose(logits[1], head('image_head', states[:, LENGTH - 1 :]), atol=1e-4)


def test_no_token_is_predicted_from_itself_or_a_later_one(made):
  """By gradients of each prediction with respect to the embedding of every place."""
  network, params, _, _ = made
  text, image = jnp.arange(LENGTH)[None], jnp.arange(PLACES)[None]  # A row of the tables for each.

  def predictions(tables):
    logits = network.bind(params | tables)(text, image)
    return jnp.concatenate([logits[0].sum(-1)[0], logits[1].sum(-1)[0]])

  names = ('token_embedding.embedding', 'image_embedding.embedding')
  found = jax.jit(jax.jacrev(predictions))({name: params[name] for name in names})
  given = np.concatenate([
    np.abs(found[name]).sum(-1)[:, :count]
    for name, count in zip(names, (LENGTH, PLACES), strict=True)
  ], axis=1)
  # Row i predicts the token i + 1.
  reached = given > 1e-7
  np.testing.assert_array_equal(reached, np.tril(np.ones_like(reached)))


def test_the_cached_path_has_the_logits_of_the_whole(made):
  network, params, text, image = made

  @jax.jit
  def run(params):
    model = network.bind(params)
    logits, cache = model.begin(text)
    found = [logits]
    for number in range(PLACES - 1):
      logits, cache = model.step(jnp.asarray(image)[:, number], cache, jnp.int32(number))
      found.append(logits)
    return jnp.stack(found, 1), model(text, image)[1]

  cached, whole = run(params)
  np.testing.assert_allclose(cached, whole, atol=2e-5)


def numpy_filter(logits, temperature, top_k, top_p):
  logits = logits.astype(np.float64) / temperature
  order = np.argsort(-logits)
  kept = order[: top_k or len(order)]
  p = np.exp(logits[kept] - logits[kept].max())
  p /= p.sum()
  count = int(np.searchsorted(np.cumsum(p), top_p) + 1) if top_p < 1 else len(kept)
  out = np.full(len(logits), -np.inf)
  out[kept[:count]] = logits[kept[:count]]
  return out


@pytest.mark.parametrize(('temperature', 'top_k', 'top_p'), [
  (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.6), (0.7, 5, 0.5),
  (1.0, 0, 1e-9), (1.0, 99, 0.99),
])
def test_filters_are_those_of_numpy(temperature, top_k, top_p):
  logits = np.random.default_rng(3).normal(size=(4, 12), scale=2).astype(np.float32)
  found = filtered(jnp.asarray(logits), Filter(temperature, top_k, top_p))
  wanted = np.stack([numpy_filter(row, temperature, top_k, top_p) for row in logits])
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_drawing_is_greedy_guided_and_each_image_has_its_own_numbers(made):
  network, params, text, _ = made
  keys = jax.random.split(jax.random.key(5), 3)
  null = np.zeros_like(text)

  @jax.jit
  def draw(text, keys, keep, guidance):
    return sample_tokens(network.bind(params), text, keys, keep, null[: len(text)], guidance)

  greedy = Filter(1.0, jnp.int32(1), 1.0)
  found = draw(text, keys, greedy, 4.0)
  assert found.shape == (3, PLACES)
  told, untold = (
    jax.jit(lambda t: network.bind(params)(t, found)[1])(t) for t in (text, null)
  )
  # By the whole forward pass of what was drawn: each token is the likeliest of the guided logits.
  np.testing.assert_array_equal((untold + 4.0 * (told - untold)).argmax(-1), found)
  assert (told.argmax(-1) != found).any()
  free = Filter(1.0, jnp.int32(0), 1.0)
  every = draw(text, keys, free, 1.0)
  swapped = draw(text[::-1], keys[::-1], free, 1.0)
  np.testing.assert_array_equal(swapped, every[::-1])
  same = draw(text[[0, 0, 0]], keys, free, 1.0)
  assert (np.asarray(same[0]) != same[1]).any()


def test_drawn_tokens_have_the_probabilities_of_the_model(made):
  """The first token, over many images, against the softmax of the whole forward pass."""
  network, params, text, image = made
  many = 4000
  keys = jax.random.split(jax.random.key(1), many)
  small = {name: 0.5 * value for name, value in params.items()}
  model = network.bind(small)
  logits, _ = model.begin(jnp.asarray(text[:1]))
  wanted = jax.nn.softmax(model(text[:1], image[:1])[1][0, 0])
  np.testing.assert_allclose(jax.nn.softmax(logits[0]), wanted, atol=1e-5)
  drawn = jax.jit(lambda keys: sample_tokens(
    network.bind(small), jnp.broadcast_to(text[:1], (many, LENGTH)), keys, Filter()
  ))(keys)
  frequencies = np.bincount(np.asarray(drawn)[:, 0], minlength=7) / many
  np.testing.assert_allclose(frequencies, wanted, atol=0.03)
