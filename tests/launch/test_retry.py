"""retry.sh on real processes: preempted, killed, mistaken, failed, stuck, finished, stopped."""

import os
import signal
import subprocess
import time

import pytest

from tests.tiny import ROOT

# An attempt writes what the next line of `plan` says (state retry step) and leaves as it says.
ATTEMPT = """
set -euo pipefail
cd "$(dirname "$0")"
echo attempt >> attempts
line=$(sed -n "$(wc -l < attempts)p" plan)
read -r state retry step end <<< "$line"
if [[ $state != - ]]; then
  printf '{"state": "%s", "retry": %s, "step": %s, "pid": %s, "updated": %s}\\n' \\
    "$state" "$retry" "$step" "$$" "$(date +%s.%N)" > run/.new
  mv run/.new run/status.json
fi
case $end in
  kill) kill -KILL $$ ;;
  sleep)
    sleep 20 > /dev/null 2>&1 &
    trap 'kill $!; echo stopped >> attempts; exit 143' TERM
    trap 'kill $!; echo stopped >> attempts; exit 130' INT
    wait ;;
  *) exit "$end" ;;
esac
"""


@pytest.fixture
def start(tmp_path):
  """start(plan, **env): retry.sh in the background, over attempts that follow the plan."""
  (tmp_path / 'run').mkdir()
  (tmp_path / 'attempt.sh').write_text(ATTEMPT)
  started = []

  def run(plan, **env):
    (tmp_path / 'plan').write_text('\n'.join(plan) + '\n')
    started.append(subprocess.Popen(
      ['bash', str(ROOT / 'launch/retry.sh'), 'bash', str(tmp_path / 'attempt.sh'),
       '--workdir', str(tmp_path / 'run')],
      env={**os.environ, 'RETRY_SECONDS': '0', **env}, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ))
    return started[-1]

  yield run
  for process in started:
    process.kill()
    process.communicate()


def result(process, tmp_path):
  """(exit code, number of attempts, what retry.sh said)."""
  _, err = process.communicate(timeout=20)
  attempts = (tmp_path / 'attempts').read_text().split()
  lines = [line for line in err.splitlines() if line.startswith('retry.sh: ')]
  return process.returncode, len(attempts), [line.removeprefix('retry.sh: ') for line in lines]


@pytest.mark.parametrize(('plan', 'code', 'attempts', 'last'), [
  (['finished false 9 0'], 0, 1, 'attempt 1 left with code 0; done'),
  (['interrupted true 4 143', 'training true 6 kill', 'stalled true 8 75', 'finished false 9 0'],
   0, 4, 'attempt 4 left with code 0; done'),
  (['finished false 9 1'], 0, 1, 'attempt 1 left with code 1, finished at step 9; done'),
  (['training true 4 2'], 2, 1,
   'attempt 1 left with code 2: a mistake in what was given; not again'),
  (['failed false 4 134'], 134, 1, 'attempt 1 left with code 134, failed at step 4; not again: '
   'another attempt would end the same way'),
  (['peer_lost true 4 75', 'diverged false 7 1'], 1, 2,
   'attempt 2 left with code 1, diverged at step 7; not again: another attempt would end the same '
   'way'),
  (['training true 4 kill', 'training true 4 kill', 'training true 4 kill', 'training true 4 kill'],
   137, 4, 'attempt 4 left with code 137, training at step 4; not again: 3 attempts have not got '
   'beyond that step'),
  (['training true 0 kill'] * 4, 137, 3, 'attempt 3 left with code 137, training at step 0; not '
   'again: 3 attempts have not got beyond that step'),
])
def test_a_preemption_is_tried_again_and_a_bug_is_not(start, tmp_path, plan, code, attempts, last):
  found = result(start(plan), tmp_path)
  assert found[:2] == (code, attempts) and found[2][-1] == last
  assert len(found[2]) == attempts and all('; again in 0 s' in line for line in found[2][:-1])


