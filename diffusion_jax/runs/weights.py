"""Weights alone out of a run's checkpoints, to sample, score, or train on from."""

from typing import Any

from jax.sharding import Mesh

from diffusion_jax.checkpoint.checkpoints import Checkpoints
from diffusion_jax.errors import UserError
from diffusion_jax.files import reading
from diffusion_jax.parallel.mesh import shard_params, with_shardings
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.types import Params


def run_weights(
  workdir: str, shapes: dict[str, Any], mesh: Mesh, step: int | None = None, ema: bool | None = None
) -> Params:
  """The parameters of a checkpoint on a mesh; nothing else is read, and nothing changes.

  shapes: of the parameters, by name. step: None for the newest intact checkpoint. ema: averaged;
  None: if the run has averages. UserError: no run, no or only damaged checkpoints, another model.
  """
  directory = RunDirectory(workdir)
  if ema is None:
    values = directory.read_json('config.json')
    with reading(directory.path / 'config.json', 'is not the config of a run', 'restore that file'):
      ema = values['loop']['ema_halflife_images'] > 0
  checkpoints = Checkpoints(directory.checkpoints, read_only=True)
  item, abstract = 'ema' if ema else 'params', with_shardings(shapes, shard_params(shapes, mesh))
  found = checkpoints.restore({item: abstract}, step, everything=False)
  if found is None:
    raise UserError(f'{workdir} has no checkpoint yet; train longer, or give another workdir.')
  return found[1][item]
