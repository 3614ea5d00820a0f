"""Links in the folders of models: followed within the model, never out of it.

Who is sent a model may read, copy and publish what is in its folder. A link in it must not make
another file of the disk a part of that. The cache of the hub is made of links itself, from
models--NAME/snapshots/REVISION to models--NAME/blobs, which belong to the model.
"""

import os
from pathlib import Path

from diffusion_jax.errors import UserError

INDEX = 'model_index.json'
_ASSETS = Path(__file__).resolve().parent / 'assets'


def inside(path: Path, folder: Path) -> Path:
  """`path`, a file or folder of the model in `folder`, which may be a part of a pipeline.

  `folder` itself may be a link: whoever names it means it, but for a part of a pipeline.

  Raises:
    UserError: `path` is, or lies behind, a link that leads out of the model.
  """
  if folder.is_relative_to(_ASSETS):  # Installers may make links of the package's own files.
    return path
  root = folder.parent if (folder.parent / INDEX).is_file() else folder
  found = Path(os.path.realpath(path))
  if not any(found.is_relative_to(place) for place in _places(root)):
    raise UserError(
      f'{path} is a link that leads out of its model, to {found}; put the file itself there, or '
      'leave it out.'
    )
  return path


def check_folder(folder: Path) -> None:
  """UserError, before a model's folder is copied, for what in it is not to be copied.

  That is a link out of the model, a link to a folder, by which a copy may have no end, and what is
  neither a file nor a folder.
  """
  for place, folders, files in os.walk(folder):
    for name in (*folders, *files):
      path = inside(Path(place, name), folder)
      if path.is_symlink() and path.is_dir():
        raise UserError(f'{path} is a link to a folder; put the folder itself there.')
      if not path.is_file() and not path.is_dir():
        raise UserError(f'{path} is neither a file nor a folder; leave it out.')


def _places(root: Path) -> list[Path]:
  """What a model's links may lead to."""
  real = Path(os.path.realpath(root))
  blobs = [
    above.parent / 'blobs' for above in real.parents
    if above.name == 'snapshots' and above.parent.name.startswith('models--')
  ]
  return [real, *(Path(os.path.realpath(place)) for place in blobs)]
