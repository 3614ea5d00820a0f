"""Seconds that runs of one config took until their loss fell below given values.

Reads what `python -m diffusion_jax train` has left in the workdirs. A loss is the mean of some
lines of metrics.jsonl one after another, a time that of the last of them: it counts from the start
of the process, with reading, encoding and compiling, over all starts. Runs to be compared should be
made one after another on one quiet machine, and read on the same.

  python -m benchmarks.time_to_loss before=runs/old now=runs/new --json benchmarks/speed/loss.json
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import cpu_cores
from diffusion_jax.errors import UserError
from diffusion_jax.viz.run_files import read_lines, read_run


def reached(found: Sequence[dict[str, Any]], loss: float, count: int) -> dict[str, float] | None:
  """Step and seconds of the first line up to which `count` lines have at most this loss, if any."""
  for end in range(count, len(found) + 1):
    if sum(line['loss'] for line in found[end - count:end]) <= count * loss:
      return {'step': found[end - 1]['step'], 'seconds': round(found[end - 1]['time'], 1)}
  return None


def measure(workdir: Path, losses: Sequence[float], count: int) -> dict[str, Any]:
  """When a run reached the losses, and its seconds by phase in all."""
  run = read_run(workdir)
  # All lines, of each step the last, however long the run was.
  train = {line['step']: line for line in read_lines(workdir / 'metrics.jsonl')
           if line['kind'] == 'train'}
  train = [line for _, line in sorted(train.items())]
  return {
    'losses': {str(loss): reached(train, loss, count) for loss in losses},
    'steps': train[-1]['step'] if train else 0,
    'seconds_by_phase': run.status['goodput'], 'config': run.config, 'versions': run.versions,
  }


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('runs', nargs='+', metavar='NAME=WORKDIR')
  parser.add_argument('--losses', nargs='+', type=float, default=[0.7, 0.65, 0.62])
  parser.add_argument('--lines', type=int, default=5, help='of metrics.jsonl in a mean')
  parser.add_argument('--title', default='configs/openmoji/quickstart.py')
  parser.add_argument('--json', metavar='FILE')
  args = parser.parse_args(argv)
  runs = {}
  for given in args.runs:
    name, separator, workdir = given.partition('=')
    if not separator:
      parser.error(f'{given}: NAME=WORKDIR is wanted')
    try:
      runs[name] = measure(Path(workdir), args.losses, args.lines)
    except UserError as error:
      sys.exit(str(error))
    for loss, at in runs[name]['losses'].items():
      when = f'after {at["seconds"]} s, step {at["step"]}' if at else 'never'
      print(f'{name}: loss {loss} {when}')
  of = runs[name]['versions']
  found = {
    'command': shlex.join(['python', '-m', 'benchmarks.time_to_loss', *args.runs]),
    'what': 'time_to_loss', 'config_file': args.title, 'lines': args.lines, 'versions': of,
    'device': {**{name: of[name] for name in ('platform', 'device', 'devices')},
               'cpu_cores': cpu_cores()},
    'runs': runs,
  }
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  main()
