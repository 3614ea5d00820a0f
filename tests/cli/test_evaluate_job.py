"""evaluate: pictures of a folder or of a model against a reference, in any features."""

import csv
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation.extractors.clip import load_features
from diffusion_jax.evaluation.metrics.gaussians import frechet_distance
from diffusion_jax.evaluation.statistics import Statistics, save_statistics
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests import tiny

SIZE = ('--size', tiny.SIZE)


@pytest.fixture(scope='module')
def folder(sources, tmp_path_factory):
  """The first 70 training pictures as files, two of them damaged."""
  folder = tmp_path_factory.mktemp('pictures')
  for i in range(70):
    Image.fromarray(sources[0][i]['image']).save(folder / f'{i:03d}.png')
  (folder / '030.png').write_bytes(b'')
  (folder / '031.png').write_bytes((folder / '031.png').read_bytes()[:60])
  return folder


@pytest.fixture(scope='module')
def features(parts):
  return '--features', f'clip:{parts["clip"]}'


@pytest.fixture(scope='module')
def wanted(parts, sources):
  """The distance of the 68 whole pictures to the training split, and its statistics."""
  clip = load_features(parts['clip'], make_mesh(MeshConfig()))
  rows = [i for i in range(70) if i not in (30, 31)]
  of = lambda source, rows: Statistics.from_features(
    clip.images(np.stack([source[i]['image'] for i in rows]))
  )
  reference = of(sources[0], range(len(sources[0])))
  return frechet_distance(of(sources[0], rows), reference), reference


def test_a_folder_against_the_training_split(
  command, folder, features, wanted, small_data, tmp_path, capsys
):
  out = tmp_path / 'scores.json'
  arguments = ('evaluate', 'images', folder, *features, *SIZE, '--most_unreadable', 0.05)
  assert command(*arguments, '--metrics', 'fd,kid,precision_recall', '--out', out) == 0
  scores = json.loads(out.read_text())
  assert scores['samples']['fd_clip'] == pytest.approx(wanted[0], rel=1e-4)
  assert {'kid_clip', 'precision_clip', 'recall_clip'} < set(scores['samples'])
  assert scores['settings']['samples'] == 68 and scores['settings']['unreadable'] == 2
  assert scores['settings']['reference'] == f'openmoji {tiny.SIZE} px train'
  printed = capsys.readouterr().out
  assert '030.png' in printed and 'fd_clip of 68 samples is not comparable' in printed
  html = out.with_suffix('.html').read_text()
  assert 'What to beware of' in html and 'Nearest in the reference' in html
  # Every picture is one of the training split's own.
  assert html.count('<figcaption>image ') == 12 and '1.000</figcaption>' in html
  assert 'samples over the reference' in html and html.count('<script') == 1
  # A second start reads what is there, and its row comes below.
  shutil.rmtree(tmp_path / 'scores.parts' / 'reference')
  assert command(*arguments, '--metrics', 'fd', '--seed', 3, '--out', out) == 0
  with out.with_suffix('.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['settings.seed'] for row in rows] == ['0', '3']
  assert float(rows[0]['samples.fd_clip']) == float(rows[1]['samples.fd_clip'])
  assert rows[1]['samples.kid_clip'] == ''


def test_a_file_of_statistics_serves_as_reference(
  command, fails, folder, features, wanted, small_data, tmp_path
):
  file = tmp_path / 'train.npz'
  save_statistics(file, wanted[1])
  arguments = ('images', folder, *features, '--reference', file, '--most_unreadable', 0.05)
  out = tmp_path / 'scores.json'
  assert command('evaluate', *arguments, '--metrics', 'fd', '--out', out) == 0
  found = json.loads(out.read_text())['samples']['fd_clip']
  assert found == pytest.approx(wanted[0], rel=1e-4)
  message = fails('evaluate', *arguments, '--metrics', 'kid', '--out', tmp_path / 'kid.json')
  assert 'kid needs the reference images themselves' in message


@pytest.mark.parametrize(('arguments', 'named'), [
  (['images', 'DIR', '--model', 'x'], 'there is no option --model'),
  (['likelihood', '--metrics', 'fd'], 'there is no option --metrics'),
  (['model', '--keep', 'gif'], "--keep is 'gif'"),
  (['model', '--captions', 'DIR/none.txt'], 'none.txt cannot be read'),
  (['images', 'DIR', '--metrics', 'FID'], "no metric 'FID'; did you mean fd?"),
  (['images', 'DIR', '--metrics', 'fd,kid,fd'], 'the metric fd is named twice'),
  (['images', 'DIR', '--features', 'vgg:x'], 'is not of the form KIND:PATH'),
  (['images', 'DIR/none'], 'there are no images at'),
  (['images', 'DIR', '--reference', 'DIR/none'], 'there are no images at'),
  (['images', 'DIR', '--features', 'inception/clean:none.pth'], 'none.pth'),
])
def test_what_cannot_be_is_refused(fails, folder, small_data, features, tmp_path, arguments, named):
  given = [text.replace('DIR', str(folder)) for text in arguments]
  if '--features' not in given and given[0] == 'images':
    given += features
  assert named in fails('evaluate', *given, '--out', tmp_path / 'out.json')
  assert not (tmp_path / 'out.json').exists()


def test_too_many_damaged_pictures_are_refused(fails, folder, small_data, features, tmp_path):
  message = fails('evaluate', 'images', folder, *features, *SIZE, '--out', tmp_path / 'out.json')
  assert '2 of 70 images cannot be read, more than the fraction of 0 that is allowed' in message


@pytest.mark.slow
def test_four_processes_share_the_work(folder, features, wanted, small_data, tmp_path):
  out = tmp_path / 'scores.json'
  results = tiny.together(4, small_data, (
    'evaluate', 'images', folder, *features, *SIZE, '--most_unreadable', 0.05, '--metrics', 'fd',
    '--out', out,
  ))
  assert json.loads(out.read_text())['samples']['fd_clip'] == pytest.approx(wanted[0], rel=1e-4)
  assert ['fd_clip' in printed for printed in results] == [True, False, False, False]


@pytest.mark.slow
def test_what_only_the_first_process_finds_out_ends_the_others_alike(
  features, small_data, tmp_path
):
  for i in range(3):
    Image.new('RGB', (8, 8), (i, i, i)).save(tmp_path / f'{i}.png')
  processes = tiny.beside_each_other(2, small_data, (
    'evaluate', 'images', tmp_path, '--reference', tmp_path, *features, '--metrics',
    'precision_recall', '--out', tmp_path / 'out' / 'scores.json',
  ))
  try:
    results = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [2, 2], results
  assert all('3 samples have no 3-th nearest neighbour' in err for _, err in results)


def test_pictures_are_kept_in_tar_files(tmp_path):
  from diffusion_jax.evaluation.pieces import Keeper, Made

  images = [np.full((4, 5, 3), i, np.uint8) for i in range(3)]
  made = Made([images[0], None, images[2]], ['', 'damaged', ''])
  keeper = Keeper(tmp_path, 'tar')
  assert not keeper.has(range(64, 67))
  keeper(range(64, 67), made)
  assert keeper.has(range(64, 67)) and not keeper.has(range(67, 70))
  with tarfile.open(tmp_path / '000064-000066.tar') as archive:
    assert archive.getnames() == ['000064.png', '000066.png']
    found = np.asarray(Image.open(archive.extractfile('000066.png')))
  np.testing.assert_array_equal(found, images[2])
  assert [path.name for path in tmp_path.iterdir()] == ['000064-000066.tar']
