"""Texts of any length, and of no text at all, for every kind of tokenizer."""

import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, T5TokenizerFast

from diffusion_jax.errors import UserError
from diffusion_jax.models.text.tokenizer import CHARACTERS, Cut, Tokenize, train_tokenizer

MEGABYTES = 10 * 2**20
LETTERS = 'abcdefghijklmnopqrstuvwxyz'


def _clip():
  words = ['!', *LETTERS, *(f'{c}</w>' for c in LETTERS), '<|startoftext|>', '<|endoftext|>']
  return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])


def _t5():
  pieces = [('<pad>', 0), ('</s>', 0), ('<unk>', 0), ('▁', -3), *((c, -4) for c in LETTERS)]
  unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
  unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  unigram.post_processor = processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  return T5TokenizerFast(tokenizer_object=unigram, extra_ids=2)


@pytest.fixture(scope='module', params=['clip', 't5', 'ours'])
def tokenizer(request):
  trained = lambda: train_tokenizer(['a red cat'] * 4, vocab_size=300, max_length=77)
  return {'clip': _clip, 't5': _t5, 'ours': trained}[request.param]()


@pytest.mark.parametrize('unit', ['a red cat ', 'a', ' cat', 'é'])
def test_ten_megabytes_are_read_at_once(tokenizer, unit):
  """As their beginning is; without a bound our own tokenizer takes 20 seconds for each."""
  said = []
  long = unit * (MEGABYTES // len(unit.encode()))
  tokenize = Tokenize(tokenizer, 77, cut=Cut(said.append))
  tokenize('a')
  start = time.perf_counter()
  ids = tokenize(long)
  assert time.perf_counter() - start < 2
  np.testing.assert_array_equal(ids, Tokenize(tokenizer, 77, cut=Cut(said.append))(unit * 1000))
  assert said[0].startswith('note: 1 text so far, such as ')
  with pytest.raises(UserError, match=r'characters, but only 7[56] tokens fit; shorten'):
    Tokenize(tokenizer, 77, 'error')(long)


def test_a_long_caption_does_not_hold_up_training_a_tokenizer():
  """It is learned from its beginning alone."""
  known = train_tokenizer(['red cat', 'ab' * (MEGABYTES // 2)], 300, 12).get_vocab()
  assert known == train_tokenizer(['red cat', 'ab' * (6 * CHARACTERS)], 300, 12).get_vocab()


def test_what_is_cut_is_counted_once_and_said_at_powers_of_ten(tokenizer):
  said = []
  cut = Cut(said.append)
  texts = [f'{"x " * 10}{LETTERS[n]}' for n in range(12)]
  for text in texts + texts:
    Tokenize(tokenizer, 8, cut=cut)(text)
  assert [line.split(' so far')[0] for line in said] == ['note: 1 text', 'note: 10 texts']
  room = 8 - tokenizer.num_special_tokens_to_add()
  each = [len(tokenizer(text)['input_ids']) - 8 for text in texts[:10]]
  wanted = f'the {room} tokens that the model reads; at least {sum(each)} tokens are left out.'
  assert wanted in said[1]
  together = []
  Tokenize(tokenizer, 8, cut=Cut(together.append)).batch([*texts, 'x'])
  assert len(together) == 1 and together[0].startswith('note: 12 texts so far')


def test_nothing_but_spaces_is_the_empty_text(tokenizer):
  tokenize = Tokenize(tokenizer, 12, 'error')
  for spaces in (' ', '\n\t  ', '\u3000', ' ' * 200):
    np.testing.assert_array_equal(tokenize(spaces), tokenize(''))


def test_what_is_no_unicode_is_named(tokenizer):
  with pytest.raises(UserError, match=r"The prompt 'caf\\udce9' is not UTF-8 .* write it as UTF-8"):
    Tokenize(tokenizer, 12)(b'caf\xe9'.decode('utf-8', 'surrogateescape'))
