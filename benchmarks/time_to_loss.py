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

from diffusion_jax.benchmark.timing import cpu_cores


def lines(workdir: Path) -> list[dict[str, Any]]:
  """Lines of training in the order of steps."""
  try:
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  except OSError as error:
    sys.exit(f'{workdir} is no workdir of a run that has trained: {error.strerror}.')
  return [line for line in found if line['kind'] == 'train']


def reached(found: Sequence[dict[str, Any]], loss: float, count: int) -> dict[str, float] | None:
  """Step and seconds of the first line up to which `count` lines have at most this loss, if any."""
  for end in range(count, len(found) + 1):
    if sum(line['loss'] for line in found[end - count:end]) <= count * loss:
      return {'step': found[end - 1]['step'], 'seconds': round(found[end - 1]['time'], 1)}
  return None


def measure(workdir: Path, losses: Sequence[float], count: int) -> dict[str, Any]:
  """When a run reached the losses, and its seconds by phase in all."""
  found = lines(workdir)
  status = json.loads((workdir / 'status.json').read_text())
  return {
    'losses': {str(loss): reached(found, loss, count) for loss in losses},
    'steps': found[-1]['step'], 'seconds_by_phase': status['goodput'],
    'config': json.loads((workdir / 'config.json').read_text()),
    'versions': json.loads((workdir / 'versions.json').read_text()),
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
    runs[name] = measure(Path(workdir), args.losses, args.lines)
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
