"""Error and time of feature statistics in float32 on devices, against float64 on the host.

python benchmarks/feature_statistics.py --json benchmarks/feature_statistics.json

Features are drawn like pooled activations: not negative, correlated, on scales of their own. For
each number of shards (simulated devices on a CPU) all rows are summed in batches, and the sums are
compared with one pass in float64; then again with 1000 added to every feature, where raw second
moments in float32 are shown beside. Errors of M2 are relative, in the Frobenius norm.
"""

import argparse
import functools
import json
import os
import platform
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rows', type=int, default=50_000)
  parser.add_argument('--width', type=int, default=2048)
  parser.add_argument('--batch', type=int, default=64, help='rows of each shard at a time')
  parser.add_argument('--shards', type=int, nargs='+', default=[1, 2, 4, 8])
  parser.add_argument('--json', type=Path, help='file to write')
  return parser.parse_args()


def draw(rows: int, width: int, seed: int):
  import numpy as np

  rng = np.random.default_rng(seed)
  mix = rng.normal(size=(64, width)).astype(np.float32) / 16
  scales = np.geomspace(1, 0.05, width).astype(np.float32)
  out = rng.standard_normal((rows, width), np.float32)
  out *= scales
  out += rng.standard_normal((rows, 64), np.float32) @ mix
  return np.abs(out + 0.2, out=out)


def in_float64(features):
  from diffusion_jax.evaluation.statistics import Statistics

  out = Statistics.empty(features.shape[1])
  for start in range(0, len(features), 5000):
    out = out.merge(Statistics.from_features(features[start : start + 5000]))
  return out


def on_devices(features, shards: int, batch: int):
  """(statistics, seconds of an update without the first)."""
  import jax
  import numpy as np

  from diffusion_jax.evaluation import statistics
  from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch

  mesh = make_mesh(MeshConfig(), jax.devices()[:shards])
  step = jax.jit(functools.partial(statistics.update, mesh=mesh), donate_argnums=0)
  state, size, seconds = statistics.empty(features.shape[1], mesh), batch * shards, []
  for start in range(0, len(features), size):
    rows = features[start : start + size]
    valid = np.arange(size) < len(rows)
    rows = np.concatenate([rows, np.zeros((size - len(rows), rows.shape[1]), np.float32)])
    rows, valid = jax.block_until_ready(put_batch((rows, valid), mesh))
    begin = time.perf_counter()
    state = jax.block_until_ready(step(state, rows, valid))
    seconds.append(time.perf_counter() - begin)
  return statistics.collect(state, mesh=mesh), float(np.median(seconds[1:]))


def raw_moments(features):
  """Relative error of M2 from sums of x and x x^T in float32, and its lowest eigenvalue."""
  import jax.numpy as jnp
  import numpy as np

  total = jnp.zeros(features.shape[1])
  products = jnp.zeros((features.shape[1],) * 2)
  for start in range(0, len(features), 500):
    x = jnp.asarray(features[start : start + 500])
    total, products = total + x.sum(axis=0), products + jnp.matmul(x.T, x, precision='highest')
  mean = np.asarray(total, np.float64) / len(features)
  return np.asarray(products, np.float64) - len(features) * np.outer(mean, mean)


def main() -> None:
  args = arguments()
  os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={max(args.shards)}'
  import jax
  import numpy as np

  from diffusion_jax.evaluation.metrics.gaussians import FrechetReference

  error = lambda found, wanted: float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
  reference = FrechetReference(in_float64(draw(2 * args.width, args.width, 1)))
  rows = []
  for shift in (0, 1000):
    features = draw(args.rows, args.width, 0)
    features += shift
    wanted = in_float64(features)
    # Only without the shift, which the reference does not have.
    distance = reference.distance(wanted) if shift == 0 else None
    for shards in args.shards:
      found, seconds = on_devices(features, shards, args.batch)
      row = {
        'added': shift, 'shards': shards, 'm2_error': error(found.m2, wanted.m2),
        'mean_error': float(np.abs(found.mean - wanted.mean).max()),
        'rows_per_update': args.batch * shards, 'update_ms': round(seconds * 1e3, 2),
      }
      assert found.n == wanted.n == args.rows
      if distance is not None and shards == max(args.shards):
        row |= {'fid': distance, 'fid_error': abs(reference.distance(found) / distance - 1)}
      rows.append(row)
      print(json.dumps(row), flush=True)
    rows.append({'added': shift, 'raw_moments_m2_error': error(raw_moments(features), wanted.m2)})
    print(json.dumps(rows[-1]), flush=True)
  device = jax.devices()[0]
  kind = f'simulated devices on {os.cpu_count()} cores' if device.platform == 'cpu' else (
    device.device_kind
  )
  options = f'--rows {args.rows} --width {args.width} --batch {args.batch}'
  result = {
    'rows': args.rows, 'width': args.width, 'results': rows, 'device': kind,
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
    'command': f'python benchmarks/feature_statistics.py {options}',
  }
  if args.json:
    args.json.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
