"""What the launchers would do, byte by byte, and that their parts are what they seem.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/launch/test_dry_run.py, and read the
difference in git.
"""

import os
import re
import subprocess

import pytest
import yaml

from diffusion_jax.planning.targets import Target
from tests.tiny import ROOT

GOLDEN = ROOT / 'tests' / 'launch' / 'golden'
SCRIPTS = sorted(path for path in (ROOT / 'launch').glob('*.sh'))
RUN = ['--config', 'configs/openmoji/quickstart.py', '--workdir', '/shared/runs/first_run']
OWN = ['loop.batch_size=256', '--config.dtype=bfloat16', 'data.caption=a red "fox"', '--quiet']
QUEUED = ['--type', 'v5litepod-16', '--runtime', 'v2-alpha-tpuv5-lite', '--zone=us-west4-a']
GKE = ['--image', 'gcr.io/mine/diffusion:1', '--claim', 'shared', '--run-id', 'fox']
CASES = {
  'train_cpu': ['launch/train.sh', 'cpu', *RUN, *OWN],
  'train_gpu': ['launch/train.sh', 'gpu', *RUN],
  'train_tpu': ['launch/train.sh', 'tpu', *RUN],
  'local': ['launch/local.sh', '2', *RUN, *OWN],
  'local_gpu': ['launch/local.sh', '2', *RUN, '--platform', 'gpu', '--port', '8476'],
  'slurm': ['launch/slurm.sh', *RUN, *OWN, '--nodes', '4'],
  'slurm_options': ['launch/slurm.sh', *RUN, '--nodes=2', '--gpus-per-node=4',
                    '--tasks-per-node=4', '--cpus-per-task=8', '--time=1:00:00',
                    '--partition=gpu', '--account=us', '--log=/shared/%j.log', '--run-id=fox'],
  'tpu_pod': ['launch/tpu_pod.sh', *RUN, *OWN, '--tpu', 'pod', '--zone', 'us-west4-a'],
  'tpu_pod_detached': ['launch/tpu_pod.sh', *RUN, '--tpu=pod', '--zone=us-west4-a', '--retry',
                       '--detach', '--project=mine', '--directory=src/d'],
  'queued_resource': ['launch/queued_resource.sh', *RUN, *OWN, *QUEUED],
  'queued_resource_spot': ['launch/queued_resource.sh', *RUN, *QUEUED, '--spot', '--retry',
                           '--project=mine', '--poll=30', '--setup', 'bash ~/setup.sh'],
  'gke_gpu': ['launch/gke_jobset.sh', *RUN[:2], *OWN, *GKE, '--platform=gpu', '--nodes=4',
              '--accelerator=nvidia-h100-80gb', '--spot'],
  'gke_tpu': ['launch/gke_jobset.sh', *RUN, *GKE, '--platform=tpu', '--nodes=4', '--slices=2',
              '--accelerator=tpu-v5-lite-podslice', '--topology=4x4', '--restarts=5',
              '--namespace=team'],
  'skypilot': ['launch/skypilot.sh', *RUN[:2], *OWN, '--run-id=fox', '--bucket=s3://mine',
               '--nodes=2'],
  'skypilot_on_demand': ['launch/skypilot.sh', *RUN, '--bucket=gs://mine', '--on-demand',
                         '--gpus=A100:4', '--infra=gcp'],
  'retry': ['launch/retry.sh', '--dry-run', 'launch/local.sh', '2', *RUN],
}


def shell(*arguments, **env):
  """Runs a launcher with no variable that would change what it does."""
  changing = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_PLATFORMS', 'RUN_ID', 'PYTHON',
              'GLIBC_TUNABLES', 'DIFFUSION_JAX_HUGE_PAGES')
  inherited = {k: v for k, v in os.environ.items()
               if k not in changing and not k.startswith('RETRY_')}
  return subprocess.run(
    arguments, cwd=ROOT, env=inherited | env, capture_output=True, text=True, timeout=60
  )


