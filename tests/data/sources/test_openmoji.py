"""What OpenMoji holds: captions, pixels, and a split that leaks nothing."""

import io
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.sources.openmoji import builder, glyphs
from diffusion_jax.data.sources.openmoji.builder import twins
from diffusion_jax.data.sources.openmoji.glyphs import captions_of, make_unique

FARMER = '1F468-1F3FC-200D-1F33E'


@pytest.fixture(scope='module')
def by_id(records):
  return {record['id']: record for part in records.values() for record in part}


def _test_share(parts):
  return len(parts['test']) / (len(parts['train']) + len(parts['test']))


def test_share_held_out(records):
  assert 0.08 < _test_share(records) < 0.12
  assert len(records['train']) > 3000


@pytest.mark.parametrize(
  ('hexcode', 'caption'),
  [
    (FARMER, 'man farmer medium-light skin tone'),
    (FARMER, 'a man farmer with medium-light skin tone'),
    (FARMER, 'a male farmer with medium-light skin tone'),
    ('2764', 'red heart'),
    ('2764', 'heart'),
    ('1F1EB-1F1F7', 'flag of France'),
    ('1F1F0-1F1F3', 'flag of St. Kitts and Nevis'),
    ('1F170', 'A button blood type'),
    ('1F462', "woman's boot"),
    ('1F46C-1F3FB', 'men holding hands light skin tone'),
    ('1F468-1F3FF-200D-1F9B0', 'a man with red hair and dark skin tone'),
    ('1F468-1F9B2', None),
    (
      '1F469-1F3FB-200D-2764-FE0F-200D-1F469-1F3FF',
      'couple with heart of a woman and a woman with light and dark skin tones',
    ),
    ('1F468-200D-1F469-200D-1F467-200D-1F466', 'family of a man, a woman, a girl and a boy'),
  ],
)
def test_captions(hexcode, caption):
  one = glyphs.glyph(hexcode)
  assert (one is None) if caption is None else (caption in captions_of(one))


def test_canonical_captions_are_first_short_and_unique(records):
  first = [record['captions'][0] for part in records.values() for record in part]
  assert captions_of(glyphs.glyph(FARMER))[0] == 'man farmer medium-light skin tone'
  assert len(set(first)) == len(first)
  assert max(len(text.split()) for text in first) <= 12
  assert not any(character in text for text in first for character in '_:()')


def test_shared_captions_are_dropped_but_canonical_ones_stay():
  assert make_unique([['cat face', 'Cat', 'cat emoji'], ['cat', 'kitty']]) == [
    ['cat face', 'cat emoji'],
    ['cat', 'kitty'],
  ]
  with pytest.raises(ValueError, match='not unique'):
    make_unique([['Cat'], ['cat']])


@pytest.mark.parametrize(
  ('variants', 'concept'),
  [
    (['1F468-1F3FC-200D-1F33E', '1F469-200D-1F33E', '1F9D1-1F3FF-200D-1F33E'], '1F9D1-1F33E'),
    (['1F6B6', '1F6B6-1F3FB-200D-2640-FE0F-200D-27A1-FE0F'], '1F6B6'),
    (['1F48F-1F3FB', '1F469-1F3FB-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FC'], 'kiss'),
    (['1F46A', '1F468-200D-1F469-200D-1F467'], 'family'),
    (['2640', '2640-FE0F'], '2640'),
  ],
)
def test_variants_share_a_concept(variants, concept):
  assert {glyphs.concept_of(variant) for variant in variants} == {concept}


def test_gender():
  codes = ['1F468', '1F6B6-200D-2640-FE0F', '1F9D1', '2640', '1F469-200D-1F468']
  assert list(map(glyphs.gender_of, codes)) == ['man', 'woman', '', '', '']


def test_no_id_caption_or_pixels_on_both_sides(records):
  train, test = records['train'], records['test']

  def texts(part):
    return {text.casefold() for record in part for text in record['captions']}

  def pixels(part):
    return {record['image'].tobytes() for record in part}

  assert not {record['id'] for record in train} & {record['id'] for record in test}
  assert not texts(train) & texts(test)
  assert not pixels(train) & pixels(test)


def test_no_look_alikes_on_both_sides(records):
  """The nearest training image of a test image differs by more than the eye can miss."""
  train, test = (
    np.stack([record['image'] for record in records[part]]).reshape(len(records[part]), -1)
    for part in ('train', 'test')
  )
  train, test = train.astype(np.float32) / 255, test.astype(np.float32) / 255
  square = (test**2).sum(1)[:, None] + (train**2).sum(1) - 2 * test @ train.T
  assert np.sqrt(square.min().clip(0) / train.shape[1]) > 0.01


