"""Speed of the FID Inception's features beside torch-fidelity's, on the same images and weights.

Each reads uint8 images of 256x256 from memory, resizes them by TensorFlow 1's rule, runs the
network up to the last pool and takes the mean and the covariance in float64: ours as the evaluation
job does, torch-fidelity's FeatureExtractorInceptionV3 as that package does, eager, in both memory
formats. They run in turn, round after round, and are compared within rounds. Beside the times the
CPU time, which other work on the machine disturbs less; and what the statistics take of it, summed
on the host and on the device.

  python -m benchmarks.features --json benchmarks/speed/features.json
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion_jax import __version__
from diffusion_jax.evaluation import statistics as sums_of
from diffusion_jax.evaluation.extract import Extraction
from diffusion_jax.evaluation.extractors.images import InceptionExtractor
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.formats.inception import fold
from diffusion_jax.models.features.inception import Inception, InceptionConfig
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, put_params
from tests.parity.reference.inception import random_inception

WIDTH = 2048
FORMATS = {'torch_fidelity': torch.contiguous_format,
           'torch_fidelity_channels_last': torch.channels_last}


def ours(state: dict[str, torch.Tensor], images: np.ndarray, batch_size: int) -> Callable:
  """A function that gives the mean and the covariance of the images' features."""
  network, mesh = Network.of(Inception, InceptionConfig()), make_mesh(MeshConfig())
  tensors = {name: tensor.numpy() for name, tensor in state.items()}
  params = put_params(fold(tensors, network.shapes, 'the reference'), mesh)
  extraction = Extraction(
    [InceptionExtractor(network, params, 'random', 'tensorflow')], mesh, batch_size
  )

  def run():
    (features,) = extraction(list(images)).values()
    moments = Statistics.from_features(features)
    return moments.mean, moments.covariance

  return run


@functools.cache
def torch_fidelity_network() -> type[torch.nn.Module]:
  """FeatureExtractorInceptionV3, without the package's own __init__, which asks for torchvision."""
  package = types.ModuleType('torch_fidelity')
  place = importlib.util.find_spec('torch_fidelity').submodule_search_locations
  package.__path__ = list(place)
  sys.modules['torch_fidelity'] = package
  module = importlib.import_module('torch_fidelity.feature_extractor_inceptionv3')
  return module.FeatureExtractorInceptionV3


def theirs(path: str, images: np.ndarray, batch_size: int, memory_format) -> Callable:
  """The same by torch-fidelity's network and numpy."""
  network = torch_fidelity_network()('inception', ['2048'], path).to(memory_format=memory_format)

  def run():
    features = []
    with torch.no_grad():
      for start in range(0, len(images), batch_size):
        x = torch.tensor(images[start : start + batch_size]).permute(0, 3, 1, 2)
        features.append(network(x.contiguous(memory_format=memory_format))[0].numpy())
    values = np.concatenate(features).astype(np.float64)
    return values.mean(0), np.cov(values, rowvar=False)

  return run


def timed(function: Callable, repeats: int) -> tuple[float, float]:
  """(seconds, seconds of CPU) of the fastest call."""
  pairs = []
  for _ in range(repeats):
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    pairs.append((time.perf_counter() - wall, time.process_time() - cpu))
  return min(wall for wall, _ in pairs), min(cpu for _, cpu in pairs)


def statistics(batch_size: int) -> dict[str, float]:
  """CPU milliseconds an image of sums of features, on the host and on the device."""
  rows = np.random.default_rng(0).random((4096, WIDTH), np.float32)
  mesh = make_mesh(MeshConfig())
  batch, valid = put_batch((rows[:batch_size], np.ones(batch_size, bool)), mesh)
  update = jax.jit(
    lambda state, batch: sums_of.update(state, batch, valid, mesh=mesh), donate_argnums=0
  )
  state = [update(sums_of.empty(WIDTH, mesh), batch)]

  def on_device():
    state[0] = update(state[0], jnp.asarray(batch))
    return state[0]

  host = timed(lambda: Statistics.from_features(rows).m2, 3)[1] / len(rows)
  return {'host': 1e3 * host, 'device': 1e3 * timed(on_device, 10)[1] / batch_size}


def measure(runs: dict[str, Callable], images: int, rounds: int) -> dict[str, dict]:
  """Return images a second and CPU milliseconds an image of each, at best, and all seconds."""
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      times[name].append(timed(run, 1))
  return {
    name: {
      'images_per_second': round(images / min(wall for wall, _ in pairs), 2),
      'cpu_ms_per_image': round(1e3 * min(cpu for _, cpu in pairs) / images, 1),
      'seconds': [round(wall, 2) for wall, _ in pairs],
      'cpu_seconds': [round(cpu, 2) for _, cpu in pairs],
    }
    for name, pairs in times.items()
  }


def ratios(figures: dict[str, dict], key: str) -> dict[str, float]:
  """Median over rounds of each one's time over ours of the same round."""
  own = np.array(figures['diffusion_jax'][key])
  return {
    name: round(float(np.median(np.array(values[key]) / own)), 3)
    for name, values in figures.items() if name != 'diffusion_jax'
  }


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--batch-size', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  images = np.random.default_rng(0).integers(0, 256, (args.images, 256, 256, 3), np.uint8)
  cores = len(os.sched_getaffinity(0))
  torch.set_num_threads(cores)
  state = random_inception().state_dict()
  with tempfile.TemporaryDirectory() as folder:
    path = f'{folder}/inception.pth'
    torch.save(state, path)
    runs = {'diffusion_jax': ours(state, images, args.batch_size)} | {
      name: theirs(path, images, args.batch_size, layout) for name, layout in FORMATS.items()
    }
  wanted, found = runs['torch_fidelity'](), runs['diffusion_jax']()
  error = max(
    float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(wanted, found, strict=True)
  )
  figures = measure(runs, args.images, args.rounds)
  sums = statistics(args.batch_size)
  own = figures['diffusion_jax']['cpu_ms_per_image']
  result = {
    'what': 'features', 'device': {'platform': 'cpu', 'cpu_cores': cores},
    'command': f'python -m benchmarks.features --images {args.images} --batch-size '
               f'{args.batch_size} --rounds {args.rounds} --json FILE',
    'load_average': os.getloadavg()[0],
    'versions': {'diffusion_jax': __version__, 'jax': jax.__version__,
                 'torch': torch.__version__, 'torch-fidelity': version('torch-fidelity')},
    'largest_difference_of_mean_and_covariance': error,
    'figures': figures,
    'time_over_ours': ratios(figures, 'seconds'),
    'cpu_time_over_ours': ratios(figures, 'cpu_seconds'),
    'statistics_cpu_ms_per_image': {name: round(value, 3) for name, value in sums.items()},
    'statistics_share': {name: round(value / own, 4) for name, value in sums.items()},
  }
  for name, values in figures.items():
    print(f'{name:30}{values["images_per_second"]:8} images/s '
          f'{values["cpu_ms_per_image"]:8} ms of CPU an image')
  names = ('largest_difference_of_mean_and_covariance', 'time_over_ours', 'cpu_time_over_ours',
           'statistics_cpu_ms_per_image', 'statistics_share')
  for name in names:
    print(f'{name}: {result[name]}')
  if args.json:
    Path(args.json).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
