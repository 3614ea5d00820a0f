"""Speed of the FID Inception's features beside PyTorch, on the same images and weights, in turn.

Each reads uint8 images of 256x256 from memory, resizes them, runs the network up to the last pool
and takes the mean and the covariance: ours as `evaluation` does, PyTorch as pytorch-fid does,
eager, in both memory formats. Beside the best time of each, the CPU time, which other work on the
machine disturbs less.

  python benchmarks/features.py --json FILE
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np
import torch

from diffusion_jax import __version__
from diffusion_jax.evaluation.extractors import InceptionExtractor, compiled
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.io.inception import fold
from diffusion_jax.models.functional import Network
from diffusion_jax.models.inception import Inception, InceptionConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.parallel.sharding import in_batches
from tests.parity.reference.inception import random_inception


def ours(model, images: np.ndarray, batch_size: int):
  """A function that makes Statistics of the images."""
  network, mesh = Network.of(Inception, InceptionConfig()), make_mesh(MeshConfig())
  state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  params = jax.tree.map(jax.numpy.asarray, fold(state, network.shapes, 'the reference'))
  extractor = InceptionExtractor(network, params, 'random', 'pytorch')
  function = compiled(extractor)

  def run():
    total = Statistics.empty(2048)
    for batch in in_batches(function, params, images, mesh=mesh, batch_size=batch_size):
      total = total.merge(Statistics.from_features(batch['pool3']))
    return total.mean, total.covariance

  return run


def theirs(model, images: np.ndarray, batch_size: int, memory_format):
  """The same by PyTorch and numpy."""
  def run():
    model.to(memory_format=memory_format)
    features = []
    for start in range(0, len(images), batch_size):
      x = torch.tensor(images[start : start + batch_size]).permute(0, 3, 1, 2)
      x = x.contiguous(memory_format=memory_format).float() / 255
      x = torch.nn.functional.interpolate(x, (299, 299), mode='bilinear', align_corners=False)
      features.append(model(2 * x - 1)['pool3'].numpy())
    features = np.concatenate(features).astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False)

  return run


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--batch-size', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=4)
  args = parser.parse_args()
  images = np.random.default_rng(0).integers(0, 256, (args.images, 256, 256, 3), np.uint8)
  cores = len(os.sched_getaffinity(0))
  torch.set_num_threads(cores)
  model = random_inception()
  runs = {
    'diffusion_jax': ours(model, images, args.batch_size),
    'torch': theirs(model, images, args.batch_size, torch.contiguous_format),
    'torch_channels_last': theirs(model, images, args.batch_size, torch.channels_last),
  }
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
  with torch.no_grad():
    wanted, found = runs['torch'](), runs['diffusion_jax']()
    error = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(wanted, found,
                                                                             strict=True))
    for _ in range(args.rounds):
      for name, run in runs.items():
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
  figures = {
    name: {
      'images_per_second': round(args.images / min(wall for wall, _ in pairs), 2),
      'cpu_ms_per_image': round(1e3 * min(cpu for _, cpu in pairs) / args.images, 1),
      'seconds': [round(wall, 2) for wall, _ in pairs],
    }
    for name, pairs in times.items()
  }
  for name, values in figures.items():
    print(f'{name:22}{values["images_per_second"]:8} images/s '
          f'{values["cpu_ms_per_image"]:8} ms of CPU an image')
  if args.json:
    Path(args.json).write_text(json.dumps({
      'device': f'{platform.processor() or platform.machine()}, {cores} cores',
      'command': f'python benchmarks/features.py --images {args.images} --batch-size '
                 f'{args.batch_size} --json FILE',
      'load_average': os.getloadavg()[0],
      'versions': {'diffusion_jax': __version__, 'jax': jax.__version__,
                   'torch': torch.__version__},
      'largest_difference_of_mean_and_covariance': error,
      'figures': figures,
    }, indent=2) + '\n')


if __name__ == '__main__':
  main()
