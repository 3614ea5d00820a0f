"""`prepare --source`: the same bytes however it was interrupted, in its folder alone."""

import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.__main__ import main
from diffusion_jax.data.prepare.options import SourceOptions
from diffusion_jax.data.prepare.plan import check_space, claimed, make_plan
from diffusion_jax.data.prepare.rules import Rule, rewritten
from diffusion_jax.data.sources.entries import Entry
from diffusion_jax.data.sources.records import read_header
from diffusion_jax.errors import Unreadable, UserError
from tests.data.kinds import as_folder, opened, openmoji
from tests.tiny import ROOT


def prepare(source, out, *options):
  return main(['prepare', '--source', source, '--out', str(out), *options])


def content(folder):
  """{path: bytes} of everything in a folder, hidden or not."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def noise(seed, height=24, width=24):
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (4, 4, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png(picture):
  file = io.BytesIO()
  picture.save(file, 'PNG')
  return file.getvalue()


def many(path, count):
  """A folder of pictures with captions from their names, some of which cannot be read."""
  path.mkdir()
  for i in range(count):
    data = png(noise(i, 20 + i % 9, 24))
    data = {7: b'', 19: b'no picture', 28: data[: len(data) // 2]}.get(i, data)
    (path / f'red_thing-{i:03d}.png').write_bytes(data)
  return f'folder:{path}'


def test_openmoji_as_records_is_the_same_stream(small_data, sources, tmp_path, capsys):
  out = tmp_path / 'records'
  assert prepare('openmoji', out, '--size', '32', '--data_dir', small_data, '--workers', '1',
                 '--shards', '3') == 0
  assert f'records:{out}' in capsys.readouterr().out
  found = opened(f'records:{out}', 32)
  for ours, theirs in zip(found, sources, strict=True):
    assert len(ours) == len(theirs) and ours.credit == theirs.credit
    assert list(ours.labels) == list(theirs.labels)
    for i in range(len(ours)):
      a, b = ours[i], theirs[i]
      assert (a['id'], a['captions'], a['label']) == (b['id'], b['captions'], b['label'])
      np.testing.assert_array_equal(a['image'], b['image'])
  before = content(out)
  assert {'README.md', 'card.html', 'prepare.json', 'records.json'} < set(before)
  assert len(read_header(out)['splits']['train']) == 3
  assert prepare('openmoji', out, '--size', '32', '--data_dir', small_data, '--shards', '3') == 0
  assert 'has it already' in capsys.readouterr().err and content(out) == before


@pytest.mark.slow
def test_killed_at_any_moment_the_next_writes_the_same_bytes(tmp_path, capsys):
  many(tmp_path / 'pictures', 60)
  with tarfile.open(tmp_path / 'pictures.tar', 'w') as tar:  # Which is indexed, too.
    tar.add(tmp_path / 'pictures', 'pictures')
  source = f'tar:{tmp_path / "pictures.tar"}'
  options = ('--caption', '{name}', '--shards', '12')
  one, two = tmp_path / '1' / 'set', tmp_path / '2' / 'set'
  assert prepare(source, one, *options, '--workers', '1') == 0
  command = [sys.executable, '-m', 'diffusion_jax', 'prepare', '--source', source, '--out',
             str(two), *options, '--workers', '2']
  kills = 0
  for whole in (1, 7):
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while child.poll() is None and len([*two.glob('*.array_record')]) < whole:
      time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    kills += child.wait() == -signal.SIGKILL
  assert kills
  (two / '.train-00003-of-00012.array_record.0123abcd.tmp').write_bytes(b'half of it')
  assert prepare(source, two, *options, '--workers', '2') == 0
  assert 'are in whole shards already' in capsys.readouterr().err
  assert content(one) == content(two)


def test_bad_records_are_counted_by_cause_named_and_left_out(tmp_path, capsys):
  source = many(tmp_path / 'pictures', 60)
  out = tmp_path / 'set'
  assert prepare(source, out, '--caption', 'a {name}', '--workers', '1') == 0
  said = capsys.readouterr().err
  assert all(f'red_thing-{i:03d}.png' in said for i in (7, 19, 28))
  train, test = opened(f'records:{out}', 16)
  assert len(train) + len(test) == 57 and train[0]['captions'] == ['a red thing']
  assert 'of 57 pictures' in said or test.measured.sentence
  card = (out / 'README.md').read_text()
  assert '- empty: 1' in card and '- no picture: 1' in card and '- truncated: 1' in card
  assert '`red_thing-019` (no picture)' in card and str(tmp_path) not in card.replace(source, '')
  other = tmp_path / 'other'
  assert prepare(source, other, '--caption', 'a', '--most_unreadable', '0.02',
                 '--workers', '1') == 2
  assert '--most_unreadable' in capsys.readouterr().err and not (other / 'records.json').exists()


def test_pictures_are_kept_or_written_anew(tmp_path, sources):
  pictures = openmoji(sources, 8)
  source = as_folder(tmp_path / 'pictures', pictures)
  stored, small = tmp_path / 'stored', tmp_path / 'small'
  assert prepare(source, stored, '--test_fraction', '0', '--workers', '1') == 0
  assert prepare(source, small, '--test_fraction', '0', '--workers', '1', '--picture_format',
                 'webp', '--quality', '100', '--max_edge', '16') == 0
  kept, made = (
    opened(f'records:{out}', 16, test_fraction=0)[0].entries for out in (stored, small)
  )
  assert [kept.read(i) for i in range(8)] == [data for _, data, _ in pictures]
  for i, size in enumerate(kept.sizes.tolist()):
    with Image.open(io.BytesIO(made.read(i))) as image:
      assert image.format == 'WEBP' and max(image.size) == 16
      assert [image.height, image.width] == made.sizes[i].tolist()
      assert image.width / image.height == pytest.approx(size[1] / size[0], rel=0.06)


def test_classes_are_numbered_when_all_are_known(tmp_path):
  for i in range(24):
    (tmp_path / 'in' / 'cba'[i % 3]).mkdir(parents=True, exist_ok=True)
    (tmp_path / 'in' / 'cba'[i % 3] / f'thing_{i}.png').write_bytes(png(noise(i)))
  out = tmp_path / 'set'
  assert prepare(f'folder:{tmp_path / "in"}', out, '--caption', '{name}', '--classes', '--shards',
                 '5', '--test_fraction', '0', '--workers', '1') == 0
  train, _ = opened(f'records:{out}', 8, test_fraction=0)
  assert train.entries.labels.names == ['a', 'b', 'c']
  assert list(train.labels) == [train[i]['label'] for i in range(24)] == ['a'] * 8 + ['b'] * 8 + (
    ['c'] * 8)


def test_captions_are_rewritten_by_rules_in_order(tmp_path):
  names = ('a b/red_fox_ann_lee_01', 'a b/hat_02', 'a b/x_ann_lee_01', '3_4')
  for i, name in enumerate(names):
    (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'in' / f'{name}.png').write_bytes(png(noise(i)))
  out, rules = tmp_path / 'set', (
    r'(_[a-z]+){2}_\d+$=', r'_\d\d$=', r'(.*)/(.*)=\2, \1', r'^(\d)_(\d)$=\1 of \2', '^x, .*|`=',
    '_= ',
  )
  options = [word for rule in rules for word in ('--replace', rule)]
  rest = ('--caption', '{path}', '--test_fraction', '0', '--workers', '1')
  assert prepare(f'folder:{tmp_path / "in"}', out, *options, *rest) == 0
  found, _ = opened(f'records:{out}', 8, test_fraction=0)
  assert {record['id']: record['captions'] for record in found} == {
    'a b/red_fox_ann_lee_01': ['red fox, a b'], 'a b/hat_02': ['hat, a b'], '3_4': ['3 of 4'],
  }
  card = (out / 'README.md').read_text()
  assert 'no caption: 1' in card and '"hat, a b"' in card
  # The command of the card is that of the same set, and other rules are another one.
  command = next(line for line in card.splitlines() if line.startswith('    python'))
  words = shlex.split(command)[3:]
  before, words[words.index('--out') + 1] = content(out), str(out)
  assert main(words) == 0 and content(out) == before
  assert main([*words, '--replace', 'a=b']) == 2
  weighted = Entry('a', 'a', b'', ['x', 'y'], (3, 1))
  assert rewritten(weighted, [Rule.parse('x=')])[3:5] == (['y'], (1,))
  assert rewritten(weighted, []) is weighted
  with pytest.raises(Unreadable, match='becomes too long'):
    rewritten(weighted, [Rule.parse(f'x={"xx" * 300}'), Rule.parse(f'x={"x" * 300}')])


@pytest.mark.parametrize('made, options, why', [
  ({'mine.txt': b'x'}, (), 'has files of something else, such as mine.txt'),
  ({'prepare.json': b'{}'}, (), 'has another set'),
  ({}, ('--max_edge', '64'), '--max_edge needs --picture_format'),
  ({}, ('--shards', '-1'), '--shards'),
  ({}, ('--replace', 'no sign'), "--replace 'no sign' is no rule"),
  ({}, ('--replace', '(=x'), 'is no rule (missing )'),
  ({}, ('--replace', r'(a)=\2'), 'is no rule (invalid group reference 2'),
])
def test_a_folder_or_option_that_will_not_do_is_refused_before_work(
  tmp_path, capsys, made, options, why
):
  source, out = many(tmp_path / 'pictures', 3), tmp_path / 'set'
  out.mkdir()
  for name, data in made.items():
    (out / name).write_bytes(data)
  assert prepare(source, out, '--caption', 'a', *options) == 2
  said, = capsys.readouterr().err.splitlines()
  assert why in said
  assert content(out) == made


def test_other_options_are_another_set_and_one_command_works_at_a_time(tmp_path):
  source, out = many(tmp_path / 'pictures', 6), tmp_path / 'set'
  plan = make_plan(SourceOptions(source, str(out), 'a', test_fraction=0), 64, '')
  with claimed(plan):
    with pytest.raises(UserError, match='is in use by'), claimed(plan):
      pass
  other = make_plan(SourceOptions(source, str(out), 'b', test_fraction=0), 64, '')
  with pytest.raises(UserError, match=r'\(caption, fingerprints differ\)'), claimed(other):
    pass
  (tmp_path / 'pictures' / 'red_thing-000.png').write_bytes(png(noise(99, 40, 40)))
  changed = make_plan(plan.options, 64, '')
  with pytest.raises(UserError, match=r'\(fingerprints differ\)'), claimed(changed):
    pass


def test_too_little_space_is_said_before_work(tmp_path, monkeypatch):
  source, out = many(tmp_path / 'pictures', 6), tmp_path / 'set'
  plan = make_plan(SourceOptions(source, str(out), 'a', test_fraction=0), 64, '')
  with claimed(plan):
    check_space(plan, plan.jobs)
    usage = type('Usage', (), {'free': 1000})
    monkeypatch.setattr('shutil.disk_usage', lambda path: usage)
    with pytest.raises(UserError, match='the rest of 6 pictures needs about'):
      check_space(plan, plan.jobs)


def test_a_full_disk_is_one_sentence_and_the_next_command_goes_on(tmp_path, capsys):
  source, out = many(tmp_path / 'pictures', 40), tmp_path / 'set'
  options = ('--caption', 'a', '--shards', '2', '--test_fraction', '0', '--workers', '1')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))
  try:
    assert prepare(source, out, *options) == 2
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  said = capsys.readouterr().err.splitlines()
  assert 'train-00000-of-00002.array_record cannot be written' in said[-1]
  assert prepare(source, out, *options) == 0
  assert len(opened(f'records:{out}', 16, test_fraction=0)[0]) == 37


def test_a_card_that_fails_costs_the_card_alone(tmp_path, capsys, monkeypatch):
  source, out = many(tmp_path / 'pictures', 6), tmp_path / 'set'
  with monkeypatch.context() as patch:
    patch.setattr('diffusion_jax.viz.data_card._html', lambda summary: 1 / 0)
    assert prepare(source, out, '--caption', 'a', '--test_fraction', '0', '--workers', '1') == 0
  assert 'the card cannot be written' in capsys.readouterr().err
  assert json.loads((out / 'records.json').read_text())['splits'].keys() == {'train'}
  assert prepare(source, out, '--caption', 'a', '--test_fraction', '0', '--workers', '1') == 0
  assert (out / 'card.html').is_file() and '.prepare' not in os.listdir(out)
