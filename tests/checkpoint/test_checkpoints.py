"""What is saved comes back, on any mesh; whatever damages it is noticed, down to one bit."""

import errno
import json
import math
import os
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.checkpoint.checkpoints import Checkpoints, Keep, steps_to_keep
from diffusion_jax.checkpoint.record import write_manifest
from diffusion_jax.checkpoint.saving import may_pass, reason
from diffusion_jax.errors import UserError


def _state(step):
  """A function of the step that no other step shares."""
  kernel = jax.random.normal(jax.random.key(step), (24, 16))
  return {
    'params': {'kernel': kernel, 'half': kernel[:3].astype(jnp.bfloat16)},
    'opt_state': ({'kernel': kernel * 2}, {'kernel': kernel**2}),
    'ema': {},
    'rest': {'step': jnp.asarray(step, jnp.int32)},
  }


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _params(checkpoints, step=None):
  wanted = {'params': _abstract(_state(0)['params'])}
  return checkpoints.restore(wanted, step, everything=False)[1]['params']


def _assert_state(found, step):
  jax.tree.map(np.testing.assert_array_equal, found, _state(step))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """The folder of a run that saved steps 1, 2 and 3."""
  directory = tmp_path_factory.mktemp('saved') / 'checkpoints'
  checkpoints = Checkpoints(directory, Keep(last=3))
  for step in (1, 2, 3):
    assert checkpoints.save(step, _state(step), {'read': step})
  checkpoints.close()
  assert checkpoints.error == '' and checkpoints.steps() == [1, 2, 3]
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoints')


@pytest.fixture
def opened():
  """opened(directory, ...): (Checkpoints, list of what it says)."""
  found = []

  def run(directory, *args, **kwargs):
    said = []
    found.append(Checkpoints(directory, *args, say=said.append, **kwargs))
    return found[-1], said

  yield run
  for checkpoints in found:
    checkpoints.close()


def test_what_is_saved_comes_back(saved, opened):
  checkpoints, said = opened(saved, read_only=True)
  assert checkpoints.latest() == 3
  step, found, data = checkpoints.restore(_abstract(_state(0)))
  assert (step, data) == (3, {'read': 3})
  _assert_state(found, 3)
  _, found, data = checkpoints.restore(_abstract(_state(0)), 1)
  assert data == {'read': 1}
  _assert_state(found, 1)
  for step, wanted in ((None, 3), (2, 2)):
    params = _params(checkpoints, step)
    jax.tree.map(np.testing.assert_array_equal, params, _state(wanted)['params'])
  assert said == []


def test_arrays_may_be_donated_once_save_returns(tmp_path, opened):
  checkpoints, _ = opened(tmp_path)
  state, change = _state(5), jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  assert checkpoints.save(5, state, {})
  for _ in range(20):
    state = change(state)
  assert checkpoints.wait()
  _assert_state(checkpoints.restore(_abstract(_state(0)), 5)[1], 5)


def test_a_step_is_saved_once(copy, opened):
  checkpoints, _ = opened(copy, Keep(last=3))
  before = {path: path.stat().st_mtime_ns for path in copy.rglob('*')}
  assert checkpoints.save(3, _state(9), {}) and checkpoints.wait()
  assert {path: path.stat().st_mtime_ns for path in copy.rglob('*')} == before


def test_a_workdir_without_checkpoints(tmp_path, opened):
  checkpoints, said = opened(tmp_path / 'none', read_only=True)
  assert checkpoints.latest() is None and checkpoints.steps() == [] and said == []
  assert checkpoints.restore(_abstract(_state(0))) is None
  assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize(('writer', 'readers'), [
  (((8, 1), ('a', None)), [((4, 1), ('a', None)), ((1, 1), (None, None))]),
  (((2, 4), ('a', 'b')), [((1, 1), (None, None)), ((8, 1), (None, 'a'))]),
  (((4, 2), (('b', 'a'), None)), [((2, 2), ('b', 'a'))]),
], ids=['8-4-1', '2x4-1-8', '4x2-2x2'])
def test_restores_onto_other_meshes(tmp_path, opened, writer, readers):
  def on(mesh, spec):
    devices = jax.devices()[: mesh[0] * mesh[1]]
    mesh = jax.make_mesh(
      mesh, ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices
    )
    whole = NamedSharding(mesh, PartitionSpec())
    put = lambda x: NamedSharding(mesh, PartitionSpec(*spec)) if x.shape == (24, 16) else whole
    return jax.tree.map(put, _state(0))

  checkpoints, _ = opened(tmp_path)
  assert checkpoints.save(4, jax.device_put(_state(4), on(*writer)), {})
  for reader in readers:
    shardings = on(*reader)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), _state(0), shardings
    )
    found = checkpoints.restore(abstract, 4)[1]
    _assert_state(found, 4)
    assert jax.tree.map(lambda x: x.sharding, found) == shardings


