"""Known answers of every transform."""

import itertools

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.fields import Caption
from diffusion_jax.data.sources.folder import Files
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.transforms import RandomCut, apply, build_transforms, check_transforms
from diffusion_jax.errors import UserError
from diffusion_jax.pixels import edges
from diffusion_jax.registry import TRANSFORMS, load

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def _apply(spec, record, seed=0, **context):
  return apply(build_transforms([spec], **context), record, np.random.default_rng(seed))


def _record(image=IMAGE, captions=('one', 'two', 'three')):
  return {'image': image, 'captions': list(captions), 'id': 'x'}


def test_normalize_hits_its_endpoints():
  image = np.array([[[0, 51, 255]]], np.uint8)
  out = _apply('normalize', {'image': image})['image']
  assert out.dtype == np.float32
  assert out[0, 0, 0] == -1
  assert out[0, 0, 2] == 1
  np.testing.assert_allclose(out[0, 0, 1], -0.6, atol=1e-6)


def test_resize_is_pillow_bicubic_on_the_shorter_edge():
  image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  out = _apply(('resize', {'size': 10}), _record(image))['image']
  assert out.shape == (10, 15, 3)
  expected = Image.fromarray(image).resize((15, 10), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(out, np.asarray(expected))
  gray = _apply(('resize', {'size': 10}), _record(image[..., :1]))['image']
  assert gray.shape == (10, 15, 1)


def test_center_crop():
  out = _apply({'name': 'center_crop', 'size': 2}, _record())['image']
  np.testing.assert_array_equal(out, IMAGE[1:3, 2:4])


def test_random_crop_pads_with_the_border_and_reaches_every_place():
  image = np.pad(np.zeros((2, 2, 1), np.uint8), ((1, 1), (1, 1), (0, 0)), constant_values=9)
  seen = {
    tuple(_apply(('random_crop', {'size': 4, 'padding': 1}), _record(image), seed)['image'].ravel())
    for seed in range(100)
  }
  assert len(seen) == 9
  assert tuple(image.ravel()) in seen
  assert not any(0 in crop[:4] and 0 in crop[-4:] for crop in seen)


def test_random_resized_crop_keeps_constants_and_obeys_scale():
  flat = np.full((8, 8, 3), 77, np.uint8)
  out = _apply(('random_resized_crop', {'size': 5}), _record(flat))['image']
  np.testing.assert_array_equal(out, np.full((5, 5, 3), 77))
  ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, axis=0)
  spans = []
  for seed in range(50):
    spec = ('random_resized_crop', {'size': 64, 'scale': (0.25, 0.25)})
    row = _apply(spec, _record(ramp), seed)['image'][0, :, 0]
    spans.append((int(row[-1]) - int(row[0]), int(row[0])))
  assert all(abs(span - 31) <= 2 for span, _ in spans)
  assert len({start for _, start in spans}) > 10
  with pytest.raises(UserError, match='scale'):
    build_transforms([('random_resized_crop', {'size': 5, 'scale': (0.5, 1.5)})])


def test_random_flip():
  always = ('random_flip', {'probability': 1.0})
  np.testing.assert_array_equal(_apply(always, _record())['image'], IMAGE[:, ::-1])
  never = ('random_flip', {'probability': 0.0})
  np.testing.assert_array_equal(_apply(never, _record())['image'], IMAGE)
  flips = [
    np.array_equal(_apply('random_flip', _record(), seed)['image'], IMAGE[:, ::-1])
    for seed in range(200)
  ]
  assert 70 < sum(flips) < 130


@pytest.mark.parametrize('text', ['Left arrow', 'man facing right', 'clockwise vertical arrows'])
def test_random_flip_leaves_sided_images_alone(text):
  always = {'name': 'random_flip', 'probability': 1.0}
  record = _record(captions=['an arrow', text])
  np.testing.assert_array_equal(_apply(always, record)['image'], IMAGE)
  chosen = {'image': IMAGE, 'caption': text}
  np.testing.assert_array_equal(_apply(always, chosen)['image'], IMAGE)
  flipped = _apply(always | {'keep_sided': False}, record)['image']
  np.testing.assert_array_equal(flipped, IMAGE[:, ::-1])
  np.testing.assert_array_equal(
    _apply(always, _record(captions=['bright copyright']))['image'], IMAGE[:, ::-1]
  )


