"""The published weights of the FID Inception network; nothing is downloaded.

`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid and torch-fidelity's
`weights-inception-2015-12-05-6726825d.pth`, the same 566 tensors, or any file of tensors of these
names: safetensors, or a TorchScript archive.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.formats.networks import resolve
from diffusion_jax.formats.published import from_published_layout, match
from diffusion_jax.formats.tensors import PICKLES, open_tensors
from diffusion_jax.formats.torch_files import read_state
from diffusion_jax.models.features.inception import Inception, InceptionConfig
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import put_params
from diffusion_jax.types import Params

EPSILON = 1e-3
"""Epsilon of the batch norms."""
_NORM = ('bn.scale', 'bn.bias', 'bn.running_mean', 'bn.running_var')


def load_inception(
  path: str | os.PathLike, config: InceptionConfig | None = None, *, mesh: Mesh | None = None
) -> tuple[Network, Params]:
  """(network, parameters), batch norms folded into the convolutions.

  path: .pth or .pt (the first only where PyTorch is installed), or .safetensors. mesh: of the
  parameters; None for the host. UserError: an unreadable file, or a missing, extra or misshapen
  tensor.
  """
  network = Network.of(Inception, InceptionConfig() if config is None else config)
  path = resolve(path)
  tensors = read_state(path) if path.suffix in PICKLES else open_tensors(path)
  params = fold(tensors, network.shapes, str(path))
  return network, params if mesh is None else put_params(params, mesh)


def fold(tensors: Mapping[str, Any], shapes: Params, where: str) -> dict[str, np.ndarray]:
  """Published tensors as float32 parameters of `shapes`, as `match`.

  A convolution with the norm (y - mean) / sqrt(var + 1e-3) * scale + bias is a convolution.
  num_batches_tracked is left out.
  """
  tensors = {n: value for n, value in tensors.items() if not n.endswith('.num_batches_tracked')}
  found = match(tensors, _published(shapes), where)
  read = lambda name: from_published_layout(name, found[name]).astype(np.float64)
  params = {name: read(name) for name in shapes if name in found}
  for module in (name.removesuffix('.kernel') for name in shapes if name.endswith('.kernel')):
    if f'{module}.kernel' in found:
      continue
    scale, bias, mean, variance = (read(f'{module}.{name}') for name in _NORM)
    gain = scale / np.sqrt(variance + EPSILON)
    params[f'{module}.kernel'] = read(f'{module}.conv.kernel') * gain
    params[f'{module}.bias'] = bias - mean * gain
  return {name: np.ascontiguousarray(params[name], np.float32) for name in shapes}


def _published(shapes: Params) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes before folding: a kernel alone, or with the four vectors of a norm."""
  out = {}
  for name, leaf in shapes.items():
    module, _, end = name.rpartition('.')
    if len(shapes[f'{module}.kernel'].shape) == 2:
      out[name] = leaf
    elif end == 'kernel':
      out[f'{module}.conv.kernel'] = leaf
    else:
      out |= {f'{module}.{norm}': leaf for norm in _NORM}
  return out
