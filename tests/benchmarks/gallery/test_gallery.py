"""The gallery: the files, the page, and what is refused."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.command import run_command
from benchmarks.gallery import __main__ as gallery


def draw(out, *arguments):
  return run_command('benchmarks.gallery', gallery, ['--out', str(out), *arguments])


def test_files_are_whole_svgs_and_the_page_needs_none_of_them(tmp_path, capsys):
  out = tmp_path / 'new' / 'drawings'
  arguments = ['--samplers', 'ddim', '--what', 'scores,trajectories,errors,schedules']
  assert draw(out, *arguments) == 0
  names = {path.name for path in out.iterdir()}
  assert names == {
    'schedules.svg', 'schedules_exploding.svg', 'schedules_tables.svg', 'errors.svg',
    'trajectory_ddim.svg', 'score_1.svg', 'score_0_5.svg', 'score_0_2.svg', 'index.html',
  }
  for path in out.glob('*.svg'):
    root = ElementTree.parse(path).getroot()
    ground, heading = root[1], root[2]
    assert root.tag.endswith('svg') and ground.get('class') == 'ground' and heading.text
    left, top, wide, high = map(float, root.get('viewBox').split())
    assert [float(ground.get(key)) for key in ('x', 'y', 'width', 'height')] == [
      left, top, wide, high
    ]
    assert root.get('width') == f'{wide:g}pt' and 'prefers-color-scheme: dark' in path.read_text()
  page = (out / 'index.html').read_text()
  assert page.count('<svg') == 8 and 'http' not in re.sub(r'http-equiv', '', page)
  order = [page.index(f'id="{name}"') for name in ('scores', 'trajectories', 'errors', 'schedules')]
  assert order == sorted(order)
  assert f'8 drawings and index.html are in {out}' in capsys.readouterr().out


@pytest.mark.parametrize(('arguments', 'named'), [
  (['--what', 'pictures'], "drawing 'pictures' is unknown; choose from schedules, errors"),
  (['--samplers', 'ddim,nobody', '--what', 'errors'], "sampler is 'nobody'; choose one of"),
  (['--samplers', 'nobody', '--what', 'trajectories'], "sampler is 'nobody'; choose one of"),
  (['--samplers', 'ddim,lcm', '--what', 'errors'], "sampler 'lcm' has no error"),
])
def test_what_cannot_be_drawn_is_said_before_anything_is(tmp_path, capsys, arguments, named):
  assert draw(tmp_path / 'out', *arguments) == 2
  said = capsys.readouterr().err
  assert named in said and len(said.splitlines()) == 1 and not (tmp_path / 'out').exists()


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  assert draw(tmp_path / 'file', '--what', 'schedules') == 2
  assert 'is a file; choose a directory' in capsys.readouterr().err
