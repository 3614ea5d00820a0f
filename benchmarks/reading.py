"""Pictures a second that are read, decoded, transformed and put into batches, beside PyTorch's
DataLoader and WebDataset with the same transforms.

Everything is on the same JPEGs, made in a temporary folder: smooth noise, so that a file is about
as large as a photograph's. Every measurement is a process of its own on the first N cores; rounds
go through all of them, so that what else the machine does meets all alike.

  python -m benchmarks.reading --json benchmarks/reading.json
  python -m benchmarks.reading --many 1000000
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DESCRIPTION = __doc__
STAGES = ('read', 'decode', 'transform', 'batch')
OURS, DECODERS, TORCH, WEB = 'ours', 'ours, processes', 'torch DataLoader', 'WebDataset'
MEAN_BYTES = 'bytes_per_picture'
SHARDS = 4
"""Of WebDataset, of which each worker has its own."""


def make_pictures(folder: Path, count: int, edge: int) -> float:
  """Write JPEGs and their captions, and the same as tars; return the mean size in bytes."""
  rng, sizes = np.random.default_rng(0), []
  with contextlib.ExitStack() as stack:
    archives = [
      stack.enter_context(tarfile.open(folder / f'{i}.tar', 'w')) for i in range(SHARDS)
    ]
    for i in range(count):
      coarse = rng.integers(0, 256, (edge // 8, edge // 8, 3), np.uint8)
      smooth = np.asarray(Image.fromarray(coarse).resize((edge, edge), Image.Resampling.BICUBIC))
      grain = rng.normal(0, 6, smooth.shape)
      pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, 'JPEG', quality=90)
      sizes.append(len(file.getvalue()))
      for suffix, data in (('jpg', file.getvalue()), ('txt', b'a picture of noise')):
        path = folder / f'{i:06d}.{suffix}'
        path.write_bytes(data)
        archives[i % SHARDS].add(path, path.name)
  return float(np.mean(sizes))


def stages(folder: Path, edge: int, batch_size: int, seconds: float) -> dict[str, float]:
  """Pictures a second of each stage by itself, in one thread."""
  from diffusion_jax.data.images import read_square
  from diffusion_jax.data.loader import _stack
  from diffusion_jax.data.transforms import apply

  files = sorted(folder.glob('*.jpg'))
  data = [path.read_bytes() for path in files[:64]]
  records = [
    {'image': read_square(io.BytesIO(each), edge, 'a')[0], 'captions': ['a']}
    for each in data[:batch_size]
  ]
  made, rng = _transforms(edge), np.random.default_rng(0)
  ready = [apply(made, record, rng) for record in records]
  work = {
    'read': lambda i: files[i % len(files)].read_bytes(),
    'decode': lambda i: read_square(io.BytesIO(data[i % len(data)]), edge, 'a'),
    'transform': lambda i: apply(made, records[i % len(records)], rng),
    'batch': lambda i: _stack(ready),
  }
  found = {name: _rate(one, seconds) for name, one in work.items()}
  return found | {'batch': found['batch'] * len(ready)}


def _rate(work: Any, seconds: float) -> float:
  start, i = time.perf_counter(), 0
  while (spent := time.perf_counter() - start) < seconds:
    work(i)
    i += 1
  return i / spent


def _transforms(edge: int) -> list[Any]:
  from diffusion_jax.data.transforms import build_transforms

  return build_transforms(['random_flip', 'first_caption', 'normalize'], size=edge)


def _ours(folder: Path, edge: int, batch_size: int, workers: int, processes: int = 0) -> Any:
  from diffusion_jax.config import DataConfig
  from diffusion_jax.data.loader import Loader
  from diffusion_jax.data.sources import open_data

  source, _ = open_data(DataConfig(
    f'folder:{folder}', edge, test_fraction=0.0, processes=processes
  ))
  return Loader(source, _transforms(edge), batch_size=batch_size, seed=0, num_threads=workers)


class _Torch:
  """What our transforms do, as a map-style data set of PyTorch."""

  def __init__(self, folder: Path, edge: int):
    self.files, self.edge = sorted(folder.glob('*.jpg')), edge

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Any:
    with Image.open(self.files[index]) as image:
      return transformed(image, self.edge), self.files[index].with_suffix('.txt').read_text()


def transformed(image: Image.Image, edge: int) -> Any:
  """The picture's middle at that size, perhaps mirrored, in [-1, 1], as a tensor [3 h w]."""
  import torch

  image = image.convert('RGB')
  short = min(image.size)
  left, top = (image.width - short) // 2, (image.height - short) // 2
  image = image.crop((left, top, left + short, top + short))
  image = image.resize((edge, edge), Image.Resampling.BICUBIC)
  if torch.rand(()) < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
  return pixels.to(torch.float32) / 127.5 - 1


