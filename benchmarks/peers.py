"""Our U-Net beside diffusers' in PyTorch, on the same weights and batches, in turn in one process.

A step is the whole of training on latents and texts that are there: U-Net, mean squared error,
gradient, clipping to norm 1, AdamW, average of the weights. Sampling is 20 steps of DDIM with
guidance, both halves in one call. Outputs, losses and samples are compared before anything is
timed. Each pair of runs gives a ratio of times, ours over theirs.

  python -m benchmarks.peers --json benchmarks/peers.json
  python -m benchmarks.peers --only step --peers eager --pairs 2     # a quick look

On a GPU both compute in bfloat16 with float32 weights, PyTorch with its flash attention.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_jax.host_memory import keep_freed_memory

keep_freed_memory()
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch needs its part of a GPU.

import diffusers
import jax
import numpy as np
import torch

from benchmarks.peer_ours import Ours
from benchmarks.peer_torch import KINDS, Theirs
from diffusion_jax import __version__
from diffusion_jax.benchmark.flops import count_flops
from diffusion_jax.benchmark.timing import cpu_cores
from diffusion_jax.io.published.architectures import UNETS
from diffusion_jax.models.unet_config import UNetConfig

_SMALL = dict(
  sample_size=32, block_out_channels=(64, 128, 256), cross_attention_dim=256,
  down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
  up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
)
MODELS = {
  'small': UNetConfig(**_SMALL),
  'sd2': UNETS['sd21_base'],
  'tiny': UNetConfig(
    sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
    cross_attention_dim=12, attention_head_dim=2, down_block_types=('CrossAttnDownBlock2D',),
    up_block_types=('UpBlock2D',),
  ),
}
"""small has 18.15 M parameters; tiny is for tests."""

LENGTH, GUIDANCE = 77, 7.5
TOLERANCE = {'float32': 1e-4, 'bfloat16': 5e-2}
"""Of the U-Net's output, relative to its largest entry; losses and samples may differ by ten times
as much, as they see the difference again and again."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
  """What the command line says."""
  gpu = torch.cuda.is_available()
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  parser.add_argument('--model', default='sd2' if gpu else 'small', choices=MODELS)
  parser.add_argument('--size', type=int, help="edge of the latents; default: the model's")
  parser.add_argument('--batch', type=int, default=8, help='examples in a step')
  parser.add_argument('--images', type=int, default=4, help='drawn at once')
  parser.add_argument('--steps', type=int, default=20, metavar='N', help='of sampling; divides '
                      '1000, or the steps of diffusers lie between those they name')
  parser.add_argument('--pairs', type=int, default=7)
  parser.add_argument('--only', choices=('step', 'sample'))
  parser.add_argument('--peers', nargs='+', choices=KINDS, default=list(KINDS))
  parser.add_argument('--dtype', default='bfloat16' if gpu else 'float32', choices=TOLERANCE)
  args = parser.parse_args(argv)
  if 1000 % args.steps:
    parser.error(f'--steps {args.steps} does not divide 1000')
  return args


def draw_batch(config: UNetConfig, size: int, count: int) -> dict[str, np.ndarray]:
  """Latents, times, texts and noise, float32, NHWC; negative texts for sampling."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  latents = (count, size, size, config.in_channels)
  return {
    'x': normal(*latents), 'noise': normal(*latents),
    't': rng.integers(0, 1000, count).astype(np.int32),
    'text': normal(count, LENGTH, config.cross_attention_dim),
    'negative': normal(count, LENGTH, config.cross_attention_dim),
  }


def difference(ours: Any, theirs: Any, limit: float, what: str) -> float:
  """Largest difference, relative to the largest entry; ends the program where it is too large."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not error <= limit:
    sys.exit(f'{what} differ by {error:.2g} of the largest entry, more than {limit:g}.')
  return error


def in_turn(ours: Callable, theirs: Callable, pairs: int) -> list[dict[str, float]]:
  """Seconds of both, on the clock and of the processors; who is first changes from pair to pair."""
  turns = []
  for index in range(pairs):
    found = {}
    order = [('ours', ours), ('theirs', theirs)]
    for name, run in order if index % 2 else reversed(order):
      wall, cpu = time.perf_counter(), time.process_time()
      run()
      found[name] = time.perf_counter() - wall
      found[f'{name}_cpu'] = time.process_time() - cpu
    found['ratio'] = found['ours'] / found['theirs']
    found['cpu_ratio'] = found['ours_cpu'] / max(found['theirs_cpu'], 1e-9)
    turns.append(found)
    print(f'    {found["ours"]:8.3f} s  {found["theirs"]:8.3f} s  ratio {found["ratio"]:.3f}',
          flush=True)
  return turns


