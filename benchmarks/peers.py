"""Our U-Net beside diffusers' in PyTorch, on the same weights and batches, in turn in one run.

Each side is in a process of its own and sleeps while it is the other's turn. A step is the whole of
training on latents and texts that are there: U-Net, mean squared error, gradient, clipping to norm
1, AdamW, average of the weights. Sampling is 20 steps of DDIM with guidance, both halves in one
call. Outputs, losses and samples are compared before anything is timed. Each pair of runs gives a
ratio of times, ours over theirs; the peak of a process's resident memory is that of one kind of
work, with what importing, building and compiling take.

  python -m benchmarks.peers --json benchmarks/peers.json
  python -m benchmarks.peers --only step --peers eager --pairs 2     # a quick look

Neither side reads programs that were compiled before, unless TORCHINDUCTOR_CACHE_DIR says where
PyTorch's are; ours are compiled twice, with an empty cache and from it. On a GPU both compute in
bfloat16 with float32 weights, PyTorch with its flash attention, and both hold their memory at once.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peer_comparison import KINDS, MODELS, TOLERANCE, Comparison
from benchmarks.peer_process import Process

WORKS = ('step', 'sample')


def arguments(argv: list[str] | None) -> argparse.Namespace:
  """Return the options of the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  parser.add_argument('--model', choices=MODELS, help='default: sd2 on a GPU, else small')
  parser.add_argument('--size', type=int, help="edge of the latents; default: the model's")
  parser.add_argument('--batch', type=int, default=8, help='examples in a step')
  parser.add_argument('--images', type=int, default=4, help='drawn at once')
  parser.add_argument('--steps', type=int, default=20, metavar='N', help='of sampling; divides '
                      '1000, or the steps of diffusers lie between those they name')
  parser.add_argument('--pairs', type=int, default=7)
  parser.add_argument('--only', choices=WORKS)
  parser.add_argument('--peers', nargs='+', choices=KINDS, default=list(KINDS))
  parser.add_argument('--dtype', choices=TOLERANCE, help='default: bfloat16 on a GPU, else float32')
  args = parser.parse_args(argv)
  if 1000 % args.steps:
    parser.error(f'--steps {args.steps} does not divide 1000')
  return args


def compare(args: argparse.Namespace) -> dict[str, Any]:
  """Return what one run measures, by kind of work and peer, and the settings."""
  load, found, compiling = os.getloadavg()[0], {}, {}
  for what in [args.only] if args.only else WORKS:
    with (tempfile.TemporaryDirectory(prefix='peers_') as folder,
          Process('ours', 'diffusion_jax') as ours):
      comparison = Comparison(args, what, ours, folder)
      found[what] = {kind: comparison.beside(kind) for kind in args.peers}
    compiling[what] = comparison.described['compiling']
  facts = comparison.facts
  return {
    'device': facts['device'],
    'versions': {'python': platform.python_version(), **facts['versions']},
    'load_average': round(load, 2),
    'config': {name: value for name, value in vars(args).items() if name != 'json'},
    'parameters': comparison.described['parameters'],
    **found, 'compiling': compiling, 'flops': {'step': comparison.flops},
  }


def main(argv: list[str] | None = None) -> None:
  """Compare, measures, prints, writes."""
  args = arguments(argv)
  given = sys.argv[1:] if argv is None else argv
  found = {'command': ' '.join(['python', '-m', 'benchmarks.peers', *given]), **compare(args)}
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  # As at an exception, its processes end and its folder is deleted.
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  main()
