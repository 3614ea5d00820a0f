"""Time and memory of converting and loading a pipeline of a published size.

Weights are random and written tensor by tensor into a temporary folder, which is removed. Every
job is a process of its own; its seconds include its start. Memory is the peak of what is no file's,
beyond what the process held before the job and beyond the arrays that it loads.

  python benchmarks/convert.py --dtype float16 --json FILE
  python benchmarks/convert.py --model sdxl --dtype float32 --jobs load_unet_on_1 --json FILE
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from peak_memory import PeakMemory

from diffusion_jax import __version__
from diffusion_jax.formats.autoencoder import AUTOENCODERS
from diffusion_jax.formats.clip import TEXT_ENCODERS
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.networks import DTYPES, load, network_format
from diffusion_jax.formats.published import published_name, published_shape
from diffusion_jax.formats.tensors import Tensor, write_json, write_tensors
from diffusion_jax.formats.unet import UNETS
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

LIMIT_SECONDS = 120
_SECOND = ['transformers', 'CLIPTextModelWithProjection']
PIPELINES = {
  name: {
    'unet': ('unet', UNETS[name], ['diffusers', 'UNet2DConditionModel']),
    'vae': ('autoencoder', AUTOENCODERS[name], ['diffusers', 'AutoencoderKL']),
    'text_encoder': ('clip_text', TEXT_ENCODERS['clip_l'], ['transformers', 'CLIPTextModel']),
  }
  for name in ('sd15', 'sdxl')
}
PIPELINES['sdxl']['text_encoder_2'] = (
  'clip_text_projection', TEXT_ENCODERS['openclip_bigg'], _SECOND
)
CLASSES = {'sd15': 'StableDiffusionPipeline', 'sdxl': 'StableDiffusionXLPipeline'}
JOBS = (
  'to_single_file', 'from_single_file', 'to_native', 'load_unet_on_1', 'load_unet_on_8',
  'load_native_unet_on_8',
)


def arguments() -> argparse.Namespace:
  """Return the options of the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  parser.add_argument('--dtype', default='float16', choices=DTYPES, help='of the weights')
  parser.add_argument('--model', default='sd15', choices=PIPELINES, help='which published size')
  parser.add_argument('--jobs', nargs='+', default=list(JOBS), choices=JOBS, help='only these')
  parser.add_argument('--folder', default='/tmp', help='where the temporary folder is made')
  parser.add_argument('--job', choices=JOBS, help=argparse.SUPPRESS)  # In the process of a job.
  return parser.parse_args()


def shapes_of(kind: str, config) -> dict[str, tuple[int, ...]]:
  """Published name -> shape of every tensor of a network."""
  leaves = network_format(kind).shapes(config)
  return {published_name(n): published_shape(n, leaf.shape) for n, leaf in leaves.items()}


def write_pipeline(folder: Path, model: str, dtype: str, shapes: dict[str, dict]) -> None:
  """A directory of diffusers with random weights."""
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])
  parts = PIPELINES[model]
  for name, (kind, config, _) in parts.items():
    tensors = {
      key: Tensor(DTYPES[dtype], shape, lambda shape=shape: draw(shape))
      for key, shape in shapes[name].items()
    }
    write_tensors(folder / name / network_format(kind).weights, tensors)
    write_json(folder / name / 'config.json', network_format(kind).describe(config))
  files = {'tokenizer': 'tokenizer.json', 'scheduler': 'scheduler_config.json'}
  if 'text_encoder_2' in parts:
    files['tokenizer_2'] = 'tokenizer.json'
  for name, file in files.items():
    write_json(folder / name / file, {'prediction_type': 'epsilon'})
  entries = {name: entry for name, (_, _, entry) in parts.items()}
  entries |= {name: ['transformers', 'CLIPTokenizer'] for name in files if name != 'scheduler'}
  index = {'_class_name': CLASSES[model], 'scheduler': ['diffusers', 'DDIMScheduler'], **entries}
  write_json(folder / 'model_index.json', index)