def summary(turns: list[dict[str, float]]) -> dict[str, Any]:
  """Medians and quartiles over the pairs."""
  found = {}
  for name in ('ours', 'theirs', 'ratio', 'cpu_ratio'):
    low, median, high = np.percentile([turn[name] for turn in turns], (25, 50, 75))
    unit = '_seconds' if name in ('ours', 'theirs') else ''
    digits = lambda value: round(float(value), 4)
    found[f'{name}{unit}'] = {'median': digits(median), 'quartiles': [digits(low), digits(high)]}
  return found


class Comparison:
  """Both sides on one model, one kind of work after another, one peer after another."""

  def __init__(self, args: argparse.Namespace):
    self.args, self.config = args, MODELS[args.model]
    size = args.size or self.config.sample_size
    self.batch = draw_batch(self.config, size, max(args.batch, args.images))
    self.ours = Ours(self.config, args.dtype)
    self.weights = self.ours.published()
    self.limit = TOLERANCE[args.dtype]
    own = {field.name for field in dataclasses.fields(UNetConfig)}
    self.theirs_config = {name: getattr(self.config, name) for name in own}

  def part(self, *names: str) -> dict[str, np.ndarray]:
    """The first examples of a step."""
    return {name: self.batch[name][: self.args.batch] for name in names}

  def work(self, side, what: str) -> Callable:
    """What is timed."""
    if what == 'step':
      return side.stepper(self.part('x', 't', 'text', 'noise'))
    rows = (self.batch[name][: self.args.images] for name in ('x', 'text', 'negative'))
    return side.drawer(*rows, self.args.steps, GUIDANCE)

  def run(self) -> dict[str, Any]:
    """{work: {peer: figures}}, with differences and FLOPs."""
    wanted = self.ours.output(self.part('x', 't', 'text'))
    found: dict[str, Any] = {}
    for what in [self.args.only] if self.args.only else ['step', 'sample']:
      ours, found[what] = self.work(self.ours, what), {}
      result = ours()  # Of the weights that both begin with.
      for kind in self.args.peers:
        print(f'{what}: diffusion_jax beside diffusers {kind}', flush=True)
        found[what][kind] = self.beside(what, kind, ours, result, wanted)
        gc.collect()
    return {**found, 'compile_seconds': self.ours.compile_seconds, 'flops': self.flops()}

  def beside(self, what: str, kind: str, ours: Callable, result, wanted) -> dict[str, Any]:
    """Figures of one kind of work beside one peer."""
    peer = Theirs(kind, self.theirs_config, self.weights, self.args.dtype)
    same = {'output_difference': difference(
      wanted, peer.output(self.part('x', 't', 'text')), self.limit, 'outputs of the U-Net'
    )}
    theirs = self.work(peer, what)
    start = time.perf_counter()
    first = theirs()
    seconds = time.perf_counter() - start
    same[f'{what}_difference'] = difference(result, first, 10 * self.limit, f'results of {what}')
    ours(), theirs()
    figures = summary(in_turn(ours, theirs, self.args.pairs))
    ratio = figures['ratio']
    print(f'  median ratio {ratio["median"]} (quartiles {ratio["quartiles"]}), outputs differ by '
          f'{same["output_difference"]:.1e}', flush=True)
    return {**figures, **same, 'first_run_seconds': round(seconds, 2)}

  def flops(self) -> dict[str, float]:
    """By formula, of a step."""
    batch = self.part('x', 't', 'text')
    loss = lambda params, x, t, text: self.ours.network.bind(params)(x, t, text).sum()
    return {'step': count_flops(loss, self.ours.network.shapes, *batch.values(), trained=0).total}


def main(argv: list[str] | None = None) -> None:
  """Compares, measures, prints, writes."""
  args = arguments(argv)
  cores = cpu_cores()
  if torch.cuda.is_available():  # As XLA multiplies float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  else:
    torch.set_num_threads(cores)
  load = os.getloadavg()[0]
  comparison = Comparison(args)
  found = comparison.run()
  device = jax.devices()[0]
  out = {
    'command': ' '.join(['python', '-m', 'benchmarks.peers', *(sys.argv[1:] if argv is None
                                                               else argv)]),
    'device': {'platform': device.platform, 'kind': device.device_kind, 'cpu_cores': cores},
    'versions': {
      'python': platform.python_version(), 'diffusion_jax': __version__, 'jax': jax.__version__,
      'torch': torch.__version__, 'diffusers': diffusers.__version__,
    },
    'load_average': round(load, 2),
    'config': {name: value for name, value in vars(args).items() if name != 'json'},
    'parameters': sum(leaf.size for leaf in comparison.ours.network.shapes.values()),
    **found,
  }
  if args.json:
    Path(args.json).write_text(json.dumps(out, indent=2) + '\n')


if __name__ == '__main__':
  main()