def _damage(file, fault, rng):
  whole = file.read_bytes()
  if fault == 'deleted':
    file.unlink()
  elif fault == 'bit':
    changed = bytearray(whole)
    changed[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
    file.write_bytes(changed)
  else:
    file.write_bytes(whole[: 0 if fault == 'emptied' else rng.integers(len(whole))])


@pytest.mark.parametrize('fault', ['truncated', 'emptied', 'deleted', 'bit'])
def test_a_fault_in_any_file_but_the_arrays_is_found(saved, copy, opened, fault):
  """Files of metadata, of the record and the manifest, each in turn."""
  rng, abstract = np.random.default_rng(0), _abstract(_state(0))
  files = [p.relative_to(saved / '3') for p in sorted((saved / '3').rglob('*'))
           if p.is_file() and (p.parent.name != 'd' or fault != 'bit')]
  assert len(files) > 10
  for file in rng.choice(files, size=5, replace=False):
    _damage(copy / '3' / file, fault, rng)
    checkpoints, said = opened(copy)
    step, found, data = checkpoints.restore(abstract)
    assert (step, data) == (2, {'read': 2}), file
    _assert_state(found, 2)
    sentence, = said
    assert f'{copy / "3"} is damaged' in sentence and str(copy / 'quarantine' / '3') in sentence
    assert file.name in sentence, (file, sentence)
    assert checkpoints.steps() == [1, 2]
    shutil.rmtree(copy / 'quarantine')
    shutil.copytree(saved / '3', copy / '3')


def test_a_flipped_bit_never_passes_for_the_saved_state(saved, copy, opened):
  """Orbax alone restores most of these without a word."""
  rng, noticed, trials = np.random.default_rng(0), 0, 0
  for item in ('params', 'opt_state'):
    for file in sorted(p for p in (copy / '3' / item).rglob('d/*') if p.is_file()):
      whole = file.read_bytes()
      for _ in range(8):
        _damage(file, 'bit', rng)
        checkpoints, _ = opened(copy, read_only=True)
        try:
          _assert_state(checkpoints.restore(_abstract(_state(0)), 3)[1], 3)
        except UserError as error:  # Some bits are of parts that nothing refers to.
          assert f'{copy / "3"} is damaged' in str(error)
          noticed += 1
        file.write_bytes(whole)
        trials += 1
  assert trials // 3 < noticed <= trials


def test_a_missing_item_and_two_damaged_steps(copy, opened):
  shutil.rmtree(copy / '3' / 'opt_state')
  (copy / '2' / 'manifest.json').unlink()
  (copy / 'quarantine' / '3').mkdir(parents=True)
  checkpoints, said = opened(copy)
  step, found, _ = checkpoints.restore(_abstract(_state(0)))
  assert step == 1 and len(said) == 2
  _assert_state(found, 1)
  assert sorted(path.name for path in (copy / 'quarantine').iterdir()) == ['2', '3', '3-2']
  assert 'opt_state' in said[0] and 'manifest.json is missing' in said[1]


def test_all_damaged_is_an_error_now_and_at_the_next_start(copy, opened):
  for step in (1, 2, 3):
    (copy / str(step) / 'record' / 'record.json').write_text('{}')
  for _ in range(2):
    checkpoints, _ = opened(copy)
    with pytest.raises(UserError, match='all checkpoints are damaged') as error:
      checkpoints.restore(_abstract(_state(0)))
    assert str(copy / 'quarantine') in str(error.value)
    assert sorted(path.name for path in (copy / 'quarantine').iterdir()) == ['1', '2', '3']


def test_reading_only_moves_nothing(copy, opened):
  """And damage to what is not read does not matter."""
  (copy / '3' / 'params' / '_METADATA').unlink()
  next((copy / '2' / 'opt_state').rglob('d/*')).write_bytes(b'')
  (copy / '4.orbax-checkpoint-tmp').mkdir()
  before = sorted(copy.rglob('*'))
  checkpoints, said = opened(copy, read_only=True)
  params = _params(checkpoints)
  jax.tree.map(np.testing.assert_array_equal, params, _state(2)['params'])
  sentence, = said
  assert f'{copy / "3"} is damaged (params/_METADATA is missing)' in sentence
  assert checkpoints.restore(_abstract(_state(0)))[0] == 1
  with pytest.raises(UserError, match='3 is damaged'):
    _params(checkpoints, 3)
  assert sorted(copy.rglob('*')) == before


def _other(change):
  state = _state(0)
  change(state)
  return _abstract(state)


@pytest.mark.parametrize(('change', 'words'), [
  (lambda s: s['params'].update(kernel=jnp.zeros((24, 17))), r'float32\[24, 16\] there'),
  (lambda s: s['params'].update(half=jnp.zeros((3, 16))), "params.'half'. is bfloat16"),
  (lambda s: s['params'].update(more=jnp.zeros(3)), "holds no params.'more'"),
  (lambda s: s['params'].pop('half'), "holds params.'half'., which is not known"),
  (lambda s: s.update(ema=s['params']), 'holds no ema'),
  (lambda s: s.update(opt_state=()), 'holds opt_state'),
], ids=['shape', 'type', 'more', 'less', 'item', 'no item'])
def test_another_model_is_no_damage(saved, opened, change, words):
  before = sorted(saved.rglob('*'))
  checkpoints, said = opened(saved, Keep(last=3))
  with pytest.raises(UserError, match=words) as error:
    checkpoints.restore(_other(change))
  assert 'of another model' in str(error.value)
  assert said == [] and sorted(saved.rglob('*')) == before


def test_leftovers_are_removed_when_opened_for_writing(copy, opened):
  for name in ('4.orbax-checkpoint-tmp', '1.deleting'):
    shutil.copytree(copy / '1', copy / name)
  checkpoints, _ = opened(copy)
  assert sorted(path.name for path in copy.iterdir()) == ['1', '2', '3']
  assert checkpoints.latest() == 3


def test_scores_decide_what_stays(tmp_path, opened):
  keep = Keep(last=1, every_steps=4, best='fid')
  checkpoints, said = opened(tmp_path, keep)
  for step, fid in ((1, 9.0), (2, 3.0), (3, 5.0)):
    checkpoints.scores(step, {'fid': fid})
    assert checkpoints.save(step, _state(step), {}) and checkpoints.wait()
  assert checkpoints.steps() == [2, 3]
  checkpoints.scores(3, {'fid': 1.0})
  assert checkpoints.steps() == [3]
  assert json.loads((tmp_path / 'scores.json').read_text())['3'] == {'fid': 1.0}
  again, said = opened(tmp_path, keep)
  for step in (4, 5, 6):
    assert again.save(step, _state(step), {}) and again.wait()
  assert again.steps() == [3, 4, 6] and said == []


def test_a_metric_that_nobody_measures_is_said(tmp_path, opened):
  checkpoints, said = opened(tmp_path, Keep(best='fidd'))
  checkpoints.scores(1, {'fid': 1.0, 'kid': 2.0})
  assert said == [
    "loop.keep_best is 'fidd', which this evaluation does not measure; it measures fid, kid."
  ]


@pytest.mark.parametrize('content', [
  b'{"3": {"fid" 1}}', b'', b'[]', b'null', b'7', b'\x00\xff', b'{"3": null}', b'{"x": {}}',
  b'{"\xc2\xb2": {"fid": 1}}', b'{"3": {"fid": [1]}}', b'{"3": {"fid": "many"}}', b'[' * 50_000,
  b'{"3": {"fid": 1' + b'0' * 5000 + b'}}', None,
])
def test_damaged_scores_are_forgotten(copy, opened, content):
  file = copy / 'scores.json'
  if content is None:
    file.mkdir()
  else:
    file.write_bytes(content)
  checkpoints, said = opened(copy, Keep(best='fid'))
  assert len(said) == 1 and 'scores.json' in said[0]
  checkpoints.scores(3, {'fid': 1.0})
  assert json.loads(file.read_text()) == {'3': {'fid': 1.0}}


NAMES = ('\u0663', '\u0661\u0662', '\uff13', '\u00b2', '\u2167', '007', '+5', '-5', '5.0', ' 5',
         '1e3', '9' * 40, '0x5', '5_0')


def test_folders_whose_names_only_look_like_steps(copy, opened):
  for name in NAMES:
    (copy / name).mkdir()
  for options in ({}, {'read_only': True}):
    checkpoints, _ = opened(copy, Keep(last=9), **options)
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.latest() == 3
    assert checkpoints.restore(_abstract(_state(0)))[0] == 3
  assert checkpoints.directory == copy and all((copy / name).is_dir() for name in NAMES)


def _rename(copy):
  (copy / '3').rename(copy / '50')
  return 2


def _copy_on(copy):
  shutil.copytree(copy / '1', copy / '50')
  return 3


def _link_on(copy):
  (copy / '50').symlink_to('2', target_is_directory=True)
  return 3


def _swap(copy):
  for old, new in (('3', 'x'), ('2', '3'), ('x', '2')):
    (copy / old).rename(copy / new)
  return 1


@pytest.mark.parametrize('change', [_rename, _copy_on, _link_on, _swap])
def test_a_checkpoint_under_the_number_of_another_step_is_set_aside(copy, opened, change):
  good = change(copy)
  reader, said = opened(copy, read_only=True)
  params = _params(reader)
  jax.tree.map(np.testing.assert_array_equal, params, _state(good)['params'])
  assert 'it is the checkpoint of step' in said[0]
  checkpoints, said = opened(copy, Keep(last=9))
  step, found, data = checkpoints.restore(_abstract(_state(0)))
  assert (step, data) == (good, {'read': good})
  _assert_state(found, good)
  assert all('it is the checkpoint of step' in line and 'quarantine' in line for line in said)
  assert len(said) == (2 if change is _swap else 1)
  assert not (copy / '50').exists()


def test_one_of_an_older_version_is_known_by_the_step_in_its_arrays(copy, opened):
  (copy / '3').rename(copy / '50')
  for folder in (copy / '50', copy / '2'):
    file = folder / 'record' / 'record.json'
    record = json.loads(file.read_text())
    del record['step']
    file.write_text(json.dumps(record))
    write_manifest(folder)
  checkpoints, said = opened(copy, Keep(last=9))
  assert checkpoints.restore(_abstract(_state(0)))[0] == 2
  assert 'it is the checkpoint of step 3 under another name' in said[0]


@pytest.mark.parametrize('what', ['copy', 'empty', 'file', 'link'])
def test_what_stands_where_a_step_is_to_be_saved_is_moved(copy, opened, what):
  place = copy / '4'
  if what == 'copy':
    shutil.copytree(copy / '2', place)
  elif what == 'empty':
    place.mkdir()
  elif what == 'file':
    place.write_text('4')
  else:
    place.symlink_to('nowhere')
  checkpoints, said = opened(copy, Keep(last=9))
  assert checkpoints.save(4, _state(4), {'read': 4}) and checkpoints.wait()
  assert checkpoints.restore(_abstract(_state(0)))[0] == 4
  assert len(said) == 1 and 'is no checkpoint of that step' in said[0]


def test_a_checkpoint_behind_a_link_is_one_and_only_the_link_is_deleted(copy, opened, tmp_path):
  elsewhere = (copy / '3').rename(tmp_path / 'elsewhere')
  (copy / '3').symlink_to(elsewhere, target_is_directory=True)
  checkpoints, said = opened(copy, Keep(last=1))
  assert checkpoints.restore(_abstract(_state(0)))[0] == 3
  assert checkpoints.save(4, _state(4), {}) and checkpoints.wait() and said == []
  assert checkpoints.steps() == [4] and (elsewhere / 'manifest.json').is_file()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(UserError, match='is not a folder'):
    Checkpoints(tmp_path / 'checkpoints')


def test_a_write_that_fails_in_the_background(copy, opened):
  """The kernel refuses files above a size, which no look at the free space foretells."""
  checkpoints, said = opened(copy, Keep(last=3), retry_seconds=0.2)
  large = {**_state(7), 'params': {'x': jax.random.normal(jax.random.key(0), (1 << 18,))}}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
  try:
    assert checkpoints.save(7, large, {})
    end = time.monotonic() + 30
    while not checkpoints.error and time.monotonic() < end:
      checkpoints.poll()
      time.sleep(0.01)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert said == [checkpoints.error] and 'step 7 could not be saved' in checkpoints.error
  assert not checkpoints.should_retry()
  assert sorted(path.name for path in copy.iterdir()) == ['1', '2', '3']
  time.sleep(0.25)
  assert checkpoints.should_retry()
  large |= {'rest': _state(8)['rest']}
  assert checkpoints.save(8, large, {}) and checkpoints.wait()
  assert not checkpoints.should_retry() and checkpoints.error == ''
  assert said[1:] == ['checkpoints can be saved again.'] and checkpoints.steps() == [2, 3, 8]
  found = checkpoints.restore(_abstract(large), 8)[1]
  jax.tree.map(np.testing.assert_array_equal, found, large)


@pytest.mark.parametrize(('error', 'words', 'passes'), [
  (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 'the disk is full', True),
  (ValueError(f'{"x" * 300}: No space left on device (os error 28)'), 'the disk is full', True),
  (ValueError(f'{"x" * 300}: {os.strerror(errno.EROFS)} [30]'), os.strerror(errno.EROFS), True),
  (OSError(errno.EIO, os.strerror(errno.EIO)), os.strerror(errno.EIO), True),
  (FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)), os.strerror(errno.EEXIST), False),
  (ValueError('the moon is full'), 'the moon is full', False),
])
def test_what_may_pass_is_told_from_what_may_not(error, words, passes):
  assert words in reason(error) and may_pass(reason(error)) == passes