def do(job: str, folder: Path) -> int:
  """One job; returns the bytes of the arrays that it leaves in memory."""
  source, single, native = folder / 'diffusers', folder / 'single.safetensors', folder / 'native'
  if job == 'to_single_file':
    convert(source, single, 'single-file')
  elif job == 'from_single_file':
    convert(single, folder / 'back', 'diffusers', tokenizers=source / 'tokenizer')
  elif job == 'to_native':
    convert(source, native, 'native')
  else:
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    where = native if job.startswith('load_native') else source
    unet = load('unet', where / 'unet', mesh=mesh)
    arrays = jax.block_until_ready(jax.tree.leaves(nnx.state(unet)))
    return sum(array.nbytes for array in arrays)
  return 0


def job_process(job: str, folder: Path) -> None:
  """Print the figures of a job, in a process of its own."""
  jax.device_put(np.zeros(8)).block_until_ready()
  with PeakMemory() as peak:
    start = time.perf_counter()
    arrays = do(job, folder)
    seconds = time.perf_counter() - start
  print(json.dumps({
    'seconds_of_the_job': round(seconds, 2), 'array_mb': round(arrays / 2**20),
    'peak_mb_beyond_arrays': round((peak.bytes - arrays) / 2**20, 1),
  }))


def run_job(job: str, folder: Path) -> dict:
  """Start the process of a job and times it."""
  devices = job.rpartition('_')[2] if job.startswith('load') else '1'
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'
  }
  start = time.perf_counter()
  run = subprocess.run(
    [sys.executable, __file__, '--job', job, '--folder', folder], env=environment, check=True,
    stdout=subprocess.PIPE, text=True,
  )
  seconds = time.perf_counter() - start
  figures = {'seconds': round(seconds, 2), **json.loads(run.stdout.splitlines()[-1])}
  print(job, figures, flush=True)
  return figures


@contextlib.contextmanager
def temporary_folder(parent: str, needed: int):
  """A folder that is removed; exits at once where the disk is too small."""
  free = shutil.disk_usage(parent).free
  if free < needed:
    sys.exit(f'{parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed; choose '
             'another --folder, or --dtype float16.')
  folder = Path(tempfile.mkdtemp(dir=parent, prefix='convert_benchmark_'))
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
  """Runs all jobs and prints them."""
  args = arguments()
  if args.job:
    return job_process(args.job, Path(args.folder))
  parts = PIPELINES[args.model]
  shapes = {name: shapes_of(kind, config) for name, (kind, config, _) in parts.items()}
  sizes = [int(np.prod(s)) for of_part in shapes.values() for s in of_part.values()]
  nbytes = sum(sizes) * DTYPES[args.dtype].itemsize
  copies = 1 + any('single' in j for j in args.jobs) + any('native' in j for j in args.jobs)
  with temporary_folder(args.folder, copies * nbytes + 2**28) as folder:
    start = time.perf_counter()
    write_pipeline(folder / 'diffusers', args.model, args.dtype, shapes)
    print(f'{nbytes / 1e9:.2f} GB written in {time.perf_counter() - start:.1f} s', flush=True)
    jobs = {}
    for job in args.jobs:
      jobs[job] = run_job(job, folder)
      if job == 'from_single_file':
        shutil.rmtree(folder / 'back')
        (folder / 'single.safetensors').unlink()
  result = {
    'command': f'python benchmarks/convert.py {" ".join(sys.argv[1:])}',
    'model': args.model,
    'device': {'platform': 'cpu', 'cpu_cores': os.cpu_count()},
    'versions': {
      'diffusion_jax': __version__, 'python': platform.python_version(), 'jax': jax.__version__
    },
    'parameters': sum(sizes), 'tensors': len(sizes), 'gigabytes': round(nbytes / 1e9, 2),
    'largest_tensor_mb': round(max(sizes) * DTYPES[args.dtype].itemsize / 2**20, 1),
    'limit_seconds': LIMIT_SECONDS,
    'within_limit': all(job['seconds'] < LIMIT_SECONDS for job in jobs.values()), 'jobs': jobs,
  }
  print(json.dumps(result, indent=2))
  if args.json:
    Path(args.json).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
