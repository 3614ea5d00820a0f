"""The protocol of the source of pictures: parts, sizes of each record, original sizes, hashes."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.splits import APART, content_hashes
from diffusion_jax.data.unreadable import Counted, Damage
from diffusion_jax.errors import Unreadable
from tests.tiny import folder_sources

SIZES = [(16, 40), (24, 8), (40, 16), (9, 9)]


@pytest.fixture
def source(tmp_path):
  rng = np.random.default_rng(0)
  for i, (height, width) in enumerate(SIZES):
    turned = Image.Exif()
    turned[0x0112] = 6 if i == 2 else 1  # Lying on its side.
    size = (width, height) if i == 2 else (height, width)
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(
      tmp_path / f'{i}.png', exif=turned
    )
  (tmp_path / '4.png').write_bytes(b'no picture')
  return folder_sources(tmp_path, 8, 'x', test_fraction=0)[0]


def test_each_record_is_read_at_its_size(source):
  shapes = np.array([(8, 16), (16, 8), (16, 8), (8, 8), (8, 8)], np.int32)
  sized = source.at_sizes(shapes)
  for i, (shape, own) in enumerate(zip(shapes[:4].tolist(), SIZES, strict=True)):
    record, other = sized[i], source.at_sizes(np.tile(shapes[i], (5, 1)))[i]
    assert record['image'].shape == (*shape, 3) and record['id'] == str(i)
    assert record['sizes'][[0, 1, 4, 5]].tolist() == [*own, *shape]
    np.testing.assert_array_equal(record['image'], other['image'])
  assert sized[0]['sizes'].tolist() == [16, 40, 0, 2, 8, 16]
  assert source[0]['image'].shape == (8, 8, 3)  # As it was.
  some = sized.part([3, 1], APART)
  assert [some[i]['image'].shape for i in (0, 1)] == [(8, 8, 3), (16, 8, 3)]
  with pytest.raises(ValueError, match='not sizes for 2'):
    some.at_sizes(shapes)


def test_original_sizes_and_hashes_are_of_the_records_in_their_order(source):
  assert source.original_sizes().tolist() == [*map(list, SIZES), [0, 0]]
  assert source.original_sizes().dtype == np.int32
  files = source.entries.files
  assert [row.tobytes() for row in source.hashes()] == [h[:16] for h in content_hashes(files)]
  part = source.part([4, 2], APART).part([1, 0], APART)
  assert part.original_sizes().tolist() == [list(SIZES[2]), [0, 0]]
  np.testing.assert_array_equal(part.hashes(), source.hashes()[[2, 4]])
  assert part[0]['id'] == '2' and part.fingerprint() != source.fingerprint()
  files[2].write_bytes(files[3].read_bytes())
  assert (part.hashes()[0] == source.hashes()[3]).all()


def test_what_counts_bad_records_is_put_around_a_source_of_sizes(source):
  """For the sizes are of the source in it."""
  damage = Damage()
  counted = Counted(source.at_sizes(np.tile(np.int32([8, 16]), (5, 1))), 0.5, damage, 'records')
  assert counted[0]['image'].shape == (8, 16, 3) and len(counted.hashes()) == 5
  with pytest.raises(Unreadable, match=r'4\.png cannot be read'):
    counted[4]
  assert len(damage) == 1
