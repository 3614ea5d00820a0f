"""A command with and without huge pages for the C library, in turn in one run.

Each pair gives ratios, with over without: of time by the clock, of processors' time, and of the
most memory that a process of it held. {} in the command is a new folder, such as for a workdir or a
cache, that is removed afterwards.

  python -m benchmarks.huge_pages --pairs 3 --json benchmarks/huge_pages.json \\
    -- python -m benchmarks.run train --config openmoji/quickstart --synthetic
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETTINGS = {'without': 'glibc.malloc.hugetlb=0', 'with': 'glibc.malloc.hugetlb=1'}
KERNEL = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def measure(command: list[str], tunables: str) -> dict[str, float]:
  """Seconds by the clock, of processors, and GB of the largest process, of one run."""
  with tempfile.TemporaryDirectory(prefix='huge_pages_') as folder:
    cache = {'JAX_COMPILATION_CACHE_DIR': f'{folder}/cache'}
    environment = {**os.environ, **cache, 'GLIBC_TUNABLES': tunables}
    start = time.perf_counter()
    process = subprocess.Popen(
      [part.replace('{}', folder) for part in command], env=environment,
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
  if status:
    sys.exit(said.decode(errors='replace')[-2000:])
  return {
    'seconds': seconds, 'processor_seconds': used.ru_utime + used.ru_stime,
    'memory_gb': used.ru_maxrss * 1024 / 1e9,
  }


def compare(command: list[str], pairs: int) -> dict[str, Any]:
  """Every run, and the medians of the pairs' ratios."""
  runs: dict[str, list] = {name: [] for name in SETTINGS}
  for pair in range(pairs):
    names = list(SETTINGS) if pair % 2 == 0 else list(SETTINGS)[::-1]
    for name in names:
      runs[name].append(measure(command, SETTINGS[name]))
      print(name, {key: round(value, 2) for key, value in runs[name][-1].items()}, flush=True)
  ratios = {
    key: statistics.median(
      a[key] / b[key] for a, b in zip(runs['with'], runs['without'], strict=True)
    )
    for key in runs['with'][0]
  }
  return {'command': ' '.join(command), **runs, 'ratios': ratios}


def main() -> None:
  """Measures, prints, and adds to the JSON."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--pairs', type=int, default=3)
  parser.add_argument('--json', metavar='FILE', help='where the figures are added')
  parser.add_argument('command', nargs='+', metavar='-- COMMAND')
  args = parser.parse_args()
  load = os.getloadavg()[0]
  found = compare(args.command, args.pairs)
  print('ratios', {key: round(value, 3) for key, value in found['ratios'].items()})
  if args.json:
    file = Path(args.json)
    before = json.loads(file.read_text(encoding='utf-8')) if file.exists() else []
    facts = {
      'kernel': KERNEL.read_text(encoding='ascii').strip(), 'python': platform.python_version(),
      'cores': os.cpu_count(), 'load_average': round(load, 2),
    }
    text = json.dumps([*before, facts | found], indent=2)
    file.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