STEPS = [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(('keep', 'stay'), [
  (Keep(last=1), {60}),
  (Keep(last=2), {50, 60}),
  (Keep(last=9), set(STEPS)),
  (Keep(last=1, every_steps=20), {20, 40, 60}),
  (Keep(last=1, every_steps=15), {30, 60}),
  (Keep(last=1, best='fid'), {20, 60}),
  (Keep(last=1, best='fid', best_is='highest'), {30, 60}),
  (Keep(last=2, every_steps=40, best='fid'), {20, 40, 50, 60}),
])
def test_what_stays(keep, stay):
  scores = {20: 3.0, 30: 8.0, 40: 5.0}
  assert steps_to_keep(STEPS, scores, keep) == stay
  assert steps_to_keep(reversed(STEPS), scores, keep) == stay


def test_the_best_of_each_number_of_samples_stays():
  """FID falls with their number, so those of 64 would always lose against those of 256."""
  keep, samples = Keep(last=1, best='fid'), {10: 256, 20: 256, 30: 64, 40: 64, 50: 64}
  scores = {10: 3.0, 20: 4.0, 30: 9.0, 40: 8.0, 50: 10.0}
  assert steps_to_keep(STEPS, scores, keep, samples) == {10, 40, 60}
  assert steps_to_keep(STEPS, scores, keep) == {10, 60}


def test_scores_that_say_nothing():
  keep = Keep(last=1, best='fid')
  assert steps_to_keep(STEPS, {}, keep) == {60}
  assert steps_to_keep(STEPS, {10: math.nan, 20: -math.inf, 30: 4.0}, keep) == {30, 60}
  assert steps_to_keep(STEPS, {5: 0.0, 30: 4.0}, keep) == {30, 60}  # 5 is not on disk.
  assert steps_to_keep(STEPS, {10: 4.0, 30: 4.0}, keep) == {30, 60}  # The newer of equal ones.
  assert steps_to_keep([], {}, keep) == set()
