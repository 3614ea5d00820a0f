"""Models out of run directories, ready to draw and to be scored."""

from collections.abc import Callable

import jax

from diffusion_jax.build import build_task, open_sources
from diffusion_jax.errors import UserError
from diffusion_jax.io.run_directory import RunDirectory
from diffusion_jax.io.trained import run_weights
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.parallel.sharding import put_params, to_host
from diffusion_jax.pipelines.text_to_image import SampleConfig, TextToImage
from diffusion_jax.recipe import LATENT, parse
from diffusion_jax.train.tasks.task import Scores
from diffusion_jax.types import Weights


def _trained(workdir: str):
  """(config, task, parameters, mesh) of a run that has saved at least once."""
  directory = RunDirectory(workdir)
  config = parse(directory.read_json('config.json'))
  if not directory.checkpoints.is_dir():
    raise UserError(f'{workdir} has no checkpoint yet; train longer, or give another workdir.')
  train, test = open_sources(config)
  mesh = make_mesh(MeshConfig())
  task = build_task(config, train, test, directory, mesh)
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  return config, task, run_weights(workdir, shapes, mesh), mesh


def load_trained(workdir: str) -> tuple[TextToImage, Weights, SampleConfig]:
  """The text-to-image model of a run's last checkpoint, averaged weights where there are some.

  Raises:
    UserError: no such run, no checkpoint, another task, or something that cannot be read.
  """
  config, task, params, _ = _trained(workdir)
  if config.task not in LATENT:
    raise UserError(f'{workdir} trains {config.task}; give the workdir of a diffusion run.')
  weights = task.weights(to_host(params), task.frozen)
  return task.model, weights, config.settings.sample


def load_evaluator(workdir: str) -> Callable[[int], Scores]:
  """A function of the number of samples that scores a run's last checkpoint on the test split."""
  _, task, params, mesh = _trained(workdir)
  frozen = {role: put_params(values, mesh) for role, values in task.frozen.items()}
  return lambda samples: task.evaluate(params, frozen, mesh, samples=samples, final=True)
