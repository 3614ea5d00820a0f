"""Time of every sampler with a fixed number of steps against that of its network calls alone.

Both run the same U-Net on the same batch as often: the sampler its grid, the bare loop nothing
else. They take turns, and each ratio is the median over the turns. On a CPU there is the ratio of
the process's CPU seconds, too, which other programs disturb less than the time on the clock.

  python benchmarks/sampler_overhead.py --json FILE
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import __version__
from diffusion_jax.diffusion.denoiser import make_denoiser
from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import infos, initial_noise, sampler, sampling_grid
from diffusion_jax.models.network import Network
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.types import Condition

LIMIT = 1.02
# A hundred calls a level would measure the calls rather than the sampler.
OPTIONS = {'annealed_langevin': {'steps': 4}}


def arguments() -> argparse.Namespace:
  """Return the options of the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  parser.add_argument('--steps', type=int, default=8)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--edge', type=int, default=16, help='edge of the latents')
  parser.add_argument('--channels', type=int, nargs='+', default=[64, 128])
  parser.add_argument('--dtype', default='float32', help='in which the network computes')
  parser.add_argument('--samplers', nargs='+', metavar='NAME', help='only these')
  return parser.parse_args()


def unet_config(edge: int, channels: list[int]) -> UNetConfig:
  """Stable Diffusion's layout with fewer channels, text at every level but the last."""
  more = len(channels) - 1
  return UNetConfig(
    sample_size=edge, block_out_channels=tuple(channels), layers_per_block=1,
    cross_attention_dim=128, attention_head_dim=4,
    down_block_types=(*['CrossAttnDownBlock2D'] * more, 'DownBlock2D'),
    up_block_types=('UpBlock2D', *['CrossAttnUpBlock2D'] * more),
  )


def count_calls(draw, noise, grid, keys) -> int:
  """Count the calls of the denoiser on a grid."""
  calls = []

  def denoise(x, alpha, sigma):
    jax.debug.callback(lambda: calls.append(1))
    return alpha * x

  jax.block_until_ready(jax.jit(lambda: draw(denoise, noise[:1], grid, keys[:1]))())
  jax.effects_barrier()
  return len(calls)


class Bench:
  """One network, one batch, and the loop of bare calls."""

  def __init__(self, args: argparse.Namespace):
    config = unet_config(args.edge, args.channels)
    self.network = Network.of(UNet, config, dtype=jnp.dtype(args.dtype))
    self.params = jax.jit(self.network.initialize)(jax.random.key(0))
    self.schedule = Schedule(ScheduleConfig())
    self.grid = sampling_grid(self.schedule, args.steps)
    shape = (args.edge, args.edge, config.in_channels)
    self.noise, self.keys = initial_noise(0, 0, args.batch, shape)
    self.text = jax.random.normal(jax.random.key(1), (args.batch, 77, 128))
    self.repeats = args.repeats
    self.bare = jax.jit(self._bare)

  def _bare(self, params, x, text, calls):
    module = self.network.bind(params)

    def call(i, x):
      t = jnp.full(len(x), 999.0) - i
      return module(x, t, Condition(text)).astype(x.dtype)

    return jax.lax.fori_loop(0, calls, call, x)

  def sampled(self, name: str):
    """The jitted sampler: (params, x, text, grid, keys) -> samples."""
    draw = sampler(name, **OPTIONS.get(name, {}))

    def run(params, x, text, grid, keys):
      module = self.network.bind(params)
      network = lambda x, t: module(x, t, Condition(text))
      denoise = make_denoiser(network, Parameterization(), self.schedule.label)
      return draw(denoise, x, grid, keys)

    return jax.jit(run)

  def measure(self, name: str) -> dict:
    """Call, seconds and the ratio of one sampler."""
    draw = sampler(name, **OPTIONS.get(name, {}))
    calls = count_calls(draw, self.noise, self.grid, self.keys)
    run = self.sampled(name)
    of_sampler = lambda: run(self.params, self.noise, self.text, self.grid, self.keys)
    of_calls = lambda: self.bare(self.params, self.noise, self.text, calls)
    jax.block_until_ready((of_sampler(), of_calls()))
    turns = []
    for i in range(self.repeats):
      first, second = (of_calls, of_sampler) if i % 2 else (of_sampler, of_calls)
      pair = timed(first), timed(second)
      turns.append(pair if i % 2 else pair[::-1])
    return figures(calls, np.array(turns))


def figures(calls: int, turns: np.ndarray) -> dict:
  """Medians of seconds [turns, (bare, sampler), (clock, CPU)]."""
  (bare, _), (whole, _) = np.median(turns, axis=0)
  clock, cpu = np.median(turns[:, 1] / turns[:, 0], axis=0)
  return {
    'calls': calls, 'milliseconds_a_call': round(1e3 * bare / calls, 3),
    'seconds': round(whole, 4), 'bare_seconds': round(bare, 4), 'ratio': round(clock, 4),
    **({'cpu_ratio': round(cpu, 4)} if jax.devices()[0].platform == 'cpu' else {}),
  }


def timed(function) -> tuple[float, float]:
  """Seconds on the clock and of this process's CPU time until the result is there."""
  start, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(function())
  return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
  """Measures, prints and writes."""
  args = arguments()
  bench = Bench(args)
  names = args.samplers or [name for name, info in infos().items() if info.calls]
  results = {}
  print(f'{"sampler":20}{"calls":>6}{"ms a call":>11}{"ratio":>8}{"CPU":>8}')
  for name in names:
    row = results[name] = bench.measure(name)
    ratio, cpu = row['ratio'], row.get('cpu_ratio', float('nan'))
    mark = '' if row.get('cpu_ratio', ratio) <= LIMIT else f'  above {LIMIT}'
    print(f'{name:20}{row["calls"]:6}{row["milliseconds_a_call"]:11.2f}{ratio:8.4f}{cpu:8.4f}{mark}',
          flush=True)
  ratios = [row['ratio'] for row in results.values()]
  print(f'median {np.median(ratios):.4f}, highest {max(ratios):.4f}')
  if args.json:
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    config = {name: value for name, value in vars(args).items() if name not in ('json', 'samplers')}
    words = lambda value: ' '.join(map(str, value)) if isinstance(value, list) else str(value)
    options = [f'--{name} {words(value)}' for name, value in config.items()]
    options += [f'--samplers {words(args.samplers)}'] if args.samplers else []
    out = {
      'command': ' '.join(['python benchmarks/sampler_overhead.py', *options, '--json FILE']),
      'config': config,
      'device': {'platform': device.platform, 'kind': device.device_kind, 'cpu_cores': cores},
      'versions': {'python': platform.python_version(), 'jax': jax.__version__,
                   'diffusion_jax': __version__},
      'samplers': results,
    }
    Path(args.json).write_text(json.dumps(out, indent=2) + '\n')


if __name__ == '__main__':
  main()
