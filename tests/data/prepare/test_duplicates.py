"""Pictures that look the same are found within and across splits; different ones are not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from diffusion_jax.__main__ import main
from diffusion_jax.data.perceptual import look, pairs_alike


def _jpeg(picture, quality):
  file = io.BytesIO()
  picture.save(file, 'JPEG', quality=quality)
  return Image.open(file).convert('RGB')


COPIES = {
  'half the size': lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS),
  'twice the size': lambda p: p.resize((p.width * 2, p.height * 2), Image.Resampling.BILINEAR),
  'JPEG': lambda p: _jpeg(p, 75),
  'brighter': lambda p: ImageEnhance.Brightness(p).enhance(1.06),
  'darker': lambda p: ImageEnhance.Brightness(p).enhance(0.94),
}


@pytest.fixture(scope='module')
def drawings(sources):
  images = [Image.fromarray(sources[0][i]['image']) for i in range(240)]
  return [image.resize((96, 96), Image.Resampling.BICUBIC) for image in images]


def _pairs(pictures):
  looks = [look(np.asarray(each)) for each in pictures]
  copies = np.stack([copy for _, copy in looks])
  return pairs_alike(np.array([each for each, _ in looks], np.uint64), lambda i: copies[i])


@pytest.mark.parametrize('kind', COPIES)
def test_copies_are_found(drawings, kind):
  every = [*drawings, *map(COPIES[kind], drawings)]
  found = {tuple(pair) for pair in _pairs(every).tolist()}
  count = len(drawings)
  recall = np.mean([(i, i + count) in found for i in range(count)])
  assert recall >= 0.95


def test_different_drawings_are_not(drawings):
  found = _pairs(drawings)
  assert len(found) <= 2, found  # Of 28,680 pairs; some emoji differ by a few pixels.


def test_pairs_are_found_without_comparing_all(monkeypatch):
  rng = np.random.default_rng(0)
  hashes = rng.integers(0, 2**63, 20_000, np.uint64)
  flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (6, 500), np.uint64), axis=0)
  hashes[10_000:10_500] = hashes[:500] ^ flips
  copies = np.zeros((20_000, 16, 16, 3), np.uint8)
  asked = []
  found = pairs_alike(hashes, lambda i: asked.append(len(i)) or copies[i])
  assert found.tolist() == [[i, 10_000 + i] for i in range(500)]
  assert sum(asked) < 2000


def test_copies_across_splits_are_counted_and_said(drawings, tmp_path, capsys, monkeypatch):
  """Also where that would take too long when the source is opened."""
  monkeypatch.setattr('diffusion_jax.data.sources.folder.Files.quick', 1)
  for split, pictures in {
    'train': drawings[:40],
    # One byte for byte, one resized, one re-encoded, one brighter, and others.
    'test': [drawings[0], COPIES['half the size'](drawings[1]), COPIES['brighter'](drawings[3]),
             *drawings[100:110]],
  }.items():
    (tmp_path / 'in' / split).mkdir(parents=True)
    for number, picture in enumerate(pictures):
      picture.save(tmp_path / 'in' / split / f'drawing_{number}.png')
  drawings[2].save(tmp_path / 'in' / 'test' / 'again.jpg', quality=80)
  drawings[5].save(tmp_path / 'in' / 'train' / 'twice.png')
  out = tmp_path / 'set'
  assert main(['prepare', '--source', f'folder:{tmp_path / "in"}', '--out', str(out), '--caption',
               '{name}', '--workers', '1', '--shards', '3']) == 0
  sentence = ('14 test pictures 4 are trained on, or look like one that is (1 byte for byte)')
  assert f'beware: of {sentence}' in capsys.readouterr().err
  card, page = (out / 'README.md').read_text(), (out / 'card.html').read_text()
  assert f'Of {sentence}' in card and f'Of {sentence}' in page
  assert '| train | 41 | 3 |' in card and '| test | 14 | 1 |' in card
  row, = (line for line in card.splitlines() if line.startswith('| train |'))
  assert row.split('|')[5:7] == [' 1 ', ' 0 ']
  assert 'too long' not in card + page + (out / 'records.json').read_text()
  assert 'test: again' in page and 'default-src' in page and 'src="http' not in page
  for heading in ('Sizes', 'Captions', 'Pictures that look the same', 'Made by', 'Splits'):
    assert f'<h2>{heading}</h2>' in page
  assert 'drawing' in page and '--shards 3' in card
