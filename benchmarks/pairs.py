"""Memory of CLIP's loss and its gradients over all pairs of a batch: the matrix, chunks, the ring.

By XLA's own account of what the compiled program holds beyond its arguments, on each of 1 and 8
simulated devices; nothing is run.

  python -m benchmarks.pairs
"""

import argparse
import json
import os
import sys
from pathlib import Path

DEVICES = 8
os.environ.setdefault('XLA_FLAGS', f'--xla_force_host_platform_device_count={DEVICES}')

import jax  # noqa: E402 - It reads the number of devices when it is imported.
import jax.numpy as jnp  # noqa: E402

from benchmarks.command import run_command  # noqa: E402
from diffusion_jax.files import atomic_write  # noqa: E402
from diffusion_jax.models.text.clip import unit  # noqa: E402
from diffusion_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh  # noqa: E402
from diffusion_jax.train.contrastive import contrastive_loss  # noqa: E402

DESCRIPTION = __doc__
FILE = Path(__file__).with_suffix('.json')
PAIRS, WIDTH = 8192, 128


def of_matrix(images: jax.Array, texts: jax.Array, logit_scale: jax.Array) -> jax.Array:
  """Return the mean loss by the matrix of all logits."""
  logits = jnp.exp(logit_scale) * unit(images) @ unit(texts).T
  rows, columns = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
  return ((rows + columns) / 2 - jnp.diagonal(logits)).mean()


def of_chunks(chunk: int):
  """Return the package's loss with texts in chunks of that many."""
  return lambda *arguments: contrastive_loss(*arguments, chunk=chunk)[0].mean()


def megabytes(loss, devices: int) -> float:
  """Return what a device holds beyond the arguments of loss and gradients."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
  shape = PAIRS, WIDTH
  pairs = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(shape, mesh))
  with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    compiled = step.lower(pairs, pairs, jax.ShapeDtypeStruct((), jnp.float32)).compile()
  return round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """There are none."""


def run(args: argparse.Namespace) -> int:
  """Measure, write and print."""
  del args
  losses = {'matrix': of_matrix, 'chunks of 1024': of_chunks(1024), 'chunks of 256': of_chunks(256)}
  found = {
    'command': 'python -m benchmarks.pairs', 'pairs': PAIRS, 'width': WIDTH,
    'megabytes_a_device': {
      name: {str(devices): megabytes(loss, devices) for devices in (1, DEVICES)}
      for name, loss in losses.items()
    },
  }
  text = json.dumps(found, indent=1)
  with atomic_write(FILE) as file:
    file.write((text + '\n').encode())
  print(text)
  return 0


if __name__ == '__main__':
  raise SystemExit(run_command('benchmarks.pairs', sys.modules[__name__]))
