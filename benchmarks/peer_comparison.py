"""One kind of work of both sides of benchmarks/peers.py: first the same, then timed in turn."""

import argparse
import os
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.peer_process import Process

KINDS = {
  'eager': (False, 'contiguous_format'),
  'eager_channels_last': (False, 'channels_last'),
  'compiled': (True, 'contiguous_format'),
  'compiled_channels_last': (True, 'channels_last'),
}
"""Peer: (whether torch.compile is used, memory format)."""

MODELS: dict[str, str | dict[str, Any]] = {
  'small': dict(
    sample_size=32, block_out_channels=(64, 128, 256), cross_attention_dim=256,
    down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
  ),
  'sd2': 'sd21_base',
  'tiny': dict(
    sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
    cross_attention_dim=12, attention_head_dim=2, down_block_types=('CrossAttnDownBlock2D',),
    up_block_types=('UpBlock2D',),
  ),
}
"""Names of published U-Nets, or fields of UNetConfig. small has 18.15 M parameters; tiny is for
tests."""

CACHE = 'TORCHINDUCTOR_CACHE_DIR'
LENGTH, GUIDANCE = 77, 7.5
TOLERANCE = {'float32': 1e-4, 'bfloat16': 5e-2}
"""Error of the U-Net's output, relative to its largest entry; losses and samples may differ by ten
times as much, as they see the difference again and again."""


def fill_in(args: argparse.Namespace, platform: str) -> None:
  """The defaults that depend on what is computed on."""
  gpu = platform == 'gpu'
  args.model = args.model or ('sd2' if gpu else 'small')
  args.dtype = args.dtype or ('bfloat16' if gpu else 'float32')


def draw_batch(config: dict[str, Any], size: int, count: int) -> dict[str, np.ndarray]:
  """Latents, times, texts and noise, float32, NHWC; negative texts for sampling."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  latents = (count, size, size, config['in_channels'])
  return {
    'x': normal(*latents), 'noise': normal(*latents),
    't': rng.integers(0, 1000, count).astype(np.int32),
    'text': normal(count, LENGTH, config['cross_attention_dim']),
    'negative': normal(count, LENGTH, config['cross_attention_dim']),
  }


def difference(ours: Any, theirs: Any, limit: float, what: str) -> float:
  """Largest difference, relative to the largest entry; ends the program where it is too large."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not error <= limit:
    sys.exit(f'{what} differ by {error:.2g} of the largest entry, more than {limit:g}.')
  return error


def in_turn(ours: Process, theirs: Process, pairs: int) -> list[dict[str, float]]:
  """Seconds of both, on the clock and of the processors; who is first changes from pair to pair."""
  turns = []
  for index in range(pairs):
    found = {}
    order = [('ours', ours), ('theirs', theirs)]
    for name, side in order if index % 2 else reversed(order):
      _, found[name], found[f'{name}_cpu'] = side.ask('run')
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
  """One kind of work: our side in its process, compiled once, beside one peer after another."""

  def __init__(self, args: argparse.Namespace, what: str, ours: Process, folder: str):
    """folder: for the weights and for what PyTorch compiles."""
    self.args, self.what, self.ours, self.folder = args, what, ours, folder
    self.facts = ours.ask('load')
    fill_in(args, self.facts['device']['platform'])
    ours.ask('make', MODELS[args.model], args.dtype)
    self.weights = os.path.join(folder, 'weights.safetensors')
    ours.ask('call', 'save', self.weights)
    self.config = ours.ask('call', 'describe')['config']
    size = args.size or self.config['sample_size']
    self.batch = draw_batch(self.config, size, max(args.batch, args.images))
    self.limit = TOLERANCE[args.dtype]
    self.flops = ours.ask('call', 'flops', self.part('x', 't', 'text'))
    self.output = ours.ask('call', 'output', self.part('x', 't', 'text'))
    self.prepare(ours)
    self.result, *_ = ours.ask('run')  # Of the weights that both begin with.
    self.described = ours.ask('call', 'describe')

  def part(self, *names: str) -> dict[str, np.ndarray]:
    """The first examples of a step."""
    return {name: self.batch[name][: self.args.batch] for name in names}

  def prepare(self, side: Process) -> None:
    """Has a side make what is timed."""
    if self.what == 'step':
      return side.ask('prepare', 'stepper', self.part('x', 't', 'text', 'noise'))
    rows = (self.batch[name][: self.args.images] for name in ('x', 'text', 'negative'))
    return side.ask('prepare', 'drawer', *rows, self.args.steps, GUIDANCE)

  def beside(self, kind: str) -> dict[str, Any]:
    """Figures beside one peer, whose process lives as long."""
    print(f'{self.what}: diffusion_jax beside diffusers {kind}', flush=True)
    more = {} if CACHE in os.environ else {CACHE: tempfile.mkdtemp(dir=self.folder)}
    with Process('theirs', f'diffusers {kind}', more) as theirs:
      self.facts['versions'] |= self.start(theirs, kind)
      same, seconds = self.same(theirs)
      for side in (self.ours, theirs):
        side.ask('run')
      figures = summary(in_turn(self.ours, theirs, self.args.pairs))
      peaks = {f'{name}_peak_resident_bytes': side.ask('peak')
               for name, side in (('ours', self.ours), ('theirs', theirs))}
    ratio = figures['ratio']
    print(f'  median ratio {ratio["median"]} (quartiles {ratio["quartiles"]}), outputs differ by '
          f'{same["output_difference"]:.1e}', flush=True)
    return {**figures, **same, 'first_run_seconds': round(seconds, 2), **peaks}

  def start(self, theirs: Process, kind: str) -> dict[str, str]:
    """Builds a peer; its versions."""
    facts, device = theirs.ask('load'), self.facts['device']
    if facts['device']['platform'] != device['platform']:
      sys.exit(f'JAX computes on a {device["platform"]}, PyTorch on a '
               f'{facts["device"]["platform"]}; JAX_PLATFORMS=cpu or CUDA_VISIBLE_DEVICES= for '
               'both on a CPU.')
    theirs.ask('make', *KINDS[kind], self.config, self.weights, self.args.dtype,
               device['cpu_cores'])
    return facts['versions']

  def same(self, theirs: Process) -> tuple[dict[str, float], float]:
    """(differences, none too large; seconds of the peer's first run)."""
    output = theirs.ask('call', 'output', self.part('x', 't', 'text'))
    found = {'output_difference': difference(
      self.output, output, self.limit, 'outputs of the U-Net'
    )}
    self.prepare(theirs)
    result, seconds, _ = theirs.ask('run')
    found[f'{self.what}_difference'] = difference(
      self.result, result, 10 * self.limit, f'results of {self.what}'
    )
    return found, seconds
