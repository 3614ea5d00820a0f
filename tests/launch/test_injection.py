"""Nothing that a launcher is given can become more than a value of what it writes and runs."""

import os
import re
import subprocess

import pytest
import yaml

from tests.launch.test_dry_run import CASES, shell
from tests.tiny import ROOT

BASES = {
  name: [word for word in CASES[name] if word != '--dry-run'] for name in
  ('train_cpu', 'local', 'slurm', 'tpu_pod', 'queued_resource', 'gke_tpu', 'skypilot')
}
EXTRA = {  # Options that the cases leave out.
  'train_cpu': [], 'local': ['platform', 'port', 'grace'], 'queued_resource': [
    'project', 'setup', 'directory', 'poll', 'type', 'runtime', 'zone'],
  'slurm': ['gpus-per-node', 'tasks-per-node', 'cpus-per-task', 'time', 'partition', 'account',
            'log', 'nodes'],
  'tpu_pod': ['project', 'directory', 'tpu', 'zone'],
  'gke_tpu': ['image', 'claim', 'platform', 'nodes', 'per-node', 'slices', 'accelerator',
              'topology', 'restarts', 'namespace'],
  'skypilot': ['bucket', 'nodes', 'gpus', 'infra'],
}
OPTIONS = [(name, option) for name in BASES
           for option in (*EXTRA[name], 'config', 'workdir', 'run-id')]
FREE = ('config', 'workdir', 'setup', 'directory')
"""Any text of one line is a value of these."""
BREAKS = ('a\n#SBATCH --uid=0', 'a\rb', 'a\x1b[2J', 'a\u2028b', 'a\x85b', 'a\x7f', '\ta')
TRICKS = ('x"\', y: 1, z: "', '$(touch RAN)', '`touch RAN`', 'a;touch RAN', 'a #b', '{{IMAGE}}',
          '--uid=0', '*a', '../a b', 'é', '${HOME}', 'a&b', '!!python/name:os.system', '{a: b}')


def refused(done):
  assert done.returncode == 2 and done.stdout == '', done.stdout + done.stderr
  assert done.stderr.rstrip('\n').isprintable(), done.stderr
  return done.stderr


@pytest.mark.parametrize(('name', 'option'), OPTIONS)
def test_no_option_takes_more_than_a_value_of_its_form(name, option):
  number = OPTIONS.index((name, option))
  given = BREAKS[number % len(BREAKS)]
  words = refused(shell(*BASES[name], '--dry-run', f'--{option}', given))
  assert 'with a line break or another control character' in words
  if option not in FREE:
    for i in range(3):
      trick = TRICKS[(3 * number + i) % len(TRICKS)]
      assert f'--{option}' in refused(shell(*BASES[name], '--dry-run', f'--{option}={trick}'))


@pytest.mark.parametrize('given', BREAKS)
def test_control_characters_are_refused_wherever_they_are(given):
  base = [*BASES['slurm'], '--dry-run']
  for arguments in ([f'data.caption={given}'], [f'--config.data.caption={given}'], [given]):
    assert 'control character' in refused(shell(*base, *arguments))
  for name in ('RUN_ID', 'RETRY_STATUS', 'RETRY_INTERRUPTED', 'PYTHON'):
    assert f'{name} is ' in refused(shell(*base, **{name: given}))
  assert 'control character' in refused(shell('launch/retry.sh', *base, f'--log={given}'))


def test_keys_and_paths_that_would_be_options():
  base = BASES['train_cpu']
  assert 'KEY=VALUE' in refused(shell(*base, '--config.a b=1'))
  assert 'begins with no -' in refused(shell(*base, '--config=--help'))
  assert 'begins with no -' in refused(shell(*base, '--workdir=-x'))
  gke = [*BASES['gke_tpu'], '--dry-run']
  assert '--topology' in refused(shell(*gke, '--topology=0x10'))
  assert '--accelerator' in refused(shell(*gke, '--accelerator=null'))
  # In a locale whose ranges of letters hold more than ASCII.
  assert 'cannot name a run' in refused(shell(*base, '--run-id', 'fo\u0445', LC_ALL='C.UTF-8'))


# Said by a stand-in for whatever a launcher hands its work to: its arguments and its input.
STAND_IN = """#!/usr/bin/env bash
{ printf '%s\\0' "${0##*/}" "$@"; } > "$SEEN"
if [[ ${0##*/} =~ ^(sbatch|kubectl)$ ]]; then cat > "$SEEN.input"; fi
"""


