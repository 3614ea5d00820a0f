import numpy as np
import pytest
from transformers import CLIPTokenizer

from diffusion_jax.errors import UserError
from diffusion_jax.models.text.tokenizer import (
  EOS,
  Tokenize,
  load_tokenizer,
  save_tokenizer,
  train_tokenizer,
)

CAPTIONS = ['A red cat', 'a blue dog and a red cat', 'a blue cat'] * 4


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(CAPTIONS, vocab_size=300, max_length=12)


def test_frame_and_padding(tokenizer):
  ids = Tokenize(tokenizer, 12).batch(['a red cat', 'A RED CAT', ''])
  assert ids.shape == (3, 12) and ids.dtype == np.int32
  np.testing.assert_array_equal(ids[0], ids[1])
  assert ids[0, 0] == 0 and list(ids[2]) == [0] + [1] * 11
  end = list(ids[0]).index(1)
  assert 1 < end < 8 and set(ids[0, end:]) == {1} and not {0, 1} & set(ids[0, 1:end])
  np.testing.assert_array_equal(Tokenize(tokenizer, 12)('a red cat'), ids[0])
  assert Tokenize(tokenizer, 12).batch([]).shape == (0, 12)
  assert len(tokenizer) <= 300


@pytest.mark.parametrize('text', [
  'a red cat', '  two  spaces\tand\nlines ',
  'ünïcödé ω 猫', '🐈‍⬛👩🏽‍🚀', '\x00\x7f', 'don\'t; "stop" <b>',
  f'{EOS} inside',
])
def test_any_text_survives(tokenizer, text):
  ids = Tokenize(tokenizer, 200, 'error')(text)
  end = list(ids).index(1)
  assert tokenizer.decode(ids[1:end]) == text


def test_long_texts(tokenizer):
  text = 'x y z ' * 10
  cut = Tokenize(tokenizer, 6)(text)
  assert len(cut) == 6 and cut[0] == 0 and cut[-1] == 1 and 1 not in cut[:-1]
  with pytest.raises(UserError, match=r'has \d+ tokens, but only 4 fit'):
    Tokenize(tokenizer, 6, 'error')(text)
  exact = Tokenize(tokenizer, 6, 'error')('wxyz')
  assert list(exact).count(1) == 1


def test_saved_and_loaded(tokenizer, tmp_path):
  save_tokenizer(tokenizer, tmp_path)
  again = load_tokenizer(tmp_path)
  texts = [*CAPTIONS, '', EOS, 'ω']
  np.testing.assert_array_equal(
    Tokenize(again, 12).batch(texts), Tokenize(tokenizer, 12).batch(texts)
  )


def test_clip_directories_load(tmp_path):
  words = ['a</w>', 'red</w>', 'r', 'e', 'd</w>', 're', '<|startoftext|>', '<|endoftext|>']
  merges = [('r', 'e'), ('re', 'd</w>')]
  clip = CLIPTokenizer(vocab={w: n for n, w in enumerate(words)}, merges=merges)
  clip.save_pretrained(tmp_path)
  ids = Tokenize(load_tokenizer(tmp_path), 6)('A red')
  assert list(ids) == [6, 0, 1, 7, 7, 7]


def test_mistakes(tokenizer, tmp_path):
  with pytest.raises(UserError, match='at least 258'):
    train_tokenizer(CAPTIONS, 100, 12)
  with pytest.raises(UserError, match='no tokenizer directory'):
    load_tokenizer(tmp_path / 'none')
  with pytest.raises(UserError, match='holds no tokenizer'):
    load_tokenizer(tmp_path)
  with pytest.raises(UserError, match='on_long'):
    Tokenize(tokenizer, 12, 'cut')
  with pytest.raises(UserError, match='must be text, not int'):
    Tokenize(tokenizer, 12).batch([3])