@pytest.mark.parametrize(('name', 'target'), [
  ('queued_resource', 'v5litepod-16'), ('gke_tpu', 'v5e:4x4'), ('gke_gpu', 'h100:8x4'),
])
def test_a_plan_is_of_what_would_be_asked_for(name, target):
  """With the config's keys and the flags of TPUs; the command takes the target; nothing else."""
  lines = shell(*CASES[name], '--plan', '--dry-run').stdout.splitlines()
  assert len(lines) == 1 + ('gpu' not in name)
  command = f'python -m diffusion_jax plan --config {RUN[1]} --target {target}'
  keys = ' --config.loop.batch_size=256 --config.dtype=bfloat16 '
  keys += "'--config.data.caption=a red \"fox\"'"
  assert lines[-1] == command + keys * (name != 'gke_tpu')
  assert lines[0].startswith("export 'LIBTPU_INIT_ARGS=--") or 'gpu' in name
  assert Target.of(target).count in (16, 32)


@pytest.mark.parametrize('name', CASES)
def test_the_dry_run_is_the_golden_one(name):
  arguments = CASES[name] if '--dry-run' in CASES[name] else [*CASES[name], '--dry-run']
  done = shell(*arguments)
  assert done.returncode == 0 and done.stderr == '', done.stderr
  golden = GOLDEN / f'{name}.txt'
  if os.environ.get('UPDATE_GOLDEN'):
    golden.write_text(done.stdout)
  assert done.stdout == golden.read_text()
  if name != 'retry':
    last = done.stdout.splitlines()[-1]
    assert last.startswith('exec python -u -m diffusion_jax train --config '), last


def test_every_golden_file_and_every_launcher_has_its_case():
  assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)
  run = {arguments[0] for arguments in CASES.values()}
  assert run == {f'launch/{path.name}' for path in SCRIPTS if path.name != 'lib.sh'}


def test_shellcheck_finds_nothing():
  # The environment that .ci/run enters does not exist before it runs.
  done = shell('shellcheck', '-x', '-e', 'SC1091', '.ci/run', *map(str, SCRIPTS))
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('path', [p for p in SCRIPTS if p.name != 'lib.sh'], ids=lambda p: p.name)
def test_every_launcher_is_strict_and_explains_itself(path):
  assert '\nset -euo pipefail\n' in path.read_text() and os.access(path, os.X_OK)
  done = shell(str(path), '--help')
  assert done.returncode == 0 and f'launch/{path.name} ' in done.stdout
  options = set(re.findall(r'\[([a-z-]+)\]=', path.read_text().split('parse "$@"')[0]))
  assert {f'--{option}' for option in options} <= set(re.findall(r'--[a-z-]+', done.stdout))


@pytest.mark.parametrize(('arguments', 'words'), [
  (['launch/train.sh'], 'give the platform first'),
  (['launch/train.sh', 'cpu'], 'give --config'),
  (['launch/train.sh', 'cpu', *RUN, '--nodes', '3'], 'there is no option --nodes'),
  (['launch/train.sh', 'cpu', *RUN, 'seed'], "'seed' is neither an option nor KEY=VALUE"),
  (['launch/train.sh', 'cpu', *RUN, '2x=3'], 'is not KEY=VALUE'),
  (['launch/train.sh', 'cpu', *RUN, '--run-id', 'Fox 1'], "'Fox 1' cannot name a run"),
  (['launch/local.sh', '--config', 'a.py'], 'give the number of processes first'),
  (['launch/slurm.sh', *RUN, '--nodes', 'two'], "--nodes is 'two'; give a number"),
  (['launch/tpu_pod.sh', *RUN, '--tpu', 'a'], 'give --zone'),
  (['launch/gke_jobset.sh', *RUN, *GKE, '--platform=tpu', '--accelerator=a'], 'give --topology'),
  (['launch/skypilot.sh', *RUN], 'give --bucket'),
])
def test_mistakes_are_one_sentence_and_code_2(arguments, words):
  done = shell(*arguments)
  assert done.returncode == 2 and done.stdout == '' and len(done.stderr.splitlines()) == 1
  assert words in done.stderr


def test_a_run_without_a_workdir_is_named_after_its_config_and_the_time():
  done = shell('launch/train.sh', 'cpu', *RUN[:2], '--dry-run')
  name = re.search(r'RUN_ID=(quickstart-\d{8}-\d{6}) ', done.stdout)
  assert name and f'--workdir runs/{name[1]}' in done.stdout
  assert 'RUN_ID=fox ' in shell('launch/train.sh', 'cpu', *RUN, '--dry-run', RUN_ID='fox').stdout