def test_twins_are_one_record_with_both_captions(by_id):
  norway = by_id['1F1F3-1F1F4']
  assert norway['captions'][0] == 'flag of Norway'
  assert 'flag of Svalbard and Jan Mayen' in norway['captions']
  assert '1F1F8-1F1EF' not in by_id
  assert 'farmer medium-light skin tone' in by_id[FARMER]['captions']
  images = Counter(record['image'].tobytes() for record in by_id.values())
  assert max(images.values()) == 1


def test_every_size_finds_the_same_twins():
  wanted = {'couple with heart', '1F9D1-1F9B2', 'person'}
  drawn = [(glyphs.glyph(hexcode), path) for hexcode, path in builder.drawings()]
  drawn = [(one, path) for one, path in drawn if one and (one.concept in wanted or one.is_flag)]
  found = []
  for size in (16, 32, 64):
    images, thumbnails = zip(*(builder.render(path, size) for _, path in drawn), strict=True)
    assert Image.open(io.BytesIO(images[0])).size == (size, size)
    found.append(twins([one for one, _ in drawn], np.stack(thumbnails)))
  assert found[0] == found[1] == found[2]
  assert 40 < len(drawn) - len(found[0]) < 100


def test_twins_that_lie_about_skin_tones_are_dropped(by_id):
  """OpenMoji draws people with bunny ears of two given tones without any tone."""
  assert '1F46F' in by_id
  assert '1F9D1-1F3FB-200D-1F430-200D-1F9D1-1F3FF' not in by_id
  assert not any('skin' in text for text in by_id['1F46F']['captions'])


def test_variants_without_selector_are_on_the_same_side(records):
  side = defaultdict(set)
  for part, found in records.items():
    for record in found:
      side[record['id'].replace('-FE0F', '')].add(part)
  assert all(len(parts) == 1 for parts in side.values())


def test_held_out_pairs_are_never_trained_on_but_both_halves_are(records):
  seen = {part: [glyphs.glyph(record['id']) for record in found] for part, found in records.items()}
  pairs = glyphs.held_out_pairs([one for found in seen.values() for one in found])
  trained = defaultdict(set)
  for one in seen['train']:
    if len(one.tones) == 1:
      trained[one.concept].add(one.tones[0])
  tested = {(one.concept, one.tones[0]) for one in seen['test'] if len(one.tones) == 1}
  assert len(pairs) > 50
  assert set(pairs.values()) == set(glyphs.TONES.values())
  for concept, tone in pairs.items():
    assert (concept, tone) in tested
    assert trained[concept] == set(glyphs.TONES.values()) - {tone}
  assert pairs['1F9D1-1F33E'] == 'medium-light'
  genders = {
    one.gender for one in seen['test'] if one.concept == '1F9D1-1F52C' and len(one.tones) == 1
  }
  assert {'man', 'woman'} <= genders


def test_unseen_concepts_are_wholly_unseen(records):
  concepts = {
    part: {glyphs.concept_of(record['id']) for record in found} for part, found in records.items()
  }
  unseen = {concept for concept in concepts['test'] if glyphs.is_unseen_concept(concept)}
  assert not unseen & concepts['train']
  everything = concepts['train'] | concepts['test']
  assert 0.03 < len(unseen) / len(everything) < 0.06
  assert {'1F98B', '1F6B6'} <= unseen  # A butterfly; people who walk, in every variant.


def test_split_depends_on_content_only():
  every = [glyphs.glyph(code) for code in ('1F98B', '2764', FARMER)]
  assert glyphs.assign(every)[:2] == ['test', 'train']
  assert glyphs.assign(every[::-1])[1:] == ['train', 'test']


def test_pixels(by_id):
  heart = by_id['2764']['image']
  assert heart.shape == (32, 32, 3)
  assert heart.dtype == np.uint8
  assert (heart[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
  red, green, blue = (int(value) for value in heart[16, 16])
  assert red > 200 and green < 100 and blue < 100
  assert heart.min() < 40  # The outline is black.
  red, green, blue = (int(value) for value in by_id['1F49A']['image'][16, 16])
  assert green > red and green > blue


def test_almost_every_image_is_white_around_a_drawing(by_id):
  corners = np.stack([record['image'][0, 0] for record in by_id.values()])
  assert (corners == 255).all(axis=1).mean() > 0.99
  assert all(record['image'].min() < 255 for record in by_id.values())
