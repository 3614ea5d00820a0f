"""T5 is trained on text files by the train command; its encoder opens again."""

import json

import jax
import numpy as np
import pytest
import transformers

from diffusion_jax.formats.networks import load_params, network_format
from diffusion_jax.models.text.tokenizer import SENTINELS, Tokenize, load_tokenizer
from tests import tiny

WORDS = 'red green blue small large round flat old new bright'.split()
THINGS = 'ball box cup dog house tree car hat fish bird'.split()


def config(folder, **settings):
  values = tiny.clip_config(loop={
    'total_steps': 30, 'batch_size': 16, 'log_every_steps': 10, 'evaluate_samples': 32,
    'checkpoint_every_steps': 10,
  }, optimizer={'learning_rate': 1e-2, 'schedule': 'constant', 'warmup_steps': 2})
  values |= {'task': 't5', 'settings': {'length': 16, 't5': {
    'vocab_size': 400, 'd_model': 16, 'd_kv': 8, 'd_ff': 32, 'num_layers': 1, 'num_heads': 2,
    'feed_forward_proj': 'gated-gelu',
  }, **settings}}
  values['data'] |= {'dataset': f'text:{folder}', 'transforms': []}
  return values


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  lines = [f'a {a} {b} beside a {c} {d}' for a in WORDS for b in THINGS for c in WORDS[:5]
           for d in THINGS[:2]]
  (folder / 'lines.txt').write_text('\n'.join(lines))
  return folder


@pytest.fixture(scope='module')
def run(texts, command, tmp_path_factory):
  folder = tmp_path_factory.mktemp('t5')
  recipe = tiny.write_config(folder / 'recipe.py', config(texts))
  assert command('train', '--config', recipe, '--workdir', folder / 'run') == 0
  return folder / 'run'


def test_it_learns_and_says_what_it_was_measured_on(run):
  scores = json.loads((run / 'scores.json').read_text())
  assert scores['test']['token_loss'] < scores['commonest']['token_loss'] + 0.5
  losses = [line['loss'] for line in tiny.metrics(run).values()]
  assert losses[-1] < losses[0] - 1
  card = (run / 'README.md').read_text()
  assert 'not trained on' in card.replace('\n', ' ') and '`token_loss`' in card


def test_the_encoder_opens_again_here_and_in_transformers(run):
  torch = pytest.importorskip('torch')
  config, params = load_params('t5', run / 'model')
  tokenizer = load_tokenizer(run / 'model')
  ids, mask = Tokenize(tokenizer, 12).batch_and_mask(['a red ball', 'an old dog beside a hat'])
  ours, _ = network_format('t5').network(config).bind(
    jax.tree.map(np.asarray, params)).encode_text(ids, mask)
  theirs = transformers.T5EncoderModel.from_pretrained(run / 'model', dtype=torch.float32)
  with torch.no_grad():
    wanted = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
  np.testing.assert_allclose(ours[mask == 1], wanted.numpy()[mask == 1], atol=1e-4)


def test_its_vocabulary_is_that_of_t5(run):
  tokenizer = load_tokenizer(run / 'model')
  assert tokenizer.convert_tokens_to_ids(['<pad>', '</s>', '<unk>']) == [0, 1, 2]
  last = len(tokenizer) - 1
  assert tokenizer.convert_tokens_to_ids('<extra_id_0>') == last
  assert tokenizer.convert_tokens_to_ids(f'<extra_id_{SENTINELS - 1}>') == last - SENTINELS + 1
  ids = tokenizer('a red ball')['input_ids']
  assert ids[-1] == 1 and tokenizer.decode(ids[:-1]) == 'a red ball'


def test_a_second_start_goes_on(run, texts, command, tmp_path):
  """The tokenizer and the packed texts are those of the first start, so the losses are, too."""
  values = config(texts)
  values['loop']['total_steps'] = 10
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  workdir = tmp_path / 'run'
  assert command('train', '--config', recipe, '--workdir', workdir) == 0
  assert tiny.metrics(workdir)[10]['loss'] == tiny.metrics(run)[10]['loss']


@pytest.mark.parametrize(('settings', 'word'), [
  ({'length': 8192}, 'sentinels'), ({'noise_density': 0.0}, 'noise_density'),
  ({'t5': {'vocab_size': 200}}, 'vocab_size'),
])
def test_bad_settings_are_one_sentence(settings, word, texts, command, tmp_path, capsys):
  recipe = tiny.write_config(tmp_path / 'recipe.py', config(texts, **settings))
  assert command('train', '--config', recipe, '--workdir', tmp_path / 'run') == 2
  assert word in capsys.readouterr().err
