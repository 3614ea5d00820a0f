"""classify and search: pictures by words and by pictures, with embeddings that are kept."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import embeddings
from diffusion_jax.evaluation.embeddings import class_embeddings
from diffusion_jax.evaluation.extractors.clip import load_features
from diffusion_jax.evaluation.zero_shot import Answers, words_of
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests import tiny

COLOURS = {'red heart': (220, 40, 40), 'green heart': (60, 170, 60), 'blue heart': (60, 110, 220)}


@pytest.fixture(scope='module')
def pictures(sources, tmp_path_factory):
  """A folder of OpenMoji by group, two of each group, of their own sizes."""
  root, counts = tmp_path_factory.mktemp('pictures'), {}
  for i in range(len(sources[0])):
    record = sources[0][i]
    group = record['label']
    counts[group] = counts.get(group, 0) + 1
    if counts[group] > 2:
      continue
    (root / group).mkdir(exist_ok=True)
    image = Image.fromarray(record['image']).resize((32 + 8 * counts[group], 40))
    image.save(root / group / f'{counts[group]}.png')
  return root


@pytest.fixture(scope='module')
def features(parts):
  with tiny.few_devices():
    return load_features(parts['clip'], make_mesh(MeshConfig()))


def test_zero_shot_is_the_mean_over_templates_and_a_softmax(
  command, pictures, parts, features, tmp_path, capsys
):
  """Probabilities by hand from the embeddings; classes and labels are the folders; JSON, CSV and
  what is printed agree."""
  out = tmp_path / 'answers.json'
  templates = ['{}', 'a drawing of {}']
  given = [part for text in templates for part in ('--template', text)]
  given += ('--clip', parts['clip'], '--top', 2, '--out', out)
  assert command('classify', pictures, *given) == 0
  said, found = capsys.readouterr().out, json.loads(out.read_text())
  classes = sorted(path.name for path in pictures.iterdir())
  assert found['classes'] == {name: [name] for name in classes}
  assert found['templates'] == templates
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  texts = unit(np.stack([
    unit(features.texts([t.replace('{}', name) for t in templates])).mean(axis=0)
    for name in classes
  ]))
  by_name = {name: [name] for name in classes}
  np.testing.assert_allclose(class_embeddings(features, by_name, templates), texts, atol=1e-5)
  files = sorted(pictures.rglob('*.png'))
  pixels = [np.asarray(Image.open(file).convert('RGB')) for file in files]
  images = np.zeros((len(files), texts.shape[1]))
  for shape in {x.shape for x in pixels}:
    rows = [i for i, x in enumerate(pixels) if x.shape == shape]
    images[rows] = unit(features.images(np.stack([pixels[i] for i in rows])))
  logits = np.exp(np.asarray(features.extractor.params['logit_scale'])) * images @ texts.T
  odds = np.exp(logits - logits.max(axis=1, keepdims=True))
  odds /= odds.sum(axis=1, keepdims=True)
  assert [one['picture'] for one in found['pictures']] == [str(file) for file in files]
  for one, row, file in zip(found['pictures'], odds, files, strict=True):
    assert one['label'] == file.parent.name and len(one['classes']) == 2
    assert one['classes'][0]['class'] == classes[row.argmax()]
    assert one['classes'][0]['probability'] == pytest.approx(row.max(), abs=2e-3)
  right = np.mean([classes[row.argmax()] == f.parent.name for row, f in zip(odds, files)])  # noqa: B905
  assert found['accuracy']['accuracy'] == pytest.approx(right)
  assert found['accuracy']['chance'] == pytest.approx(1 / len(classes))
  assert f'accuracy {right:.3f} of {len(files)} pictures' in said and 'chance' in said
  rows = list(csv.DictReader(out.with_suffix('.csv').open()))
  assert [row['class_1'] for row in rows] == [p['classes'][0]['class'] for p in found['pictures']]


def test_accuracy_counts_what_has_a_label():
  odds = np.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])
  answers = Answers(['a', 'b'], list('wxyz'), ['a', 'b', 'b', ''], odds)
  found = answers.accuracy()
  assert found == {
    'accuracy': pytest.approx(2 / 3), 'accuracy_per_class': 0.75, 'chance': 0.5,
    'commonest': pytest.approx(2 / 3), 'pictures': 3,
  }
  assert Answers(['a', 'b'], ['w'], [''], odds[:1]).accuracy() is None
  assert answers.best(2, 5) == [('b', 0.8), ('a', 0.2)]


def test_a_class_may_have_words_of_its_own(features):
  """Each text counts alike: the mean over the words and the templates of a class."""
  classes = words_of(['person=a man', 'person = a woman', 'flag', 'person=a man'])
  assert classes == {'person': ['a man', 'a woman'], 'flag': ['flag']}
  found = class_embeddings(features, classes, ['{}', 'small {}'])
  each = features.texts(['a man', 'small a man', 'a woman', 'small a woman'])
  mean = (each / np.linalg.norm(each, axis=1, keepdims=True)).mean(axis=0)
  np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-5)
  assert found.shape == (2, len(mean))
  with pytest.raises(UserError, match='NAME=WORDS'):
    words_of(['person='])


@pytest.fixture
def hearts(tmp_path):
  """A folder of plain hearts of three colours, as files of other names."""
  folder = tmp_path / 'hearts'
  folder.mkdir()
  y, x = np.mgrid[-1.3:1.3:64j, -1.3:1.3:64j]
  inside = (x**2 + y**2 - 1) ** 3 + x**2 * y**3 < 0
  for number, colour in enumerate(COLOURS.values()):
    pixels = np.where(inside[..., None], np.array(colour), 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f'{number}.png')
  return folder


def test_search_finds_by_text_and_by_picture_and_embeds_what_is_new(
  hearts, command, tmp_path, capsys, monkeypatch
):
  """Texts find their colours; a picture finds itself. Renamed files are known, changed ones not;
  a damaged file of the cache is left out; nothing in the page comes from elsewhere."""
  out, cache = tmp_path / 'out' / 'found.html', tmp_path / 'cache'
  texts = [part for name in COLOURS for part in ('--text', name)]
  run = lambda *more: command('search', hearts, *more, '--cache', cache, '--out', out)
  assert run(*texts, '--picture', hearts / '1.png', '--top', 2) == 0
  found = json.loads(out.with_suffix('.json').read_text())
  names = [one['found'][0]['picture'] for one in found]
  assert names == [str(hearts / f'{n}.png') for n in (0, 1, 2, 1)]
  assert found[3]['found'][0]['similarity'] == pytest.approx(1, abs=1e-3)
  assert all(len(one['found']) == 2 for one in found)
  html = out.read_text()
  assert html.count('<img') == 4 * 2 + 1 and 'red heart' in html
  assert not re.search(r'(src|href)="(?!data:)', html)
  assert '3 of them were new' in capsys.readouterr().out

  (hearts / '0.png').rename(hearts / 'renamed.png')
  (hearts / 'broken.png').write_bytes(b'no picture')
  shutil.copy(hearts / '1.png', hearts / 'twin.png')
  embedded = []
  extraction = embeddings.Extraction.__call__
  monkeypatch.setattr(embeddings.Extraction, '__call__', lambda self, images: (
    embedded.append(len(images)), extraction(self, images)
  )[1])
  assert run('--text', 'red heart') == 0
  said = capsys.readouterr().out
  assert not any(embedded) and '4 pictures' in said and '0 of them were new' in said
  assert 'broken.png' in said
  assert json.loads(out.with_suffix('.json').read_text())[0]['found'][0]['picture'].endswith(
    'renamed.png'
  )

  for file in cache.rglob('*.safetensors'):
    file.write_bytes(file.read_bytes()[:-5])
  (hearts / 'broken.png').unlink()
  assert run('--text', 'red heart') == 0
  assert embedded == [0, 3]
  assert 'left out' in capsys.readouterr().err


@pytest.mark.parametrize(('arguments', 'words'), [
  (('classify',), 'pictures'),
  (('classify', 'x', '--template', 'no place', '--class', 'a', '--class', 'b'), '{}'),
  (('classify', '{hearts}', '--class', 'a'), 'one class'),
  (('classify', '{hearts}', '--class', 'a', '--class', 'b', '--out', 'x.csv'), 'JSON'),
  (('search', '{hearts}', '--out', 'x.html'), '--text'),
  (('search', '{hearts}', '--text', 'x', '--out', 'x.json'), 'page'),
  (('search', '{empty}', '--text', 'x', '--out', 'x.html'), 'no picture'),
  (('search', '{hearts}', '--picture', 'gone.png', '--out', 'x.html'), 'gone.png'),
])
def test_what_cannot_be_done_is_one_sentence(arguments, words, hearts, fails, tmp_path):
  (tmp_path / 'empty').mkdir()
  places = {'hearts': hearts, 'empty': tmp_path / 'empty'}
  given = [
    part.format(**places) if part in ('{hearts}', '{empty}') else part for part in arguments
  ]
  assert words in fails(*given)