@pytest.mark.parametrize('text', ['an Ear-ring', 'a badge with a heart', 'a Heart'])
def test_words_of_ones_own_forbid_flips(text):
  spec = {'name': 'random_flip', 'probability': 1.0, 'words': ('heart', 'ear-ring')}
  np.testing.assert_array_equal(_apply(spec, _record(captions=[text]))['image'], IMAGE)
  other = _apply(spec, _record(captions=['hearts, bear-rings']))['image']
  np.testing.assert_array_equal(other, IMAGE[:, ::-1])


CUTS = [
  ('random_crop', {'size': (30, 40)}), ('random_flip', {'probability': 1.0}),
  ('random_resized_crop', {'size': 30, 'scale': (0.3, 0.9)}), ('resize', {'size': 20}),
  ('center_crop', {'size': 10}),
]


@pytest.fixture
def places(tmp_path):
  """100 x 240 pixels, each of which says where it lies: red its row, green its column."""
  rows, columns = np.mgrid[:100, :240].astype(np.uint8)
  Image.fromarray(np.stack([rows, columns, rows], axis=-1)).save(tmp_path / 'a.png')
  return PictureSource(Files(tmp_path, [tmp_path / 'a.png'], [[Caption('a')]]), (50, 60))


def test_any_part_of_a_scaled_picture_is_cut_out(places, tmp_path):
  source, lefts = places.uncut(), set()
  assert source[0]['image'].shape == (50, 120, 3)
  for seed in range(150):
    record = apply([RandomCut()], source[0], np.random.default_rng(seed))
    own, (top, left), size = record['sizes'].reshape(3, 2)
    assert (*own, *size, top) == (100, 240, 50, 60, 0) and 'cut' not in record
    lefts.add(int(left))
    seen = record['image'][:, 5:55, 1].astype(float).mean(axis=0)
    np.testing.assert_allclose(seen, 2 * (left + np.arange(5, 55)) + 0.5, atol=1.5)
  assert min(lefts) < 5 and max(lefts) > 55 and len(lefts) > 40
  square = np.asarray(source.at_sizes(np.array([[24, 24]], np.int32))[0]['image'].shape)
  assert square.tolist() == [24, 58, 3]
  Image.new('RGB', (4000, 4)).save(tmp_path / 'b.png')
  strip = PictureSource(Files(tmp_path, [tmp_path / 'b.png'], [[Caption('a')]]), (32, 32)).uncut()
  assert strip[0]['image'].shape == (32, 128, 3)  # And not 32 x 32,000.
  assert strip[0]['sizes'].tolist() == [4, 4000, 0, 15936, 32, 128]


@pytest.mark.parametrize('count', range(1, len(CUTS) + 1))
def test_sdxl_is_told_the_crop_that_was_taken(places, count):
  for seed in range(3):
    record = apply(build_transforms(CUTS[:count]), places[0], np.random.default_rng(seed))
    told, frame = record['sizes'], record['frame']
    height, width = record['image'].shape[:2]
    assert told.tolist()[:2] == [100, 240] and told.tolist()[4:] == [height, width]
    down = (np.arange(height) + told[2] + 0.5) / frame[0] * 100
    across = (np.arange(width) + told[3] + 0.5) / frame[1] * 240
    across = 240 - across if count > 1 else across
    pixels = record['image'].astype(float)
    np.testing.assert_allclose(pixels[..., 0].mean(axis=1), down - 0.5, atol=5)
    np.testing.assert_allclose(pixels[..., 1].mean(axis=0), across - 0.5, atol=10)
  if count == 1:
    assert told[2] <= 20 and 30 <= told[3] <= 50  # 50 x 60 of 50 x 120, and 30 x 40 of that.


def test_a_crop_is_told_of_records_that_have_sizes_alone():
  assert set(_apply(('center_crop', {'size': 2}), _record())) == {'image', 'captions', 'id'}


