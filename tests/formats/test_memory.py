"""Weights go tensor by tensor: memory that is no file's stays within a tensor of the arrays'."""

import json
import subprocess
import sys

import numpy as np

from diffusion_jax.formats.networks import save_params
from diffusion_jax.models import network
from diffusion_jax.models.mlp import MLP, MLPConfig
from tests.tiny import ROOT

MB = 2**20
# Six matrices of 16 MB: all of them at once would be far beyond one and the margin.
CONFIG = MLPConfig(width=2048, depth=3)
LARGEST, MARGIN = 16 * MB, 12 * MB

SCRIPT = """
import json, sys
import jax
from flax import nnx
from benchmarks.peak_memory import PeakMemory
from diffusion_jax.formats import convert, networks
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

path, to = sys.argv[1:]
mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
networks.load('mlp', path + '/tiny', mesh=mesh)  # Compiles and imports what there is to.
with PeakMemory() as peak:
  model = networks.load('mlp', path + '/large', mesh=mesh)
arrays = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
loading = peak.bytes - arrays
with PeakMemory() as peak:
  convert.convert(path + '/large', to, 'native', dtype='float16')
print(json.dumps({'arrays': arrays, 'loading': loading, 'converting': peak.bytes}))
"""


def test_loading_and_converting_hold_one_tensor_at_a_time(tmp_path):
  for name, config in (('large', CONFIG), ('tiny', MLPConfig(width=8))):
    shapes = network.abstract(lambda rngs, c=config: MLP(c, rngs=rngs))[1]
    arrays = {k: np.full(leaf.shape, 0.5, np.float32) for k, leaf in shapes.items()}
    save_params(tmp_path / name, config, arrays)
  run = subprocess.run(
    [sys.executable, '-c', SCRIPT, tmp_path, tmp_path / 'native'], cwd=ROOT, check=True,
    capture_output=True, text=True,
  )
  found = json.loads(run.stdout.splitlines()[-1])
  assert found['arrays'] > 6 * LARGEST
  assert found['loading'] < LARGEST + MARGIN
  assert found['converting'] < LARGEST + MARGIN
