"""Memory per device of a published U-Net's training step, compiled for simulated devices.

python benchmarks/sharding_memory.py --model sdxl --mesh 8x1 --json benchmarks/sharding_memory.json

Nothing is allocated: the step of the whole training state (parameters, Adam's moments, average) is
compiled ahead of time for as many simulated CPU devices as the mesh has, and XLA's own account of
buffers is read. `--mesh AxB` is FSDP x tensor, `AxBxC` has spatial as the third axis. Arguments are
exact on any platform; temporary memory is that of the program for CPUs, a guide and no more:
attention and convolutions take other temporaries on GPUs and TPUs. `--shapes` leaves out compiling.

Compilation ends where XLA has partitioned, optimised and scheduled the program and given every
buffer its place. What would follow is code for CPUs that nobody runs, and takes most of an hour.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

SIZES = {'sd15': 64, 'sd21': 96, 'sdxl': 128}
LENGTH = 77
# The first as in the step. The second merges small all-reduces, which takes quadratic time.
DISABLED = 'cse_barrier_expander,cpu-all-reduce-combiner'


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--model', default='sdxl', choices=sorted(SIZES))
  parser.add_argument('--mesh', default='8x1', help='FSDPxTENSOR or FSDPxTENSORxSPATIAL')
  parser.add_argument('--size', type=int, default=0, help="latents' edge; default: the model's own")
  parser.add_argument('--batch', type=int, default=0, help='global; default: one per FSDP device')
  parser.add_argument('--remat', default='block')
  parser.add_argument('--shapes', action='store_true', help='only the state, from shapes')
  parser.add_argument('--json', type=Path, help='file to which the result is added')
  return parser.parse_args()


def prepare(args: argparse.Namespace, dump: str) -> list[int]:
  """Set as many simulated devices as the mesh has, and XLA's notes; before JAX is imported."""
  sizes = [int(size) for size in args.mesh.split('x')]
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
    f'--xla_force_host_platform_device_count={math.prod(sizes)} '
    f'--xla_backend_optimization_level=0 --xla_dump_to={dump} '
    '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'
  )
  return sizes + [1] * (3 - len(sizes))


def make_task(model: str, remat: str):
  """Trains the U-Net of that name on given latents and texts; nothing else is held."""
  import jax
  import jax.numpy as jnp

  from diffusion_jax.formats.unet import UNETS
  from diffusion_jax.models.network import Network
  from diffusion_jax.models.unet import UNet
  from diffusion_jax.train.meter import mean_metric
  from diffusion_jax.train.tasks.task import Task
  from diffusion_jax.types import Condition

  network = Network.of(UNet, UNETS[model], dtype=jnp.bfloat16, remat=remat)

  class Denoising(Task):
    """The U-Net's loss on noise; noise and latents come as a batch, drawn by nobody."""

    def initialize(self, key):
      return network.initialize(key)

    def constrain(self, params, carry):
      return params

    def loss(self, params, frozen, carry, batch, key, step):
      condition = Condition(batch['text'], batch.get('pooled'), batch.get('sizes'))
      out = network.bind(params)(batch['mean'], batch['t'], condition)
      error = jnp.square(out.astype(jnp.float32) - jax.random.normal(key, out.shape))
      error = error.mean((1, 2, 3))
      return error.mean(), ({'loss': mean_metric(error)}, ())

  return Denoising(), network


def batch_shapes(config, b: int, size: int) -> dict:
  """Shapes of latents, times, texts and conditions."""
  import jax
  import jax.numpy as jnp

  shapes = {
    'mean': (b, size, size, config.in_channels), 't': (b,),
    'text': (b, LENGTH, config.cross_attention_dim),
  }
  if config.addition_embed_type:
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes |= {'pooled': (b, pooled), 'sizes': (b, 6)}
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def assigned(lowered, dump: str) -> dict[str, int]:
  """Bytes of one device's arguments and temporary buffers, as soon as XLA has placed them.

  Compilation goes on in a thread that ends with the process.
  """
  options = {'xla_disable_hlo_passes': DISABLED}
  compiling = threading.Thread(target=lowered.compile, args=(options,), daemon=True)
  compiling.start()
  # XLA writes the report after the assignment, which is therefore complete.
  while not (found := list(Path(dump).glob('*.jit_step.*-memory-usage-report.txt'))):
    if not compiling.is_alive():
      raise RuntimeError('compilation failed; see above.')
    time.sleep(0.5)
  file = str(found[0]).replace('-memory-usage-report', '-buffer-assignment')
  text = Path(file).read_text().partition('\nTotal bytes')[0]
  allocations = re.findall(r'^allocation \d+: size (\d+), (.*)$', text, flags=re.MULTILINE)
  total = lambda word: sum(int(size) for size, kind in allocations if word in kind)
  return {'argument_bytes': total('parameter '), 'temp_bytes': total('preallocated-temp')}


def measure(args: argparse.Namespace, sizes: list[int], dump: str) -> dict:
  """Return the bytes that one device holds."""

  from diffusion_jax.parallel.mesh import MeshConfig, abstract_batch, make_mesh
  from diffusion_jax.train.compile import held
  from diffusion_jax.train.optimizer import OptimizerConfig, make_optimizer
  from diffusion_jax.train.state import abstract_state
  from diffusion_jax.train.step import make_step

  fsdp, tensor, spatial = sizes
  mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor, spatial=spatial))
  task, network = make_task(args.model, args.remat)
  # The devices stand for chips, which do not have the CPU's fused optimizer.
  optimizer = make_optimizer(OptimizerConfig(), network.shapes, 10, 'gpu')
  state = abstract_state(task, optimizer, True, mesh)
  result = {
    'parameters': sum(leaf.size for leaf in network.shapes.values()),
    'parameter_bytes': held(state.params), 'adam_bytes': held(state.opt_state),
    'average_bytes': held(state.ema),
  }
  if args.shapes:
    return result
  size, batch_size = args.size or SIZES[args.model], args.batch or fsdp
  batch = abstract_batch(batch_shapes(network.config, batch_size, size), mesh)
  update = make_step(task, optimizer, state, batch_size=batch_size, ema_halflife_images=1e6)
  times = [time.perf_counter()]
  lowered = update.lower(state, {}, batch)
  times.append(time.perf_counter())
  memory = assigned(lowered, dump)
  times.append(time.perf_counter())
  return result | memory | {
    'latents': size, 'batch': batch_size, 'remat': args.remat,
    'lower_seconds': round(times[1] - times[0], 1),
    'compile_seconds': round(times[2] - times[1], 1),
  }


def main() -> None:
  args = arguments()
  with tempfile.TemporaryDirectory() as dump:
    result = report(args, prepare(args, dump), dump)
  print(json.dumps(result, indent=2))
  if args.json:
    old = json.loads(args.json.read_text()) if args.json.exists() else []
    old = [one for one in old if one['command'] != result['command']]
    args.json.write_text(json.dumps([*old, result], indent=2) + '\n')
  sys.stdout.flush()
  os._exit(0)  # The compiling thread cannot be asked to stop.


def report(args: argparse.Namespace, sizes: list[int], dump: str) -> dict:
  """The measured figures with device, versions and command."""
  import jax

  return {
    'model': args.model, 'mesh': args.mesh, **measure(args, sizes, dump),
    'device': f'{math.prod(sizes)} simulated CPU devices on {os.cpu_count()} cores',
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
    'command': ' '.join(['python', 'benchmarks/sharding_memory.py', *sys.argv[1:]]),
  }


if __name__ == '__main__':
  main()
