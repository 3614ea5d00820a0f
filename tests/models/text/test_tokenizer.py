"""Tokenizers of every kind: trained, saved, loaded, applied to texts of any length, and of none."""

import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

from diffusion_jax.errors import UserError
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.models.text.tokenizer import (
  CHARACTERS,
  EOS,
  Cut,
  Tokenize,
  add_placeholder,
  load_tokenizer,
  save_tokenizer,
  train_tokenizer,
)
from tests.tiny import ROOT

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


WORDS = ['!', 'a</w>', 'red</w>', 'r', 'e', 'd</w>', 're', '<|startoftext|>', '<|endoftext|>']
MERGES = [('r', 'e'), ('re', 'd</w>')]


@pytest.mark.parametrize(('options', 'pad'), [({}, 8), ({'pad_token': '!'}, 0)])
def test_clip_directories_load(options, pad, tmp_path):
  """Stable Diffusion 1 pads with the end token, 2 and the second encoder of XL with '!'."""
  clip = CLIPTokenizer(vocab={w: n for n, w in enumerate(WORDS)}, merges=MERGES, **options)
  clip.save_pretrained(tmp_path)
  tokenize = Tokenize(load_tokenizer(tmp_path), 6)
  assert list(tokenize('A red')) == [7, 1, 2, 8, pad, pad]
  ids, mask = tokenize.batch_and_mask(['A red', 'a', 'a a a a a'])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6])
  np.testing.assert_array_equal(ids[2], [7, 1, 1, 1, 1, 8])


def test_t5_has_no_start_and_its_own_padding(tmp_path):
  pieces = [('<pad>', 0), ('</s>', 0), ('<unk>', 0), ('▁', -3), ('▁a', -1), ('▁red', -1), ('c', -4)]
  unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
  unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  unigram.post_processor = processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  T5TokenizerFast(tokenizer_object=unigram, extra_ids=2).save_pretrained(tmp_path)
  tokenize = Tokenize(load_tokenizer(tmp_path), 4, 'error')
  ids, mask = tokenize.batch_and_mask(['a red', '', 'a a a', 'ac'])
  np.testing.assert_array_equal(ids, [[4, 5, 1, 0], [1, 0, 0, 0], [4, 4, 4, 1], [4, 6, 1, 0]])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 0, 0, 0], [1] * 4, [1, 1, 1, 0]])
  with pytest.raises(UserError, match='has 4 tokens, but only 3 fit'):
    tokenize('a a a a')
  with pytest.raises(UserError, match='at least 2'):
    Tokenize(tokenize.tokenizer, 1)


def test_placeholders_stand_for_their_embeddings(tmp_path):
  tokenizer = train_tokenizer(CAPTIONS, 300, 12)
  size = len(tokenizer)
  before = Tokenize(tokenizer, 12)('a red cat')
  assert add_placeholder(tokenizer, '<dog>') == [size]
  ids = add_placeholder(tokenizer, '<cat>', 3)
  assert ids == [size + 1, size + 2, size + 3]
  a, space, stop = (tokenizer.convert_tokens_to_ids(t) for t in ('a', 'Ġ', '.'))
  save_tokenizer(tokenizer, tmp_path)
  for saved in (tokenizer, load_tokenizer(tmp_path)):
    tokenize = Tokenize(saved, 12, 'error')
    found = tokenize.batch(['a <cat>.', 'a<dog>', 'a red cat'])
    np.testing.assert_array_equal(found[0], [0, a, space, *ids, stop, *[1] * 5])
    np.testing.assert_array_equal(found[1], [0, a, size, *[1] * 9])
    np.testing.assert_array_equal(found[2], before)
    with pytest.raises(UserError, match='has 12 tokens, but only 10 fit'):
      tokenize('<cat><cat><cat><cat>')
  for token, count, words in (
    ('<cat>', 1, 'already has the token <cat>;'), ('<dog>_0', 0, 'at least one'),
    ('a', 1, 'already has'), ('two words', 1, 'without spaces'), ('', 1, 'without spaces'),
  ):
    with pytest.raises(UserError, match=words):
      add_placeholder(tokenizer, token, count)
  tokenizer.add_tokens(['<new>_1'])
  with pytest.raises(UserError, match='<new>_1'):
    add_placeholder(tokenizer, '<new>', 2)
  assert '<new>' not in tokenizer.get_vocab()


@pytest.fixture(scope='module')
def directories(tokenizer, tmp_path_factory):
  """Ours; CLIP's as transformers saves it now; and as it is published, in files of its own."""
  ours, clip, published = (tmp_path_factory.mktemp(n) for n in ('ours', 'clip', 'published'))
  save_tokenizer(tokenizer, ours)
  vocabulary = {w: n for n, w in enumerate(WORDS)}
  CLIPTokenizer(vocab=vocabulary, merges=MERGES, model_max_length=6).save_pretrained(clip)
  (published / 'vocab.json').write_text(json.dumps(vocabulary))
  (published / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(map(' '.join, MERGES)))
  (published / 'tokenizer_config.json').write_text(json.dumps({
    'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 6, 'pad_token': '!',
    'bos_token': WORDS[7], 'eos_token': WORDS[8], 'unk_token': WORDS[8],
  }))
  return ours, clip, published


def test_the_named_class_reads_what_transformers_would(directories):
  for directory in directories:
    found, wanted = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert type(found) is type(wanted) and found.get_vocab() == wanted.get_vocab()
    assert found.model_max_length == wanted.model_max_length in (6, 12)
    assert found.special_tokens_map == wanted.special_tokens_map
    for text in ('a red red', 'A RED  a', ''):
      assert found(text)['input_ids'] == wanted(text)['input_ids']


