"""evaluate: images and references of every kind, damaged ones too, and files of statistics."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from diffusion_jax.data.images import read_pixels
from diffusion_jax.evaluation.extract import reader
from diffusion_jax.evaluation.extractors.clip import load_features
from diffusion_jax.evaluation.images import open_images
from diffusion_jax.evaluation.metrics.gaussians import frechet_distance
from diffusion_jax.evaluation.statistics import Statistics, load_statistics
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests import tiny

COUNT = 24


@pytest.fixture(scope='module')
def features(parts):
  return '--features', f'clip:{parts["clip"]}'


@pytest.fixture(scope='module')
def stack(sources):
  return np.stack([sources[0][i]['image'] for i in range(COUNT)])


@pytest.fixture(scope='module')
def statistics_of(parts):
  """statistics_of(images): in the features of the tiny CLIP."""
  clip = load_features(parts['clip'], make_mesh(MeshConfig()))
  return lambda images: Statistics.from_features(clip.images(np.stack(images)))


def _encoded(image, kind):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, kind)
  return buffer.getvalue()


def _damaged_folder(folder, stack):
  """Pictures of every format, whole and cut: (path, names of the damaged, pixels of the whole)."""
  kinds, whole, bad = ('png', 'jpeg', 'webp', 'bmp', 'gif', 'tiff'), [], []
  for i, image in enumerate(stack):
    kind = kinds[i % len(kinds)]
    data, path = _encoded(image, kind), folder / f'{i:02d}.{kind}'
    cut = i < len(kinds)
    path.write_bytes(data[: len(data) // 2] if cut else data)
    bad += [path.name] if cut else []
    whole += [] if cut else [read_pixels(path)]
  return folder, bad, whole


def _damaged_tar(folder, stack):
  """Two shards; the second ends within its last picture but one."""
  for shard in range(2):
    with tarfile.open(folder / f'{shard}.tar', 'w') as archive:
      for i in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
        data = _encoded(stack[i], 'png')
        entry = tarfile.TarInfo(f'{i:02d}.png')
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo(f'{i:02d}.txt'))
  with tarfile.open(folder / '1.tar') as archive:
    end = archive.getmember(f'{COUNT - 2:02d}.png').offset_data + 50
  with (folder / '1.tar').open('r+b') as file:
    file.truncate(end)
  return folder, [f'{COUNT - 2:02d}.png', f'what follows {COUNT - 2:02d}.png'], stack[: COUNT - 2]


def _damaged_records(folder, small_data, sources):
  """A prepared data set with a flipped byte in one record of its test split."""
  (file,) = Path(small_data).glob(f'openmoji/{tiny.SIZE}/*/features.json')
  copy = shutil.copytree(file.parent, folder / 'data')
  (records,) = copy.glob('*test*array_record*')
  data = bytearray(records.read_bytes())
  data[np.flatnonzero(np.frombuffer(data, np.uint8))[2000]] ^= 1
  records.write_bytes(data)
  images = open_images(f'{copy}:test')
  there = [image is not None for image in reader(images)(range(len(images))).images]
  assert there.count(False) == 1
  bad = there.index(False)
  whole = [sources[1][i]['image'] for i in range(len(there)) if i != bad]
  return f'{copy}:test', [f'the record {bad} of test'], whole


@pytest.mark.parametrize('kind', ['folder', 'tar', 'records'])
def test_damaged_images_are_counted_named_and_refused(
  command, fails, features, stack, sources, small_data, statistics_of, tmp_path, capsys, kind
):
  place = tmp_path / 'images'
  place.mkdir()
  path, bad, whole = {
    'folder': lambda: _damaged_folder(place, stack), 'tar': lambda: _damaged_tar(place, stack),
    'records': lambda: _damaged_records(place, small_data, sources),
  }[kind]()
  out, file = tmp_path / 'out.json', tmp_path / 'statistics.npz'
  arguments = ('evaluate', 'images', path, *features, '--save_statistics', file, '--out', out)
  message = fails(*arguments)
  total = len(bad) + len(whole)
  assert f'{len(bad)} of {total} images cannot be read, more than the fraction of 0' in message
  assert bad[0] in message and not file.exists() and not out.exists()
  almost = (len(bad) - 0.5) / total
  assert f'the fraction of {almost:g} that' in fails(*arguments, '--most_unreadable', almost)
  assert command(*arguments, '--most_unreadable', len(bad) / total) == 0
  printed = capsys.readouterr().out
  assert all(name in printed for name in bad) and f'written to {file}' in printed
  settings = json.loads(out.read_text())['settings']
  assert settings['unreadable'] == len(bad) and settings['samples'] == len(whole)
  assert settings['reference'] == 'none'
  found, wanted = load_statistics(file), statistics_of(whole)
  assert found.n == len(whole)
  np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-5)
  np.testing.assert_allclose(found.covariance, wanted.covariance, atol=1e-5)


def test_a_reference_batch_gives_its_images_and_statistics_know_their_features(
  command, fails, features, parts, stack, statistics_of, tmp_path, capsys
):
  folder, out = tmp_path / 'pictures', tmp_path / 'out.json'
  folder.mkdir()
  for i, image in enumerate(stack[:20]):
    Image.fromarray(image).save(folder / f'{i:02d}.png')
  batch, own = tmp_path / 'batch.npz', tmp_path / 'own.npz'
  np.savez(batch, arr_0=stack, mu=np.zeros(8), sigma=np.eye(8))
  arguments = ('evaluate', 'images', folder, *features, '--out', out)
  more = ('--reference', batch, '--metrics', 'fd,kid', '--save_statistics', own)
  assert command(*arguments, *more) == 0
  scores = json.loads(out.read_text())
  wanted = frechet_distance(statistics_of(stack[:20]), statistics_of(stack))
  assert scores['samples']['fd_clip'] == pytest.approx(wanted, rel=1e-3)
  assert 'kid_clip' in scores['samples'] and scores['settings']['reference'] == f'npz:{batch}'
  with np.load(own) as file:
    assert set(file) == {'mu', 'sigma', 'n', 'features'} and file['n'] == 20
    assert file['features'] == 'clip/clip/bicubic'
    mu, sigma = file['mu'], file['sigma']

  def against(reference, **entries):
    if entries:
      np.savez(reference, **entries)
    assert command(*arguments, '--reference', reference, '--metrics', 'fd') == 0
    scores = json.loads(out.read_text())
    assert scores['samples']['fd_clip'] == pytest.approx(0, abs=1e-5)
    return [text for text in scores['warnings'] if 'features' in text and 'span' not in text]

  assert against(own) == []
  plain = tmp_path / 'plain.npz'
  (unsaid,) = against(plain, mu=mu, sigma=sigma)
  assert unsaid == (
    f'{plain} does not say in which features it is; the values are right if in clip/clip/bicubic.'
  )
  (other,) = against(plain, mu=mu, sigma=sigma, features='clip/ViT-L/bicubic')
  assert 'is in the features clip/ViT-L/bicubic' in other
  for name in ('inception/w/clean', 'clip/clip/clean'):
    np.savez(plain, mu=mu, sigma=sigma, features=name)
    message = fails(*arguments, '--reference', plain, '--metrics', 'fd')
    assert f'are in the features {name}, which cannot be compared with clip/clip/bicubic' in message
  np.savez(plain, mu=mu[:3], sigma=sigma[:3, :3])
  message = fails(*arguments, '--reference', plain, '--metrics', 'fd')
  assert 'are 3 wide, but clip/clip/bicubic:embedding is 8' in message


@pytest.mark.parametrize(('arguments', 'named'), [
  (['images', 'DIR', '--save_statistics', 'DIR/a.txt'], 'name it NAME.npz or NAME.pt'),
  (['likelihood', '--save_statistics', 'DIR/a.npz'], 'there is no option --save_statistics'),
  (['sweep', 'steps=2,4', '--save_statistics', 'DIR/a.npz'], 'of one set of pictures; leave'),
])
def test_what_cannot_be_saved_is_refused_at_once(fails, tmp_path, arguments, named):
  given = [text.replace('DIR', str(tmp_path)) for text in arguments]
  assert named in fails('evaluate', *given, '--out', tmp_path / 'out.json')
  assert not list(tmp_path.iterdir())


def test_texts_are_not_asked_of_an_image_tower(fails, tmp_path):
  transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
    **tiny.TOWER, image_size=24, patch_size=8, projection_dim=6,
  )).save_pretrained(tmp_path / 'tower')
  Image.new('RGB', (24, 24)).save(tmp_path / 'a.png')
  arguments = ('images', tmp_path, '--features', f'clip:{tmp_path / "tower"}')
  for metric in ('clip_score', 'retrieval'):
    message = fails('evaluate', *arguments, '--metrics', metric, '--out', tmp_path / 'out.json')
    assert f'{metric} needs texts, but clip/tower/bicubic is an image tower alone' in message
