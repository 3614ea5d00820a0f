"""The cost of a checkpoint, with and without the digests that guard it.

The state is a U-Net of Stable Diffusion 1 in fewer channels, with its average and Adam's moments:
as many arrays as the real one, of about half a gigabyte. It is written into a temporary folder,
which is removed. Seconds are medians; the first save, which also compiles, is told apart.

  python benchmarks/checkpoint.py --json FILE
  python benchmarks/checkpoint.py --devices 8 --json FILE
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from diffusion_jax import __version__
from diffusion_jax.checkpoint import record, saving
from diffusion_jax.checkpoint.checkpoints import Checkpoints
from diffusion_jax.formats.unet import UNETS
from diffusion_jax.models import network
from diffusion_jax.models.unet import UNet
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, shard_params


def arguments() -> argparse.Namespace:
  """Return the options of the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  parser.add_argument('--channels', nargs=4, type=int, default=[64, 128, 256, 256],
                      help='of the four levels of the U-Net')
  parser.add_argument('--devices', type=int, default=1, help='simulated ones, on a CPU')
  parser.add_argument('--saves', type=int, default=5, help='saves and restores to measure')
  parser.add_argument('--folder', default='/tmp', help='where the temporary folder is made')
  return parser.parse_args()


def make_state(channels: list[int], mesh) -> dict:
  """Random arrays onto their shards; none is alike another."""
  config = dataclasses.replace(UNETS['sd15'], block_out_channels=tuple(channels))
  shapes = network.abstract(lambda rngs: UNet(config, rngs=rngs))[1]
  shardings = shard_params(shapes, mesh)

  def draw(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
      name: jax.device_put(jax.random.normal(key, leaf.shape, jnp.float32), shardings[name])
      for key, (name, leaf) in zip(keys, shapes.items(), strict=True)
    }

  return {
    'params': draw(0), 'opt_state': {'mu': draw(1), 'nu': draw(2)}, 'ema': draw(3),
    'rest': {'step': jax.device_put(jnp.zeros((), jnp.int32), mesh.devices.flat[0])},
  }


@contextlib.contextmanager
def without_digests():
  """The same code, but that nothing is added up and so nothing compared."""
  none = lambda tree: {}
  with mock.patch.object(saving, 'local_digests', lambda tree: dict), \
       mock.patch.object(record, 'digests', none):
    yield


class Bench:
  """Seconds of saving and restoring one state some times over."""

  def __init__(self, folder: Path, state: dict):
    self.state, self.checkpoints = state, Checkpoints(folder)
    self.abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    self.seconds = {'save_blocks': [], 'on_disk_after': [], 'restore': [], 'thousand_polls': []}

  def turn(self, step: int) -> None:
    """One save and one restore."""
    start = time.perf_counter()
    assert self.checkpoints.save(step, self.state, {})
    self._note('save_blocks', start)
    polls = time.perf_counter()
    for _ in range(1000):
      self.checkpoints.poll()
    self._note('thousand_polls', polls)
    assert self.checkpoints.wait()
    self._note('on_disk_after', start)
    start = time.perf_counter()
    jax.block_until_ready(self.checkpoints.restore(self.abstract, step)[1])
    self._note('restore', start)

  def _note(self, name: str, start: float) -> None:
    self.seconds[name].append(time.perf_counter() - start)

  def figures(self) -> dict:
    """Medians, without the first turn, which compiles and is given apart."""
    values = self.seconds
    median = lambda name: round(statistics.median(values[name][1:]), 3)
    names = ('save_blocks', 'on_disk_after', 'restore')
    return {
      **{f'{name}_seconds': median(name) for name in names},
      **{f'first_{name}_seconds': round(values[name][0], 3) for name in names},
      'poll_microseconds': round(1e3 * statistics.median(values['thousand_polls']), 2),
    }


def main() -> None:
  """Measures, prints and writes."""
  args = arguments()
  jax.config.update('jax_num_cpu_devices', args.devices)
  mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
  state = jax.block_until_ready(make_state(args.channels, mesh))
  leaves = jax.tree.leaves(state)
  ways = {'without_digests': without_digests, 'with_digests': contextlib.nullcontext}
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    benches = {name: Bench(Path(folder) / name, state) for name in ways}
    for step in range(1, args.saves + 2):  # In turns, for other work on the machine slows both.
      for name, bench in benches.items():
        with ways[name]():
          bench.turn(step)
    for bench in benches.values():
      bench.checkpoints.close()
  results = {name: bench.figures() for name, bench in benches.items()}
  print(json.dumps(results, indent=2))
  device = jax.devices()[0]
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  out = {
    'command': f'python benchmarks/checkpoint.py {" ".join(sys.argv[1:])}',
    'device': {'platform': device.platform, 'kind': device.device_kind, 'devices': args.devices,
               'cpu_cores': cores},
    'versions': {
      'diffusion_jax': __version__, 'python': platform.python_version(), 'jax': jax.__version__,
    },
    'arrays': len(leaves), 'gigabytes': round(sum(x.nbytes for x in leaves) / 1e9, 3), **results,
  }
  if args.json:
    Path(args.json).write_text(json.dumps(out, indent=2) + '\n')


if __name__ == '__main__':
  main()