def test_tags_are_shuffled_after_those_that_are_kept():
  of = lambda seed, **options: _apply(
    ('shuffle_tags', {'keep': 2, **options}), {'caption': 'sks,  a, b,c , d,'}, seed
  )['caption']
  found = [of(seed) for seed in range(200)]
  assert {text[:8] for text in found} == {'sks, a, '}
  assert {text[8:] for text in found} == {
    ', '.join(order) for order in itertools.permutations('bcd')
  }
  assert of(0, probability=0.0) == 'sks,  a, b,c , d,'
  some = [of(seed, probability=0.5) == 'sks,  a, b,c , d,' for seed in range(200)]
  assert 70 < sum(some) < 130


def test_tags_are_dropped_at_their_rate_and_never_all():
  spec = ('drop_tags', {'rate': 0.3, 'keep': 1})
  found = [
    _apply(spec, _record(captions=['a, b, c, d']), seed)['captions'][0].split(', ')
    for seed in range(300)
  ]
  assert all(tags[0] == 'a' and sorted(tags) == tags for tags in found)
  assert abs(np.mean([4 - len(tags) for tags in found]) / 3 - 0.3) < 0.06
  all_of_them = ('drop_tags', {'rate': 1.0})
  alone = {_apply(all_of_them, {'caption': 'a, b'}, seed)['caption'] for seed in range(9)}
  assert alone == {'a', 'b'}
  with pytest.raises(UserError, match='drop_tags with keep=0, fraction 2'):
    build_transforms([('drop_tags', {'rate': 2.0})])


def test_words_are_put_around_a_caption_before_or_after_it_is_chosen():
  spec = ('wrap_caption', {'prefix': 'a photo of ', 'suffix': ', film'})
  assert _apply(spec, {'caption': 'x'})['caption'] == 'a photo of x, film'
  assert _apply(spec, _record())['captions'][1] == 'a photo of two, film'
  with pytest.raises(UserError, match='before tokenize'):
    _apply(spec, {'tokens': np.zeros(3)})


def test_captions():
  record = _record()
  assert _apply('first_caption', record)['caption'] == 'one'
  chosen = [_apply('choose_caption', record, seed) for seed in range(60)]
  assert {one['caption'] for one in chosen} == {'one', 'two', 'three'}
  assert 'captions' not in chosen[0]
  assert record['captions'] == ['one', 'two', 'three']
  with pytest.raises(UserError, match='Record x has no captions'):
    _apply('choose_caption', _record(captions=()))


def test_tokenize_drops_texts():
  def tokenizer(text):
    return [len(text), 0]

  specs = ['first_caption', 'tokenize']
  record = _record() | {'label': np.int32(4)}
  out = apply(build_transforms(specs, tokenizer=tokenizer), record, np.random.default_rng(0))
  assert set(out) == {'image', 'tokens', 'label'}
  assert out['tokens'].dtype == np.int32
  np.testing.assert_array_equal(out['tokens'], [3, 0])
  with pytest.raises(UserError, match='put choose_caption or first_caption before'):
    _apply('tokenize', _record(), tokenizer=tokenizer)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('blur', "a name in data.transforms is 'blur'; choose one of resize"),
    (('resize', {'size': 3, 'edge': 1}), "resize has no argument 'edge': it takes size"),
    ('resize', "resize needs the argument 'size'"),
    ({'size': 3}, 'has no name'),
  ],
)
def test_wrong_specs(spec, message):
  with pytest.raises(UserError, match=message):
    build_transforms([spec])


def test_context_fills_in_and_specs_come_first():
  resize, crop = build_transforms(['resize', ('center_crop', {'size': 2})], size=8, unused=1)
  assert (resize.size, crop.size) == (8, 2)


