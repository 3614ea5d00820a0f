"""Texts of one encoder or several: joined, masked, pooled, missing; and configs of them."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from diffusion_jax.models.mmdit import MMDiTConfig
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.conditioners import Context, Request
from diffusion_jax.pipelines.directory import load_model, save_model
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import LatentConfig
from diffusion_jax.pipelines.text_conditioners import EXTRA, Reader, TextEncoders, embedding_table
from diffusion_jax.pipelines.weighted_text import weigh
from diffusion_jax.types import TextShape
from tests import tiny

PROMPTS = ['red apple', 'a cat face on a very long red green blue apple car', '']
WIDTH, POOLED = tiny.CLIP.text_config.hidden_size, tiny.CLIP.projection_dim


@pytest.fixture(scope='module')
def encoders(parts, t5):
  """encoders(**options): the conditioner of two CLIPs and a T5, and the weights."""

  def make(which='cct', lengths=(0, 0, 16), **options):
    paths = {'c': parts['clip'], 't': t5}
    listed = [
      {'path': paths[kind], 'length': n} for kind, n in zip(which, lengths, strict=False)
    ]
    text, found = TextEncoders.build({'encoders': listed, **options}, Context(None))
    # Two encoders of one folder would be alike.
    return text, {
      role: {name: p * (1 + 0.3 * i) for name, p in part.load().items()}
      for i, (role, part) in enumerate(found.items())
    }

  return make


def encode(text, weights, prompts=PROMPTS):
  return jax.tree.map(np.asarray, jax.jit(text.encode)(weights, {'tokens': text.tokens(prompts)}))


def alone(text, weights, role, mask=None):
  """What one of the encoders gives by itself: (text, pooled)."""
  ids = text.tokens(PROMPTS)[:, list(text.networks).index(role), : text.readers[role].length]
  network = text.networks[role].bind(weights[role])
  more = () if mask is None else (mask,)
  return [x if x is None else np.asarray(x) for x in network.encode_text(jnp.asarray(ids), *more)]


def test_groups_follow_each_other_and_within_them_states_lie_side_by_side(encoders):
  """As in Stable Diffusion 3: two CLIPs by width, then a T5, with zeros up to the widest."""
  text, weights = encoders(join=[[1, 2], [3]], pooled=[1, 2], mask=False)
  out = encode(text, weights)
  (a, pool_a), (b, pool_b), (c, _) = (alone(text, weights, role) for role in text.networks)
  assert out.keys() == {'text', 'pooled'} == set(text.kept)
  assert out['text'].shape == (3, tiny.LENGTH + 16, 2 * WIDTH) and text.width == 2 * WIDTH
  clips, t5 = np.split(out['text'], [tiny.LENGTH], axis=1)
  close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
  close(clips, np.concatenate([a, b], -1))
  close(t5[..., : tiny.T5.d_model], c)
  assert (t5[..., tiny.T5.d_model :] == 0).all()
  close(out['pooled'], np.concatenate([pool_a, pool_b], -1))
  assert np.abs(a - b).max() > 0.1


def test_states_joined_by_width_end_with_zeros_where_one_reads_less(encoders):
  text, weights = encoders('ct', (8, 12), join='width', mask=True)
  out = encode(text, weights)
  assert out['text'].shape == (3, 12, WIDTH + tiny.T5.d_model)
  assert (out['text'][:, 8:, :WIDTH] == 0).all() and (out['text'][:, 7, :WIDTH] != 0).any()
  # Some of the second prompt is read by both, and all tokens of it by one.
  assert out['mask'].sum(axis=1).tolist()[1:] == [12, 2]


def test_the_mask_ends_with_the_text_and_what_comes_before_knows_nothing_of_the_length(encoders):
  found = {}
  for length in (16, 40):
    text, weights = encoders('ct', (0, length), mask=True)
    found[length] = encode(text, weights)
    for i, role in enumerate(text.networks):
      reader = text.readers[role]
      ids = reader.tokenizer(PROMPTS)['input_ids']
      mask = found[length]['mask'][:, (0, tiny.LENGTH)[i] :][:, : reader.length]
      ends = np.asarray([min(len(each), reader.length) for each in ids])
      np.testing.assert_array_equal(mask, np.arange(reader.length) < ends[:, None])
  short, long = (each['text'][:, tiny.LENGTH :] for each in found.values())
  real = found[16]['mask'][:, tiny.LENGTH :] == 1
  real[1] = False  # It is cut at the shorter length.
  np.testing.assert_allclose(short[real], long[:, :16][real], atol=1e-5)
  free, _ = encoders('ct', (0, 40), mask=False)
  assert np.abs(encode(free, weights)['text'][:, tiny.LENGTH :][:, :16] - short)[real].max() > 1e-2


def test_t5_alone_masks_its_padding_and_clip_does_not(encoders, parts, t5):
  assert 'mask' in encoders('t', (16,))[0].kept and 'mask' not in encoders('c')[0].kept
  for path, kept in ((t5, ('text', 'mask')), (parts['clip'], ('text',))):
    text, _ = TextEncoders.build({'path': path}, Context(None))
    assert text.kept == kept and text.length == {('text',): tiny.LENGTH}.get(kept, 128)
  text, weights = encoders('ct', (0, 16))
  mask = encode(text, weights)['mask']
  assert (mask[:, : tiny.LENGTH] == 1).all() and not (mask[:, tiny.LENGTH :] == 1).all()


def test_an_encoder_that_is_missing_gives_zeros_of_its_shape(encoders):
  text, weights = encoders(join=[[1, 2], [3]], pooled=[1, 2], mask=False)
  whole, gone = encode(text, weights), ('text_encoder_2', 'text_encoder_3')
  readers = text.readers | {
    gone[0]: Reader(tiny.LENGTH, missing=TextShape(WIDTH, POOLED)),
    gone[1]: Reader(16, missing=TextShape(tiny.T5.d_model)),
  }
  first = {role: n for role, n in text.networks.items() if role not in gone}
  less = dataclasses.replace(text, networks=first, readers=readers)
  out = encode(less, weights)
  assert less.width == text.width and less.tokens(PROMPTS).shape == (3, 1, tiny.LENGTH)
  zeros = {'text': whole['text'].copy(), 'pooled': whole['pooled'].copy()}
  zeros['text'][:, tiny.LENGTH :] = 0
  zeros['text'][..., WIDTH:] = 0
  zeros['pooled'][:, POOLED:] = 0
  for name, wanted in zeros.items():
    np.testing.assert_allclose(out[name], wanted, atol=1e-5)


def test_what_is_said_of_one_encoder_may_stand_alone(t5):
  text, _ = TextEncoders.build({'path': t5, 'length': 20, 'mask': False}, Context(None))
  assert (text.length, text.kept) == (20, ('text',))
  moved = TextEncoders.moved(
    'text', {'path': 'a', 'tokenizer': 'b', 'length': 20}, lambda path, name: f'{path}>{name}'
  )
  assert moved == {'path': 'a>text_path', 'tokenizer': 'b>text_tokenizer', 'length': 20}


def test_any_layer_of_clip(parts, encoders):
  text, weights = encoders('c', (0,))
  early = {'path': parts['clip'], 'skip': 0, 'normalize': False}
  other, _ = TextEncoders.build({'encoders': [early]}, Context(None))
  plain = text.networks['text_encoder'].bind(weights['text_encoder'])
  ids = jnp.asarray(text.tokens(PROMPTS)[:, 0])
  wanted, _ = plain.encode_text(ids, normalize=False)
  np.testing.assert_allclose(encode(other, weights)['text'], wanted, atol=1e-5)
  skipped, _ = TextEncoders.build({'path': parts['clip'], 'skip': 1}, Context(None))
  with pytest.raises(UserError, match='skip=1 must be from 0 to 0'):
    skipped.encode(weights, {'tokens': text.tokens(PROMPTS)})
  with pytest.raises(UserError, match='skip=1 must be from 0 to 0'):
    text.encode(weights, {'tokens': text.tokens(PROMPTS)}, clip_skip=1)


def test_a_text_that_is_too_long_counts_once(encoders):
  said = []
  text, _ = encoders('ct', (0, 16))
  text.cut._say = said.append
  text.tokens(['red ' * 60])
  assert len(said) == 1 and 'longer than the 15 tokens' in said[0]
  with pytest.raises(UserError, match='only 15 fit'):
    text.tokens(['red ' * 60], on_long='error')


@pytest.mark.parametrize(('options', 'named'), [
  ({'which': 'c', 'lengths': (40,)}, r'length of .*clip is 40, but it reads 12 tokens'),
  ({'pooled': [3]}, r'text\.pooled names encoder 3, a T5, which pools nothing'),
  ({'join': [[1, 3]]}, r'use the encoders \[1, 3\], but there are 3; name each'),
  ({'join': [[1], [2], [3], [4]]}, r'use the encoders \[1, 2, 3, 4\], but there are 3'),
  ({'joined': 'width'}, r'text\.joined is not a known key'),
  ({'join': 'depth'}, r'text\.join is'),
])
def test_a_section_that_cannot_be_is_refused(encoders, options, named):
  with pytest.raises(UserError, match=named):
    encoders(**options)


@pytest.mark.parametrize(('section', 'named'), [
  ({'path': 'x', 'encoders': []}, 'has path beside encoders; say it in each'),
  ({'length': 3}, r'text\.encoders\[0\]\.path is missing'),
  ({'encoders': []}, r'text\.encoders'),
  ({'encoders': [{'path': 'T5', 'skip': 1}]}, 'is a T5, whose last hidden state is read'),
])
def test_sections_by_hand(t5, section, named):
  for one in section.get('encoders', ()):
    one['path'] = t5
  with pytest.raises(UserError, match=named):
    TextEncoders.build(section, Context(None))


def test_a_denoiser_of_other_texts_is_refused(encoders):
  size = {'num_attention_heads': 2, 'attention_head_dim': 4, 'caption_projection_dim': 8}
  mmdit = MMDiTConfig(**size, joint_attention_dim=24, pooled_projection_dim=2 * POOLED)
  text, _ = encoders(pooled=True)
  text.check(mmdit)
  change = lambda **changes: dataclasses.replace(mmdit, **changes)
  for config, pooled, named in (
    (change(joint_attention_dim=32), True,
     'denoiser.joint_attention_dim is 32, but the text encoder gives texts of width 24; set it'),
    (change(pooled_projection_dim=9), True, 'of width 9, but the text encoders give 16'),
    (mmdit, False, 'this MMDiT needs a pooled text; set settings.conditioners.text.pooled'),
    (dataclasses.replace(tiny.UNET, cross_attention_dim=24), True, 'takes no pooled text'),
  ):
    with pytest.raises(UserError, match=named):
      encoders(pooled=pooled)[0].check(config)


def test_weights_and_chunks_of_clip_and_weights_of_t5(encoders):
  """CLIP reads chunks, one after another; T5 reads all as one text, with the same weights."""
  text, weights = encoders('ct', (0, 16), pooled=[1], mask=True)
  # Means far from 0, as of norms that were trained.
  weights = jax.tree.map(lambda p: p + 0.05, weights)
  prompts = ['red (apple:2) BREAK [car]', '']
  rows = text.rows(Request(prompts, 'blue', syntax='weighted'))
  assert rows['tokens'].shape == rows['token_weights'].shape == (2, 2, 2, 16)
  out, negative = jax.jit(text.pair)(weights, rows)
  plain = encode(text, weights, ['red apple', 'car', 'red apple car', ''])
  clip, t5 = np.split(np.asarray(out['text']), [2 * tiny.LENGTH], axis=1)
  clip = clip[..., :WIDTH]
  assert t5.shape == (2, 16, tiny.T5.d_model) and negative['text'].shape == out['text'].shape
  old_clip, old_t5 = np.split(plain['text'], [tiny.LENGTH], axis=1)
  old_clip = old_clip[..., :WIDTH]
  factors = np.ones((3, 16), np.float32)
  rescaled = lambda z, f: z * f[:, None] * (z.mean() / (z * f[:, None]).mean())
  factors[0, : tiny.LENGTH] = rows['token_weights'][0, 0, 0, : tiny.LENGTH]
  factors[1, : tiny.LENGTH] = rows['token_weights'][0, 0, 1, : tiny.LENGTH]
  factors[2] = rows['token_weights'][0, 1, 0]
  values = [set(np.round(row.astype(float), 3).tolist()) for row in factors]
  assert values == [{1, 2}, {1, 0.909}, {1, 2, 0.909}]
  close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
  close(clip[0, : tiny.LENGTH], rescaled(old_clip[0], factors[0, : tiny.LENGTH]))
  close(clip[0, tiny.LENGTH :], rescaled(old_clip[1], factors[1, : tiny.LENGTH]))
  close(clip[1], np.concatenate([old_clip[3]] * 2))
  close(out['pooled'], plain['pooled'][[0, 3]])
  close(t5[0], rescaled(old_t5[2], factors[2]))


def test_a_weighted_prompt_that_t5_cuts_is_said_with_what_was_cut(encoders, capsys):
  text, _ = encoders('t', (6,))
  text.weighted(['red apple (blue cat:1.2) green heart car'])
  said = capsys.readouterr().out
  assert 'longer than the 5 tokens that' in said and 'car' in said.split('Of this one that is')[1]
  text.weighted(['(sun)'])
  assert not capsys.readouterr().out


@pytest.mark.parametrize(('prompt', 'words'), [
  ('(cat:101)', 'has a weight of 101; give weights of at most 100'), ('(' * 60 + 'cat', 'brackets'),
  ('cat BREAK ' * 16, 'makes 17 chunks of 10 tokens, where 16 may be'),
])
def test_weighted_prompts_have_bounds(encoders, prompt, words):
  text, _ = encoders('c', (0,))
  with pytest.raises(UserError, match=words):
    text.weighted([prompt])


def test_states_without_a_mean_are_not_rescaled():
  text = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
  text -= text.mean((1, 2), keepdims=True)
  factors = np.asarray([[1, 2, 1, 1], [1, 1, 0, 1]], np.float32)
  np.testing.assert_allclose(weigh(text, factors), text * factors[..., None], rtol=1e-6)
  same = weigh(text + 1, np.ones((2, 4), np.float32))
  np.testing.assert_array_equal(same, text + 1)


@pytest.mark.parametrize('name', ['alone', 'apart', 'short', 'several'])
def test_a_model_is_opened_as_it_was_saved_and_has_no_other_layout(name, parts, t5, tmp_path):
  """T5 alone; with its tokenizer in a folder apart; CLIP otherwise than whole; CLIP, then T5."""
  for file in Path(t5).glob('tokenizer*'):
    (tmp_path / 'words').mkdir(exist_ok=True)
    shutil.copy(file, tmp_path / 'words')
  one = {'path': t5, 'tokenizer': str(tmp_path / 'words'), 'length': 20}
  text, folders = {
    'alone': ({'path': t5}, {'text_path'}),
    'apart': (one | {'mask': False}, {'text_path', 'text_tokenizer'}),
    'short': ({'path': parts['clip'], 'length': 8}, {'text_path'}),
    'several': (
      {'encoders': [{'path': parts['clip']}, one]},
      {'text_encoder', 'text_encoder_2', 'tokenizer_2'},
    ),
  }[name]
  width = WIDTH if name == 'short' else tiny.T5.d_model
  unet = dataclasses.replace(tiny.UNET, cross_attention_dim=width)
  how = {'space': LatentConfig(parts['autoencoder']), 'conditioners': {'text': text}}
  model, found = assemble(unet, *how.values(), ScheduleConfig(), Parameterization())
  weights = {role: part.load() for role, part in found.items()}
  params = jax.tree.map(np.asarray, jax.jit(model.denoiser.initialize)(jax.random.key(0)))
  where = tmp_path / 'model'
  save_model(where, model, params, **how, sample=SampleConfig(), dtype='float32')
  assert folders <= {path.name for path in where.iterdir()}
  for path in (t5, parts['clip'], tmp_path / 'words'):
    assert str(path) not in (where / 'model_index.json').read_text()
  again, loaded, _ = load_model(str(where))
  for value, wanted in zip(again.text.readers.values(), model.text.readers.values(), strict=True):
    same = lambda reader: dataclasses.replace(reader, tokenizer=None)
    assert same(value) == same(wanted)
  assert (again.text.text, again.text.pooled) == (model.text.text, model.text.pooled)
  jax.tree.map(np.testing.assert_array_equal, encode(again.text, loaded), encode(
    model.text, weights
  ))
  with pytest.raises(UserError, match='a model of this library alone'):
    convert(where, tmp_path / 'other', 'diffusers')


def test_a_word_is_learned_by_clip_and_spelt_by_t5(encoders):
  text, weights = encoders('ct', (0, 16))
  assert list(text.towers) == ['text_encoder']
  before = text.tokens(['<w> apple'])
  width, rows = embedding_table(text.towers['text_encoder'])[1:]
  text.add_word('<w>', {'text_encoder': 1}, {})
  after = text.tokens(['<w> apple'])
  assert rows in after[0, 0] and rows not in before[0, 0]
  np.testing.assert_array_equal(after[:, 1], before[:, 1])
  learned = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
  found = encode(text, weights | {
    'text_encoder': {**weights['text_encoder'], EXTRA: learned}
  }, ['<w> apple'])
  assert np.isfinite(found['text']).all()