def test_an_attempt_that_has_not_touched_the_file_is_a_bug_before_the_start(start, tmp_path):
  # The file is there, of a run that may be tried again, but the second attempt never came to it.
  code, attempts, said = result(start(['interrupted true 4 143', '- - - 1']), tmp_path)
  assert (code, attempts) == (1, 2)
  assert said[1].endswith('status.json: a bug before the start; not again')


@pytest.mark.parametrize('plan', [
  ['- - - kill', 'finished false 9 0'],
  ['interrupted true 4 143', '- - - kill', '- - - 143', 'finished false 9 0'],
])
def test_who_was_killed_before_it_could_write_a_word_is_started_again(start, tmp_path, plan):
  code, attempts, said = result(start(plan), tmp_path)
  assert (code, attempts) == (0, len(plan)), said
  assert all('; again in 0 s' in line for line in said[:-1])


def test_killed_again_and_again_before_a_word_is_stuck(start, tmp_path):
  code, attempts, said = result(start(['- - - kill'] * 5), tmp_path)
  assert (code, attempts) == (137, 3) and 'have not got beyond that step' in said[-1]


def test_a_file_that_cannot_be_read(start, tmp_path):
  process = start(['broken true nothing 1'])
  code, attempts, said = result(process, tmp_path)
  assert (code, attempts) == (1, 1) and said[0].endswith('cannot be read; not again')


def test_the_number_of_attempts_has_a_limit_and_the_pause_grows(start, tmp_path):
  start_time = time.monotonic()
  plan = [f'training true {i} kill' for i in range(1, 9)]
  code, attempts, said = result(start(plan, RETRY_LIMIT='3', RETRY_SECONDS='1'), tmp_path)
  assert (code, attempts) == (137, 3) and 'that was the last of 3 attempts' in said[-1]
  assert [line.rpartition('; ')[2] for line in said[:2]] == ['again in 1 s', 'again in 2 s']
  assert time.monotonic() - start_time > 3


def _wait_for(path, text):
  end = time.monotonic() + 10
  while not path.exists() or text not in path.read_text():
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_ends_it(start, tmp_path, number):
  process = start(['interrupted true 4 sleep', 'finished false 9 0'])
  _wait_for(tmp_path / 'run' / 'status.json', 'interrupted')
  time.sleep(0.2)  # The attempt's own trap.
  process.send_signal(number)
  code, _, said = result(process, tmp_path)
  name = signal.Signals(number).name
  wanted = 143 if number == signal.SIGTERM else 130
  assert code == wanted and said == [f'attempt 1 left with code {wanted} after {name}; not again']
  attempts = (tmp_path / 'attempts').read_text().split()
  assert attempts == ['attempt', 'stopped']


def test_a_signal_while_waiting_ends_it_at_once(start, tmp_path):
  process = start(['peer_lost true 4 75', 'finished false 9 0'], RETRY_SECONDS='30')
  _wait_for(tmp_path / 'run' / 'status.json', 'peer_lost')
  time.sleep(0.5)
  process.terminate()
  start_time = time.monotonic()
  code, attempts, said = result(process, tmp_path)
  assert (code, attempts) == (75, 1) and said[-1] == 'SIGTERM while waiting; not again'
  assert time.monotonic() - start_time < 5


def test_a_scheduler_queues_an_interrupted_job_itself(start, tmp_path):
  process = start(['interrupted true 4 143'], RETRY_INTERRUPTED=f'touch {tmp_path}/queued')
  code, attempts, said = result(process, tmp_path)
  assert (code, attempts) == (143, 1) and (tmp_path / 'queued').exists()
  assert said[0].endswith(f'in place of another attempt: touch {tmp_path}/queued')


@pytest.mark.parametrize(('arguments', 'words'), [
  ([], 'give a command'), (['true'], 'give the command a --workdir'),
])
def test_what_it_needs(arguments, words):
  done = subprocess.run(
    ['bash', 'launch/retry.sh', *arguments], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2 and words in done.stderr
