"""Thousands of damaged files through every loader: read, or refused in one sentence, in bounds.

Each group is a process of its own with limits of memory and time. A mutant that fails is named with
its number, and made again by: python -m tests.faults.fuzz_child GROUP SEED FOLDER TARGET NUMBER.
"""

import json
import os
import random

import pytest

from tests import tiny
from tests.faults import fuzz_sources, mutants

SEED = 0


@pytest.mark.parametrize('group', fuzz_sources.GROUPS)
def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path, group):
  child = tiny.start(
    [group, str(SEED), str(tmp_path / 'fuzz')], dict(os.environ), 'tests.faults.fuzz_child'
  )
  try:
    out, err = child.communicate(timeout=300)
  finally:
    child.kill()
  log = tmp_path / 'fuzz' / 'progress'
  last = log.read_text() if log.exists() else 'none'
  assert child.returncode == 0, f'group {group}, mutant {last}:\n{err[-3000:]}'
  lines = [json.loads(line) for line in out.splitlines() if line.startswith('[')]
  faults = [line for line in lines if line[0] != 'done']
  assert not faults, '\n'.join(
    f'{target} {number} of {group}: {what}: {fault}' for target, number, what, fault in faults
  )
  finished = {name: count for _, name, count, _ in lines}
  assert len(finished) == len(fuzz_sources.GROUPS[group]) and min(finished.values()) > 0


@pytest.mark.parametrize('make', [mutants.any_json, mutants.text_lines, mutants.any_bytes])
def test_a_mutant_is_made_again_by_its_seed_and_differs_from_others(make):
  data = b'{"a": [1, {"b": "x"}], "c": 2.5}'
  made = [make(random.Random(f'{i}'), data) for i in range(50)]
  assert made == [make(random.Random(f'{i}'), data) for i in range(50)]
  assert len({mutant for _, mutant in made}) > 15
