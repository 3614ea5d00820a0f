"""The loop of queued_resource.sh. No TPU is at hand: a stand-in for gcloud plays what one says."""

import os
import subprocess

import pytest

from tests.tiny import ROOT

# Each call is written down; `describe` and `ssh` take the next line of states and of codes.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case $* in
  *' describe '*) state=$(next states); echo "describe $state" >> calls
    if [[ $state == none ]]; then exit 1; fi; echo "$state" ;;
  *' create '*) echo create >> calls ;;
  *' delete '*) echo delete >> calls ;;
  *' ssh '*'--command=bash setup.sh'*) echo setup >> calls ;;
  *' ssh '*) code=$(next codes); echo "train $code" >> calls; exit "$code" ;;
  *) exit 99 ;;
esac
"""


@pytest.mark.parametrize(('states', 'codes', 'code', 'calls'), [
  # Asked for, waited for, set up, trained to the end.
  ('none WAITING_FOR_RESOURCES ACTIVE', '0', 0,
   ['describe none', 'create', 'describe WAITING_FOR_RESOURCES', 'describe ACTIVE', 'setup',
    'train 0']),
  # There already: nothing is set up again. It fails although the TPU is there: not again.
  ('ACTIVE ACTIVE', '1', 1, ['describe ACTIVE', 'train 1', 'describe ACTIVE']),
  # Taken away: asked for again, set up again.
  ('ACTIVE SUSPENDING SUSPENDED none ACTIVE', '255 0', 0,
   ['describe ACTIVE', 'train 255', 'describe SUSPENDING', 'describe SUSPENDED', 'delete',
    'describe none', 'create', 'describe ACTIVE', 'setup', 'train 0']),
  ('FAILED', '0', 2, ['describe FAILED']),
])
def test_a_tpu_that_was_taken_away_is_asked_for_again(tmp_path, states, codes, code, calls):
  gcloud = tmp_path / 'gcloud'
  gcloud.write_text(GCLOUD)
  gcloud.chmod(0o755)
  (tmp_path / 'states').write_text(states.replace(' ', '\n') + '\n')
  (tmp_path / 'codes').write_text(codes.replace(' ', '\n') + '\n')
  # Nothing changes while it waits.
  (tmp_path / 'sleep').write_text('#!/bin/sh\n')
  (tmp_path / 'sleep').chmod(0o755)
  done = subprocess.run(
    ['launch/queued_resource.sh', '--type=v5litepod-16', '--runtime=v2-alpha-tpuv5-lite',
     '--zone=us-west4-a', '--setup', 'bash setup.sh', '--config', 'configs/toy/edm.py',
     '--workdir', '/shared/runs/edm'],
    cwd=ROOT, env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}, text=True,
    capture_output=True, timeout=30,
  )
  assert done.returncode == code, done.stderr
  assert (tmp_path / 'calls').read_text().splitlines() == calls
  if code == 2:
    assert 'the request has failed' in done.stderr
  else:
    assert 'the TPU is kept; delete it by: gcloud compute tpus queued-resources delete edm' in (
      done.stderr
    )
