"""Pictures of a subject's class for DreamBooth, drawn by the model itself before it is trained."""

import dataclasses
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from diffusion_jax.data.finding import Left, find_files, with_suffixes
from diffusion_jax.data.sources.folder import FolderSource, open_all
from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from diffusion_jax.viz.grids import save_png

BATCH = 4
"""Pictures that are drawn at a time, so that those of 1024 pixels fit beside the weights."""


@dataclasses.dataclass(frozen=True)
class PriorConfig:
  """Prior preservation of DreamBooth (Ruiz et al. 2023, eq. 2).

  folder: pictures of the class; what is missing of `images` is drawn by the model itself, with
  `prompt`, before training. weight: of their loss. An empty folder is no prior.
  """

  folder: str = ''
  prompt: str = ''
  images: int = 200
  weight: float = 1.0

  def __post_init__(self):
    if self.folder and (not self.prompt.strip() or self.images < 1 or self.weight < 0):
      raise UserError(
        'settings.prior needs a prompt for the class, at least one image and a weight of 0 or more.'
      )


def draw_prior(task: DiffusionTask, mesh: Mesh) -> FolderSource:
  """The pictures of the class, after drawing what is missing of them.

  Every process draws the same pictures and the first writes them, so all must see the folder.
  Drawing that was stopped goes on where it was.
  """
  prior, model = task.config.prior, task.model
  folder = Path(prior.folder)
  folder.mkdir(parents=True, exist_ok=True)
  found = {str(path.relative_to(folder)) for path in _pictures(folder)}
  if len(found) < prior.images:
    _draw(task, model, mesh, folder, found)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('prior')  # All pictures are written before any is read.
  return open_all(folder, max(model.trained_size), prior.prompt)


def _pictures(folder: Path) -> list[Path]:
  return with_suffixes(find_files(folder, Left()))


def _draw(task: DiffusionTask, model: Diffusion, mesh: Mesh, folder: Path, found: set) -> None:
  prior, missing = task.config.prior, task.config.prior.images - len(found)
  free = (name for i in range(prior.images + len(found)) if (name := f'{i:05d}.png') not in found)
  params = task.start(mesh) or jax.jit(task.initialize)(jax.random.key(0))
  batches = model.generate(
    task.weights(params, task.frozen), [prior.prompt] * missing, task.config.sample, seed=1,
    first=len(found), mesh=mesh, batch_size=BATCH,
  )
  for name, image in zip(free, (image for batch in batches for image in batch), strict=False):
    if jax.process_index() == 0:
      save_png(Image.fromarray(image), folder / name, {'prompt': prior.prompt})