@pytest.mark.parametrize(
  'image', [IMAGE[..., 0], IMAGE.astype(np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_wrong_images(image):
  sized = ('resize', 'center_crop', 'random_crop', 'random_resized_crop')
  for name in (*sized, 'random_flip', 'normalize'):
    with pytest.raises(UserError, match='give uint8'):
      _apply((name, {'size': 2} if name in sized else {}), _record(image))


@pytest.mark.parametrize('spec', [
  ('resize', {'size': 5}), ('center_crop', {'size': 6}), ('random_crop', {'size': 6, 'padding': 2}),
  ('random_resized_crop', {'size': 5, 'ratio': (0.5, 2.0)}), ('random_flip', {'probability': 1.0}),
])
def test_what_moves_an_image_moves_its_control(spec):
  image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
  for seed in range(8):
    out = _apply(spec, _record(image) | {'control': image.copy()}, seed)
    np.testing.assert_array_equal(out['control'], out['image'])
    assert not np.array_equal(out['image'], image)
  with pytest.raises(UserError, match=r'The control of record x is .*: give both alike'):
    _apply(spec, _record(image) | {'control': image[:4]})


def test_crop_larger_than_image():
  for name in ('center_crop', 'random_crop'):
    with pytest.raises(UserError, match='5 x 5 pixels from an image of 4 x 6'):
      _apply((name, {'size': 5}), _record())


def test_every_transform_is_frozen_and_says_whether_it_is_random():
  for name in TRANSFORMS:
    made = load(TRANSFORMS, name)
    drawn = name in ('choose_caption', 'shuffle_tags', 'drop_tags')
    assert made.random == (name.startswith('random') or drawn)
    assert made.__dataclass_params__.frozen


def test_edges_are_where_brightness_steps():
  """Sobel's gradient of a step is the same on its two sides and zero elsewhere."""
  image = np.zeros((6, 8, 3), np.uint8)
  image[:, 4:] = 90
  wanted = np.zeros((6, 8), np.uint8)
  wanted[:, 3:5] = 255
  for found in (edges(image), edges(image.transpose(1, 0, 2)).transpose(1, 0, 2)):
    assert found.shape == (6, 8, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.repeat(wanted[..., None], 3, axis=-1))
  assert not edges(np.full((4, 4, 3), 9, np.uint8)).any()
  corner = np.zeros((5, 5, 3), np.uint8)
  corner[2:, 2:] = 255
  steepest = edges(corner)[..., 0]
  assert steepest[1, 1] < steepest[2, 2] == steepest.max() == 255
  record = build_transforms(['edges', 'normalize'])
  out = apply(record, {'image': image}, np.random.default_rng(0))
  np.testing.assert_array_equal(out['control'], edges(image))


@pytest.mark.parametrize('name', ['resize', 'center_crop', 'random_crop', 'random_resized_crop'])
def test_height_and_width(name):
  """Every transform with a size takes two; equal ones are a square's."""
  image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  of = lambda size: _apply((name, {'size': size}), _record(image))['image']
  wide = of((6, 18))
  assert wide.shape == ((12, 18, 3) if name == 'resize' else (6, 18, 3))
  assert of([18, 6]).shape == ((18, 27, 3) if name == 'resize' else (18, 6, 3))
  np.testing.assert_array_equal(of((10, 10)), of(10))
  if name == 'center_crop':
    np.testing.assert_array_equal(wide, image[7:13, 6:24])


def test_a_random_rectangle_has_the_aspect_of_the_size():
  """Nothing is stretched: a disk stays one."""
  y, x = np.mgrid[:60, :60] - 29.5
  disk = np.repeat((np.hypot(y, x) < 8).astype(np.uint8)[..., None] * 255, 3, axis=-1)
  spec = ('random_resized_crop', {'size': (60, 30), 'scale': (0.5, 0.5)})
  found = _apply(spec, _record(disk))['image'][..., 0] > 127
  rows, columns = (np.ptp(np.flatnonzero(found.any(axis))) for axis in (1, 0))
  assert rows > 10 and abs(rows - columns) <= 2


def test_transforms_that_leave_another_size_are_refused():
  check_transforms([('center_crop', {}), 'normalize'], (6, 4))
  with pytest.raises(UserError, match='make pictures of 4 x 4 pixels'):
    check_transforms([('center_crop', {'size': 4})], (6, 4))