def _theirs(kind: str, folder: Path, edge: int, batch_size: int, workers: int) -> Any:
  import torch

  torch.set_num_threads(1)
  if kind == TORCH:
    data = _Torch(folder, edge)
    return _endless(torch.utils.data.DataLoader(
      data, batch_size, shuffle=True, drop_last=True, num_workers=workers,
      persistent_workers=workers > 0,
    ))
  import webdataset

  shards = sorted(map(str, folder.glob('*.tar')))
  data = webdataset.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(100)
  data = data.decode('pil').to_tuple('jpg', 'txt').map_tuple(_Transform(edge), str)
  data = data.batched(batch_size)
  return iter(torch.utils.data.DataLoader(data, None, num_workers=workers))


class _Transform:
  """`transformed`, for other processes."""

  def __init__(self, edge: int):
    self.edge = edge

  def __call__(self, image: Image.Image) -> Any:
    return transformed(image, self.edge)


def _endless(loader: Any) -> Any:
  while True:
    yield from loader


def measure(kind: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
  """Pictures a second of batches from one loader."""
  edge, batch_size, workers = options['edge'], options['batch'], options['workers']
  opened = time.perf_counter()
  if kind in (OURS, DECODERS):
    loader = _ours(folder, edge, batch_size, workers, workers if kind == DECODERS else 0)
  else:
    loader = _theirs(kind, folder, edge, batch_size, workers)
  next(loader)
  first = time.perf_counter() - opened
  for _ in range(options['warmup']):
    next(loader)
  start, count = time.perf_counter(), 0
  while (spent := time.perf_counter() - start) < options['seconds']:
    next(loader)
    count += 1
  return {'pictures_per_second': count * batch_size / spent, 'first_batch_seconds': first}


class Many:
  """Entries of a set that is not there: every picture is the same, and each has a caption."""

  def __init__(self, count: int, edge: int):
    from diffusion_jax.data.sources.entries import Entries, Entry

    file = io.BytesIO()
    Image.new('RGB', (edge, edge), 'gray').save(file, 'JPEG')
    data = file.getvalue()

    class Same(Entries):
      where = 'a made set'
      sizes = np.broadcast_to(np.array([edge, edge], np.int32), (count, 2))

      def __len__(self) -> int:
        return count

      def __getitem__(self, index: int) -> Entry:
        return Entry(str(index), str(index), data, ['a caption'])

    self.entries = Same()


def measure_many(count: int, edge: int, batch_size: int) -> dict[str, Any]:
  """Seconds to the first batch of so many records, and the memory that they add."""
  from benchmarks.timing import peak_memory
  from diffusion_jax.data.loader import Loader
  from diffusion_jax.data.sources.pictures import PictureSource

  before, start = peak_memory()['host_peak_bytes'], time.perf_counter()
  source = PictureSource(Many(count, edge).entries, (edge, edge))
  loader = Loader(source, _transforms(edge), batch_size=batch_size, seed=0)
  next(loader)
  first = time.perf_counter() - start
  for _ in range(20):
    next(loader)
  more = peak_memory()['host_peak_bytes'] - before
  return {'records': count, 'first_batch_seconds': round(first, 3), 'added_bytes': more}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add sizes, counts and --json; --one is for the processes that measure."""
  number = {'type': int, 'metavar': 'N'}
  parser.add_argument('--edge', default=512, help='of the pictures (default: 512)', **number)
  parser.add_argument('--pictures', default=256, help='made (default: 256)', **number)
  parser.add_argument('--batch', default=16, help='pictures in a batch (default: 16)', **number)
  parser.add_argument('--cores', default=2, help='at most (default: 2)', **number)
  parser.add_argument('--rounds', default=3, help='of all measurements (default: 3)', **number)
  parser.add_argument('--seconds', type=float, default=8.0, help='of each (default: 8)')
  parser.add_argument('--many', help='records of a made set, whose start and memory are measured '
                      'alone, beside a hundredth of them', **number)
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  parser.add_argument('--one', help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
  """Measure in processes, print, write."""
  from benchmarks.timing import load_average  # JAX, which those that decode need not import.

  if args.one:
    print(json.dumps(_one(json.loads(args.one))))
    return 0
  result: dict[str, Any] = {'load_average': load_average()}
  if args.many:
    counts = (max(args.many // 100, args.batch), args.many)
    result['many'] = [
      _ask({'what': 'many', 'count': n, 'edge': 64, 'batch': args.batch, 'cores': args.cores})
      for n in counts
    ]
  else:
    result |= _compared(args)
  print(json.dumps(result, indent=2))
  if args.json:
    command = ' '.join(['python', '-m', 'benchmarks.reading', *sys.argv[1:]])
    Path(args.json).write_text(json.dumps({'command': command, **result}, indent=2) + '\n')
  return 0


def _compared(args: argparse.Namespace) -> dict[str, Any]:
  from benchmarks.timing import quartiles

  with tempfile.TemporaryDirectory() as folder:
    size = make_pictures(Path(folder), args.pictures, args.edge)
    common = {
      'folder': folder, 'edge': args.edge, 'batch': args.batch, 'warmup': 2,
      'seconds': args.seconds,
    }
    kinds, cores = (OURS, DECODERS, TORCH, WEB), range(1, args.cores + 1)
    wanted = [(kind, count) for kind in kinds for count in cores]
    rates: dict[str, list[float]] = {f'{kind}, {count}': [] for kind, count in wanted}
    by_stage: dict[str, list[float]] = {name: [] for name in STAGES}
    for _ in range(args.rounds):
      found = _ask({'what': 'stages', 'cores': 1, **common, 'seconds': args.seconds / len(STAGES)})
      for name in STAGES:
        by_stage[name].append(found[name])
      for kind, count in wanted:
        found = _ask({'what': kind, 'cores': count, 'workers': count, **common})
        if 'pictures_per_second' in found:
          rates[f'{kind}, {count}'].append(found['pictures_per_second'])
  rates = {name: values for name, values in rates.items() if values}
  most = args.cores
  ratio = lambda a, b: [x / y for x, y in zip(rates[a], rates.get(b, ()), strict=b in rates)]
  ratios = {
    **{
      f'{kind}, {most} cores to 1': ratio(f'{kind}, {most}', f'{kind}, 1')
      for kind in (OURS, DECODERS)
    },
    **{
      f'{own} to {kind}': ratio(f'{own}, {most}', f'{kind}, {most}')
      for own in (OURS, DECODERS) for kind in (TORCH, WEB)
    },
  }
  summed = lambda table: {name: quartiles(values) for name, values in table.items() if values}
  return {
    'edge': args.edge, 'batch': args.batch, MEAN_BYTES: round(size), 'rounds': args.rounds,
    'pictures_per_second_by_stage': summed(by_stage), 'pictures_per_second': summed(rates),
    'ratios': summed(ratios),
  }


def _ask(job: dict[str, Any]) -> dict[str, Any]:
  """What a process of its own measures; nothing where a peer is not installed."""
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.reading', '--one', json.dumps(job)], capture_output=True,
    text=True, check=False, cwd=Path(__file__).parents[1],
  )
  if done.returncode:
    if job['what'] == WEB and "No module named 'webdataset'" in done.stderr:
      return {}
    raise RuntimeError(f'{job["what"]} failed: {done.stderr[-2000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def _one(job: dict[str, Any]) -> dict[str, Any]:
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job['cores']])
  if job['what'] == 'many':
    return measure_many(job['count'], job['edge'], job['batch'])
  folder = Path(job['folder'])
  if job['what'] == 'stages':
    return stages(folder, job['edge'], job['batch'], job['seconds'])
  return measure(job['what'], folder, job)


if __name__ == '__main__':
  from benchmarks import command

  sys.exit(command.run_command('benchmarks.reading', sys.modules[__name__]))
