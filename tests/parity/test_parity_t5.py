"""T5 against transformers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

from diffusion_jax.formats.networks import load_params, read_part, resolve, save_params
from diffusion_jax.formats.published import from_published
from diffusion_jax.models import network
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.t5 import T5Config, relative_position_buckets
from diffusion_jax.models.text.t5_decoder import (
  T5ForConditionalGeneration,
  shifted,
  token_losses,
)

torch = pytest.importorskip('torch')

TINY = dict(vocab_size=20, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
CONFIGS = {
  'T5': dict(TINY, feed_forward_proj='relu'),
  'T5 v1.1': dict(
    TINY, feed_forward_proj='gated-gelu', num_heads=5, relative_attention_num_buckets=8,
    relative_attention_max_distance=6, layer_norm_epsilon=1e-3,
  ),
}
IDS = np.random.default_rng(0).integers(2, 20, (2, 11))
MASK = np.array([[1] * 11, [1] * 6 + [0] * 5])


@pytest.mark.parametrize(('length', 'buckets', 'longest'), [
  (300, 32, 128), (40, 8, 16), (90, 64, 65), (5, 4, 2),
])
def test_relative_position_buckets(length, buckets, longest):
  places = torch.arange(length)
  wanted = T5Attention._relative_position_bucket(
    places[None] - places[:, None], True, buckets, longest
  )
  np.testing.assert_array_equal(relative_position_buckets(length, buckets, longest), wanted)


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_gradients_and_files(
  name, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(transformers.T5EncoderModel(transformers.T5Config(**CONFIGS[name])))
  config, graphdef, params = ported('t5', theirs)
  ids, mask = torch.tensor(IDS), torch.tensor(MASK)
  wanted = theirs(ids, attention_mask=mask).last_hidden_state
  (wanted * mask[..., None]).pow(2).mean().backward()
  with torch.no_grad():
    unmasked = theirs(ids).last_hidden_state.numpy()

  def loss(params):
    hidden, pooled = network.merge(graphdef, params).encode_text(IDS, MASK)
    assert pooled is None
    return jnp.square(hidden * MASK[..., None]).mean(), hidden

  gradients, hidden = quick_jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(hidden, wanted.detach().numpy(), atol=1e-4)
  plain, _ = quick_jit(lambda params: network.merge(graphdef, params).encode_text(IDS))(params)
  np.testing.assert_allclose(plain, unmasked, atol=1e-4)
  assert_same_gradients(theirs, gradients)

  save_params(tmp_path / 'ours', config, params)
  back = transformers.T5EncoderModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)
  with torch.no_grad():
    np.testing.assert_array_equal(back(ids).last_hidden_state.numpy(), unmasked)
  assert load_params('t5', tmp_path / 'ours')[0] == config


@pytest.mark.parametrize('seed', range(2))
def test_random_configs(seed, randomized, ported, quick_jit):
  rng = np.random.default_rng(seed)
  theirs = randomized(transformers.T5EncoderModel(transformers.T5Config(
    vocab_size=20, d_model=int(rng.integers(3, 12)), d_kv=int(rng.integers(1, 6)),
    d_ff=int(rng.integers(3, 20)), num_layers=int(rng.integers(1, 4)),
    num_heads=int(rng.integers(1, 5)), feed_forward_proj=str(rng.choice(['relu', 'gated-gelu'])),
    relative_attention_num_buckets=4 * int(rng.integers(1, 5)),
    relative_attention_max_distance=int(rng.integers(5, 20)),
  )))
  _, graphdef, params = ported('t5', theirs)
  with torch.no_grad():
    wanted = theirs(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).last_hidden_state
  hidden, _ = quick_jit(lambda p: network.merge(graphdef, p).encode_text(IDS, MASK))(params)
  np.testing.assert_allclose(hidden, wanted.numpy(), atol=1e-4)


def test_the_table_of_tokens_by_either_name_or_both_and_beside_a_decoder(tmp_path, randomized):
  """Published files name the one tied table as they like; a whole T5 has the encoder we want."""
  whole = randomized(transformers.T5ForConditionalGeneration(transformers.T5Config(**TINY)))
  whole.save_pretrained(tmp_path)
  _, params = load_params('t5', tmp_path)
  file = tmp_path / 'model.safetensors'
  tensors = load_file(file)
  assert any(name.startswith('decoder.') for name in tensors)
  np.testing.assert_array_equal(params['shared.embedding'], whole.shared.weight.detach().numpy())
  encoder = {n: t for n, t in tensors.items() if n.startswith('encoder.block')}
  encoder['encoder.final_layer_norm.weight'] = tensors['encoder.final_layer_norm.weight']
  for names in (['shared'], ['encoder.embed_tokens'], ['shared', 'encoder.embed_tokens']):
    save_file(encoder | {f'{n}.weight': tensors['shared.weight'] for n in names}, file)
    again = load_params('t5', tmp_path)[1]
    assert again.keys() == params.keys()
    assert all(np.array_equal(again[n], params[n]) for n in params)


@pytest.mark.parametrize(('length', 'buckets', 'longest'), [(300, 32, 128), (40, 8, 16)])
def test_position_buckets_of_a_causal_decoder(length, buckets, longest):
  places = torch.arange(length)
  wanted = T5Attention._relative_position_bucket(
    places[None] - places[:, None], False, buckets, longest
  )
  found = relative_position_buckets(length, buckets, longest, causal=True)
  seen = np.tril(np.ones((length, length), bool))
  np.testing.assert_array_equal(found[seen], wanted.numpy()[seen])


@pytest.mark.parametrize('name', CONFIGS)
def test_losses_of_encoder_and_decoder_and_their_gradients(
  name, randomized, quick_jit, assert_same_gradients
):
  values = CONFIGS[name] | {'num_decoder_layers': 3}
  tied = values['feed_forward_proj'] == 'relu'
  theirs = randomized(transformers.T5ForConditionalGeneration(transformers.T5Config(
    **values, tie_word_embeddings=tied, decoder_start_token_id=0, dropout_rate=0.0,
  )))
  if not tied:  # The library ties it all the same, without the scale that goes with it.
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
  ours = Network.of(T5ForConditionalGeneration, T5Config(**values))
  twice = {'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'}
  twice |= {'lm_head.weight'} if tied else set()
  tensors = {n: x.numpy() for n, x in theirs.state_dict().items() if n not in twice}
  params = from_published(tensors, ours.shapes, name)
  targets = np.random.default_rng(1).integers(2, 20, (2, 7))
  targets[1, 5:] = 0
  labels = torch.tensor(np.where(targets == 0, -100, targets))
  previous = torch.tensor(np.asarray(shifted(jnp.asarray(targets), 0)))
  found = theirs(
    torch.tensor(IDS), attention_mask=torch.tensor(MASK), decoder_input_ids=previous, labels=labels
  )
  found.loss.backward()

  def loss(params):
    loss, _, real = token_losses(ours.bind(params), IDS, MASK, jnp.asarray(targets), 0)
    return loss.sum() / real.sum()

  value, gradients = quick_jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, found.loss.item(), rtol=1e-4)
  assert_same_gradients(theirs, gradients)


def test_the_one_in_the_package_is_read_as_by_transformers(quick_jit):
  """Weights and tokenizer; texts are of different lengths."""
  folder = resolve('asset:t5-wordnet')
  theirs = transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  part = read_part('asset:t5-wordnet')
  texts = ['a large animal of the sea', 'a small fish that lives in water', 'to sign a legal paper']
  ids = tokenizer(texts, padding=True, return_tensors='np')
  mask = ids['attention_mask']
  with torch.no_grad():
    wanted = theirs(
      input_ids=torch.tensor(ids['input_ids']), attention_mask=torch.tensor(mask)
    ).last_hidden_state.numpy()
  encode = quick_jit(lambda params: part.network().bind(params).encode_text(
    ids['input_ids'], mask
  )[0])
  found = np.asarray(encode(part.load()))
  np.testing.assert_allclose(found * mask[..., None], wanted * mask[..., None], atol=1e-3)