@pytest.fixture
def launch(tmp_path):
  """launch(*arguments): (what the stand-in was called with, its input) of a real start."""
  for name in ('sbatch', 'srun', 'kubectl', 'sky', 'gcloud'):
    (tmp_path / name).write_text(STAND_IN)
    (tmp_path / name).chmod(0o755)
  (tmp_path / 'diffusion_jax' / 'launch').mkdir(parents=True)
  for name in ('train.sh', 'retry.sh'):
    (tmp_path / 'diffusion_jax' / 'launch' / name).write_text(STAND_IN)

  def run(*arguments, folder=ROOT, **env):
    seen = tmp_path / 'seen'
    done = subprocess.run(
      arguments, cwd=folder, text=True, capture_output=True, timeout=60,
      env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SEEN': str(seen), **env},
    )
    assert done.returncode == 0, done.stderr
    given = (tmp_path / 'seen.input').read_text() if (tmp_path / 'seen.input').exists() else ''
    return seen.read_text().split('\0')[:-1], given

  run.folder = tmp_path
  return run


VALUES = [f'data.caption={trick}' for trick in (*TRICKS, '🦊 "fox"', "it's", '#SBATCH --uid=0')]
WORKDIR = '/shared/runs/a $(touch RAN) "{{IMAGE}}" \'b\''
ARGUMENTS = [f'--config.{value}' for value in VALUES]
RUN = ['--config', 'a b.py', '--workdir', WORKDIR, '--run-id', 'fox', *VALUES]
WANTED = ['--config', 'a b.py', '--workdir', WORKDIR, *ARGUMENTS]


def test_a_batch_script_hands_on_what_it_was_given(launch):
  called, script = launch('launch/slurm.sh', *RUN)
  assert called == ['sbatch']
  head = [line for line in script.splitlines() if line.startswith('#SBATCH')]
  assert len(head) == 9 and not any('uid' in line for line in head)
  (launch.folder / 'script').write_text(script)
  called, _ = launch('bash', str(launch.folder / 'script'), SLURM_JOB_ID='1')
  assert called[0] == 'srun' and called[called.index('gpu') + 1 :] == WANTED
  assert not [*launch.folder.rglob('RAN')] and not (ROOT / 'RAN').exists()


def test_a_jobset_hands_on_what_it_was_given(launch):
  called, text = launch(*[*BASES['gke_tpu'][:1], *BASES['gke_tpu'][5:], *RUN])
  assert called == ['kubectl', 'apply', '-f', '-']
  job = yaml.safe_load(text)['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  assert pod['containers'][0]['command'] == ['bash', 'launch/train.sh', 'tpu', *WANTED]
  sound = yaml.safe_load((ROOT / 'tests/launch/golden/gke_tpu.txt').read_text().split('# Each')[0])
  theirs = sound['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
  del pod['containers'][0]['command'], theirs['containers'][0]['command']
  assert pod == theirs


def test_a_jobset_of_what_is_no_text_is_not_applied(launch):
  arguments = [*BASES['gke_tpu'][:1], *BASES['gke_tpu'][5:], *RUN[:6], b'data.caption=\xff']
  done = subprocess.run(
    arguments, cwd=ROOT, capture_output=True, timeout=60,
    env={**os.environ, 'SEEN': str(launch.folder / 'seen'),
         'PATH': f'{launch.folder}:{os.environ["PATH"]}'},
  )
  assert done.returncode == 2 and b'not text in UTF-8' in done.stderr
  assert not (launch.folder / 'seen').exists()


def test_a_host_of_a_cloud_gets_what_was_given(launch):
  called, _ = launch('launch/skypilot.sh', *RUN, '--bucket=s3://mine')
  [train] = [word for word in called if word.startswith('TRAIN=')]
  run = yaml.safe_load((ROOT / 'launch/skypilot.yaml').read_text())['run']
  called, _ = launch(
    'bash', '-c', run, folder=launch.folder / 'diffusion_jax', TRAIN=train.removeprefix('TRAIN='),
    SKYPILOT_NODE_IPS='10.0.0.1', SKYPILOT_NUM_NODES='1', SKYPILOT_NODE_RANK='0',
  )
  assert called == ['retry.sh', 'bash', 'launch/train.sh', 'gpu', *WANTED]
  assert not [*launch.folder.rglob('RAN')]


def test_a_host_of_a_pod_gets_what_was_given(launch):
  called, _ = launch('launch/tpu_pod.sh', *RUN, '--tpu=pod', '--zone=us-west4-a')
  [command] = [word for word in called if word.startswith('--command=')]
  called, _ = launch('bash', '-c', command.removeprefix('--command='), folder=launch.folder)
  assert called == ['train.sh', 'tpu', *WANTED]
  assert not [*launch.folder.rglob('RAN')]


def test_every_option_of_every_launcher_is_tried():
  for name, base in BASES.items():
    text = (ROOT / base[0]).read_text().split('parse "$@"')[0]
    options = {*re.findall(r'\[([a-z-]+)\]=', text)} - {
      'spot', 'retry', 'detach', 'on-demand', 'plan'
    }
    assert options == {*EXTRA[name]}, name