def test_loading_does_not_import_pytorch(directories):
  code = (
    'import importlib.util, sys\n'
    'from diffusion_jax.models.text.tokenizer import load_tokenizer\n'
    'assert all(load_tokenizer(path)("a red")["input_ids"] for path in sys.argv[1:])\n'
    'assert importlib.util.find_spec("torch") and "torch" not in sys.modules\n'
  )
  done = subprocess.run([sys.executable, '-c', code, *map(str, directories)], cwd=ROOT, text=True,
                        capture_output=True, timeout=100)
  assert done.returncode == 0, done.stderr


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
def any_tokenizer(request):
  trained = lambda: train_tokenizer(['a red cat'] * 4, vocab_size=300, max_length=77)
  return {'clip': _clip, 't5': _t5, 'ours': trained}[request.param]()


@pytest.mark.parametrize('unit', ['a red cat ', 'a', ' cat', 'é'])
def test_ten_megabytes_are_read_at_once(any_tokenizer, unit):
  """As their beginning is; without a bound our own tokenizer takes 20 seconds for each."""
  said = []
  long = unit * (MEGABYTES // len(unit.encode()))
  tokenize = Tokenize(any_tokenizer, 77, cut=Cut(said.append))
  tokenize('a')
  start = time.perf_counter()
  ids = tokenize(long)
  assert time.perf_counter() - start < 2
  np.testing.assert_array_equal(ids, Tokenize(any_tokenizer, 77, cut=Cut(said.append))(unit * 1000))
  assert said[0].startswith('note: 1 text so far, such as ')
  with pytest.raises(UserError, match=r'characters, but only 7[56] tokens fit; shorten'):
    Tokenize(any_tokenizer, 77, 'error')(long)


def test_a_long_caption_does_not_hold_up_training_a_tokenizer():
  """It is learned from its beginning alone."""
  known = train_tokenizer(['red cat', 'ab' * (MEGABYTES // 2)], 300, 12).get_vocab()
  assert known == train_tokenizer(['red cat', 'ab' * (6 * CHARACTERS)], 300, 12).get_vocab()


def test_what_is_cut_is_counted_once_and_said_at_powers_of_ten(any_tokenizer):
  said = []
  cut = Cut(said.append)
  texts = [f'{"x " * 10}{LETTERS[n]}' for n in range(12)]
  for text in texts + texts:
    Tokenize(any_tokenizer, 8, cut=cut)(text)
  assert [line.split(' so far')[0] for line in said] == ['note: 1 text', 'note: 10 texts']
  room = 8 - any_tokenizer.num_special_tokens_to_add()
  each = [len(any_tokenizer(text)['input_ids']) - 8 for text in texts[:10]]
  wanted = f'the {room} tokens that the model reads; at least {sum(each)} tokens are left out.'
  assert wanted in said[1]
  together = []
  Tokenize(any_tokenizer, 8, cut=Cut(together.append)).batch([*texts, 'x'])
  assert len(together) == 1 and together[0].startswith('note: 12 texts so far')


def test_nothing_but_spaces_is_the_empty_text(any_tokenizer):
  tokenize = Tokenize(any_tokenizer, 12, 'error')
  for spaces in (' ', '\n\t  ', '\u3000', ' ' * 200):
    np.testing.assert_array_equal(tokenize(spaces), tokenize(''))


def test_what_is_no_unicode_is_named(any_tokenizer):
  with pytest.raises(UserError, match=r"The prompt 'caf\\udce9' is not UTF-8 .* write it as UTF-8"):
    Tokenize(any_tokenizer, 12)(b'caf\xe9'.decode('utf-8', 'surrogateescape'))


CODE = 'import sys, pathlib; pathlib.Path(__file__).with_name("ran").touch()\nclass T: pass\n'


@pytest.mark.parametrize('config', [
  {'auto_map': {'AutoTokenizer': ['code.T', None]}, 'tokenizer_class': 'T'},
  {'auto_map': {'AutoTokenizer': ['code.T', 'code.T']}},
  {'auto_map': ['code.T', None], 'tokenizer_class': 'CLIPTokenizer'},
])
def test_a_tokenizer_with_code_of_its_own_is_neither_run_nor_asked_about(config, tmp_path):
  """Nor does a yes at hand make it run."""
  write_json(tmp_path / 'tokenizer_config.json', config)
  write_json(tmp_path / 'config.json', {'model_type': 'x', 'auto_map': {'AutoConfig': 'code.T'}})
  (tmp_path / 'vocab.json').write_text('{"a": 0}')
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
  (tmp_path / 'code.py').write_text(CODE)
  program = (
    'import sys\nfrom diffusion_jax.models.text.tokenizer import load_tokenizer\n'
    'from diffusion_jax.errors import UserError\n'
    'try: print(type(load_tokenizer(sys.argv[1])).__name__)\n'
    'except UserError as error: print("UserError:", error)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)], input='y\ny\ny\n',
    capture_output=True, text=True, timeout=120, env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  assert done.returncode == 0, done.stderr
  assert 'UserError: ' in done.stdout or 'CLIPTokenizer' in done.stdout
  assert 'Do you wish' not in done.stdout and not (tmp_path / 'ran').exists()


def test_tokenizer_configs(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('[' * 10**5)
  for text in ('[' * 10**5, '{"tokenizer_class": []}', '{"tokenizer_class": 10}', '3', '\ud800'):
    (tmp_path / 'tokenizer_config.json').write_bytes(text.encode('utf-8', 'surrogatepass'))
    with pytest.raises(UserError, match='holds no tokenizer that can be read') as error:
      load_tokenizer(tmp_path)
    assert len(str(error.value)) < 600 and '\n' not in str(error.value)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6
