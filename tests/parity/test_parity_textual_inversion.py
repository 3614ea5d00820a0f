"""Textual inversion against diffusers' loader: the same ids and the same hidden states."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from diffusion_jax.formats.networks import load
from diffusion_jax.formats.textual_inversion import (
  TextualInversion,
  read_textual_inversion,
  write_textual_inversion,
)
from diffusion_jax.models.text.tokenizer import Tokenize, add_placeholder, load_tokenizer

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
from diffusers.loaders import TextualInversionLoaderMixin  # noqa: E402

WORDS = ['a</w>', 'red</w>', 'r', 'e', 'd</w>', 're', '<|startoftext|>', '<|endoftext|>']


class Pipeline(diffusers.DiffusionPipeline, TextualInversionLoaderMixin):
  """The parts of a pipeline that read a prompt."""

  def __init__(self, tokenizer, text_encoder):
    super().__init__()
    self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder)


@pytest.mark.parametrize('count', [1, 3])
@pytest.mark.parametrize('layout', ['diffusers', 'a1111'])
def test_the_same_prompt_in_diffusers(layout, count, tmp_path, randomized):
  tokenizer = transformers.CLIPTokenizer(
    vocab={w: n for n, w in enumerate(WORDS)}, merges=[('r', 'e'), ('re', 'd</w>')]
  )
  theirs = randomized(transformers.CLIPTextModel(transformers.CLIPTextConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8,
    max_position_embeddings=10, eos_token_id=7, bos_token_id=6,
  )))
  tokenizer.save_pretrained(tmp_path / 'tokenizer')
  theirs.save_pretrained(tmp_path / 'text_encoder')
  rows = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
  path = tmp_path / '<cat>.safetensors'
  write_textual_inversion(path, TextualInversion('<cat>', {'text_encoder': rows}), layout)

  pipeline = Pipeline(tokenizer, theirs)
  token = '<cat>' if layout == 'a1111' else None
  pipeline.load_textual_inversion(tmp_path, weight_name=path.name, token=token)
  prompt = pipeline.maybe_convert_prompt('a <cat> red', pipeline.tokenizer)
  ids = pipeline.tokenizer(prompt, padding='max_length', max_length=10)['input_ids']
  with torch.no_grad():
    wanted = pipeline.text_encoder(torch.tensor([ids]))

  learned = read_textual_inversion(path, {'text_encoder': 8})
  ours = load_tokenizer(tmp_path / 'tokenizer')
  add_placeholder(ours, learned.token, len(learned.embeddings['text_encoder']))
  found = Tokenize(ours, 10).batch(['a <cat> red'])
  np.testing.assert_array_equal(found[0], ids)
  hidden, pooled = load('clip_text', tmp_path / 'text_encoder').encode_text(
    jnp.asarray(found), extra_embeddings=jnp.asarray(learned.embeddings['text_encoder'])
  )
  np.testing.assert_allclose(hidden, wanted.last_hidden_state.numpy(), atol=1e-4)
  np.testing.assert_allclose(pooled, wanted.pooler_output.numpy(), atol=1e-4)
