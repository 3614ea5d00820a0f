"""Prompts with weights against the web UI's convention, written here in PyTorch by hand."""

import dataclasses

import numpy as np
import pytest

from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.pipelines.options import WEIGHTED
from tests.parity import small_pipelines as small
from tests.parity.test_parity_pipelines import assert_same, draw, draw_theirs

torch = pytest.importorskip('torch')

PROMPTS = ['a (cab:1.5) [b] c d (e (f)) g h ab', 'd BREAK (ab:0.4)']
NEGATIVE = r'c (h) \(a'
ROOM = small.LENGTH - 2
# Words and weights of each chunk; the first prompt is one word longer than a chunk.
CHUNKS = [
  [[('a', 1), ('cab', 1.5), ('b', 1 / 1.1), ('c', 1), ('d', 1), ('e', 1.1), ('f', 1.21), ('g', 1)],
   [('h', 1), ('ab', 1)]],
  [[('d', 1)], [('ab', 0.4)]],
]
NEGATIVE_CHUNKS = [[('c', 1), ('h', 1.1), ('(', 1), ('a', 1)], []]


def numbers(tokenizer, chunk):
  """Ids and factors of a chunk, framed and padded."""
  vocabulary = tokenizer.get_vocab()
  begin, end = (vocabulary[f'<|{name}oftext|>'] for name in ('start', 'end'))
  known = [vocabulary.get(f'{word}</w>', tokenizer.unk_token_id) for word, _ in chunk]
  rest = ROOM - len(chunk)
  return ([begin, *known, end, *[tokenizer.pad_token_id] * rest],
          [1.0, *(weight for _, weight in chunk), 1.0, *[1.0] * rest])


def reference(encoder, tokenizer, chunks, skip):
  """Chunk by chunk: hidden states times factors, brought back to their mean, one after another."""
  texts, pooled = [], []
  for chunk in chunks:
    ids, factors = numbers(tokenizer, chunk)
    out = encoder(torch.tensor([ids]), output_hidden_states=True)
    z = out.hidden_states[-2] if skip else out.last_hidden_state
    weighted = z * torch.tensor(factors)[None, :, None]
    texts.append(weighted * (z.mean() / weighted.mean()))
    pooled.append(out.text_embeds if hasattr(out, 'text_embeds') else out.pooler_output)
  return torch.cat(texts, dim=1), pooled[0]


@pytest.mark.parametrize('name', ['sd1', 'sdxl'])
@torch.no_grad()
def test_pictures_of_weighted_prompts(name, tmp_path):
  """Through diffusers' pipelines, which take what the reference has encoded."""
  theirs = small.make(name)
  theirs.save_pretrained(tmp_path / name)
  model, weights, sample = load_model(str(tmp_path / name))
  encoders = [(theirs.text_encoder, theirs.tokenizer)]
  if name == 'sdxl':
    encoders.append((theirs.text_encoder_2, theirs.tokenizer_2))
  read = lambda chunks: [reference(*one, chunks, name == 'sdxl') for one in encoders]
  join = lambda parts: torch.cat([text for text, _ in parts], dim=-1)
  every = [read(chunks) for chunks in (*CHUNKS, NEGATIVE_CHUNKS)]
  text, pooled = torch.cat(list(map(join, every))), torch.cat([parts[-1][1] for parts in every])
  own = dataclasses.replace(sample, prompt_syntax=WEIGHTED)
  rows = model.rows(PROMPTS, NEGATIVE, syntax=WEIGHTED)
  condition, negative = model.text.pair(weights, rows)
  np.testing.assert_allclose(condition['text'], text[:2].numpy(), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(negative['text'], text[[2, 2]].numpy(), rtol=1e-4, atol=1e-5)
  told = {'prompt_embeds': text[:2], 'negative_prompt_embeds': text[[2, 2]]}
  if name == 'sdxl':
    np.testing.assert_allclose(condition['pooled'], pooled[:2].numpy(), rtol=1e-4, atol=1e-5)
    told |= {'pooled_prompt_embeds': pooled[:2], 'negative_pooled_prompt_embeds': pooled[[2, 2]]}
  wanted = draw_theirs(theirs, negative=None, prompts=None, **told)
  ours = model, weights, own
  assert_same(draw(*ours, prompts=PROMPTS, negative=NEGATIVE), wanted, name)
  changed = [PROMPTS[0].replace('1.5', '0.2'), PROMPTS[1]]
  for prompts, against in ((changed, NEGATIVE), (PROMPTS, 'c h a')):
    other = draw(*ours, prompts=prompts, negative=against)
    assert np.abs(other - wanted).max() > 5e-4