@pytest.mark.parametrize(('given', 'tunables'), [
  ({}, 'glibc.malloc.hugetlb=1'),
  ({'GLIBC_TUNABLES': 'glibc.malloc.check=0'}, 'glibc.malloc.check=0:glibc.malloc.hugetlb=1'),
  ({'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=2'}, 'glibc.malloc.hugetlb=2'),
  ({'DIFFUSION_JAX_HUGE_PAGES': '0'}, None),
])
def test_huge_pages_are_asked_for_beside_what_is_set(given, tunables):
  done = shell('launch/train.sh', 'cpu', *RUN, '--dry-run', **given).stdout
  assert re.findall(r"GLIBC_TUNABLES=([^'\n]+)", done) == ([] if tunables is None else [tunables])


def flags(platform):
  lines = (ROOT / 'launch/flags' / f'{platform}.txt').read_text().splitlines()
  return [line for line in lines if not line.startswith('#')]


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_every_flag_has_a_reason_and_its_own_variable(platform):
  for line in flags(platform):
    assert re.fullmatch(r'--xla_\w+=\S+  # .+', line), line
  done = shell('launch/train.sh', platform, *RUN, '--dry-run', XLA_FLAGS='--own=1',
               LIBTPU_INIT_ARGS='--own=2').stdout
  own = "LIBTPU_INIT_ARGS=" if platform == 'tpu' else 'XLA_FLAGS='
  assert f"export '{own}{flags(platform)[0].split()[0]} " in done
  assert done.count('xla_') == len(flags(platform)) and f' --own={1 + (platform == "tpu")}' in done
  # The flags of TPUs are unknown to XLA itself, which ends the process for one.
  assert platform == 'tpu' or 'xla_tpu' not in done


@pytest.mark.slow
@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_jax_starts_with_the_flags(platform):
  # The jaxlib of the CPU knows the flags of GPUs, too.
  given = ' '.join(line.split()[0] for line in flags(platform))
  program = 'import jax; print(jax.jit(lambda x: x + 1)(1.0))'
  known, unknown = (
    shell('python', '-c', program, XLA_FLAGS=text, JAX_PLATFORMS='cpu')
    for text in (given, f'{given} --xla_no_such_flag=1')
  )
  assert (known.returncode, known.stdout) == (0, '2.0\n'), known.stderr
  assert unknown.returncode != 0 and 'xla_no_such_flag' in unknown.stderr


def jobset(name):
  text = (GOLDEN / f'{name}.txt').read_text()
  return yaml.safe_load(text.split('\n# Each pod does:')[0])


@pytest.mark.parametrize(('name', 'replicas', 'limits'), [
  ('gke_gpu', 1, {'nvidia.com/gpu': 8}), ('gke_tpu', 2, {'google.com/tpu': 4}),
])
def test_the_jobset_says_what_is_meant(name, replicas, limits):
  spec = jobset(name)['spec']
  [workers] = spec['replicatedJobs']
  job = workers['template']['spec']
  pod = job['template']['spec']
  [container] = pod['containers']
  assert workers['replicas'] == replicas and container['resources']['limits'] == limits
  assert (job['parallelism'], job['completions'], job['completionMode']) == (4, 4, 'Indexed')
  # A mistake or a bug ends the set; anything else restarts it.
  assert job['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [1, 2]
  assert job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  assert spec['failurePolicy']['rules'][0]['action'] == 'FailJobSet'
  assert container['command'][:2] == ['bash', 'launch/train.sh']


def test_a_pod_of_the_jobset_is_found_by_start_up():
  from diffusion_jax.parallel.startup import find_cluster

  job = jobset('gke_gpu')['spec']['replicatedJobs'][0]['template']['spec']
  env = {e['name']: e['value'] for e in job['template']['spec']['containers'][0]['env']}
  # Kubernetes itself adds these two to the pods of an indexed job.
  cluster = find_cluster(env | {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '3'})
  assert (cluster.kind, cluster.processes, cluster.index) == ('gke', 4, 3)
  assert cluster.coordinator == 'fox-workers-0-0.fox:8476'
