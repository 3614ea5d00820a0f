"""Changes of a picture by any model: wider canvases, more pixels, variations, patterns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from diffusion_jax.errors import UserError, require
from diffusion_jax.limits import Help, OneOf, Positive, Range

if TYPE_CHECKING:
  import numpy as np


@dataclasses.dataclass(frozen=True)
class EditOptions:
  """What is done with --image, and to the edges of what is drawn."""

  outpaint: Annotated[str, Help(
    'with --image: pixels to paint around it, such as 16,0,16,0; --size is then that of the whole',
    'LEFT,TOP,RIGHT,BOTTOM'
  )] = ''
  feather: Annotated[Annotated[int, Range(0)] | None, Help(
    'with --mask or --outpaint: pixels inside the mask over which what is painted fades in '
    '(default: 0); all others come back as they are', 'N'
  )] = None
  enlarge: Annotated[Annotated[int, Range(2)] | None, Help(
    'with --image, for any model: draw a picture N times as large whose averages over squares of N '
    'pixels are the pixels of the image', 'N'
  )] = None
  variations: Annotated[Positive | None, Help(
    'with --image or --reference: how many pictures to draw of it, for each prompt or without one',
    'N'
  )] = None
  tiling: Annotated[str, OneOf('diffusion_jax.models.network:TILING'), Help(
    'of a U-Net: x, y or both: axes along which the picture continues beyond its opposite edge',
    'AXES'
  )] = 'none'

  def __post_init__(self):
    if self.outpaint:
      self._margins()
    require(
      not (self.outpaint and self.enlarge),
      '--outpaint and --enlarge are both given; leave one out.',
    )

  def check(self, files: Mapping[str, str], refiner: str = '') -> None:
    """Raise UserError for what does not go with the pictures of these names, or with a refiner."""
    for name, needed in (('outpaint', ('image',)), ('enlarge', ('image',)),
                         ('variations', ('image', 'reference'))):
      if getattr(self, name) and not files.keys() & set(needed):
        raise UserError(f'--{name} needs a picture; give --{" or --".join(needed)} FILE, too.')
    require(
      self.feather is None or 'mask' in files or bool(self.outpaint),
      '--feather is of a mask; give --mask FILE or --outpaint, too.',
    )
    require('mask' not in files or 'image' in files, '--mask is of a picture; give --image, too.')
    more = sorted(files.keys() - ({'image', 'mask'} if self.outpaint else {'image'}))
    if (self.outpaint or self.enlarge) and more:
      own = '--outpaint' if self.outpaint else '--enlarge'
      raise UserError(f'{own} does not go with --{more[0]}; leave one out.')
    kept = bool(self.outpaint or self.enlarge or 'mask' in files)
    require(
      not (refiner and kept),
      '--refiner goes on without the picture that is kept; leave it out, or --mask, --outpaint and '
      '--enlarge.',
    )

  def check_model(
    self, model, files: Mapping[str, str], resample: int, height: int, width: int
  ) -> None:
    """Raise UserError for what does not fit a model that draws height x width pixels."""
    import numpy as np

    from diffusion_jax.pipelines.inputs import Inputs
    from diffusion_jax.pipelines.tiling import tiled

    cascade = bool(model.stages)
    require(
      not (cascade and (files or self.tiling != 'none')),
      'a cascade draws from prompts alone; leave pictures and --tiling out.',
    )
    tiled(model, self.tiling)
    self.within(height, width)
    masked = self.outpaint or 'mask' in files
    Inputs(
      images=np.zeros((1, height, width, 3), np.uint8) if 'image' in files else None,
      masks=np.ones((1, height, width), bool) if masked else None, low_pass=self.enlarge or 0,
    ).check_kept(model, height, width, resample)

  def canvas(self, height: int, width: int) -> tuple[int, int]:
    """Return the size that is drawn for a picture of height x width pixels."""
    left, top, right, bottom = self._margins()
    times = self.enlarge or 1
    return height * times + top + bottom, width * times + left + right

  def within(self, height: int, width: int) -> tuple[int, int]:
    """Invert `canvas`; UserError where that leaves no picture."""
    left, top, right, bottom = self._margins()
    times = self.enlarge or 1
    if height % times or width % times:
      raise UserError(
        f'{height}x{width} pixels are no {times} times as many; choose another --enlarge or --size.'
      )
    size = height // times - top - bottom, width // times - left - right
    require(
      min(size) > 0,
      f'--outpaint {self.outpaint} leaves nothing of {height}x{width} pixels for the picture; '
      'choose a larger --size, or smaller margins.',
    )
    return size

  def changed(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return arguments of `Inputs` of those of pictures as they were read."""
    from diffusion_jax.pipelines.known import enlarged, outpainted

    out = dict(arrays)
    if self.outpaint:
      out |= outpainted(out['images'], self._margins(), out.get('masks'))
    if self.enlarge:
      out |= {'images': enlarged(out['images'], self.enlarge), 'low_pass': self.enlarge}
    return out | ({'feather': self.feather or 0} if 'masks' in out else {})

  def prompts(self, read) -> list[str]:
    """Return `read()`, each as often as there are variations, of no prompt where there are none.

    read: `PromptOptions.read`.
    """
    if not self.variations:
      return read()
    return [prompt for prompt in read(needed=False) or [''] for _ in range(self.variations)]

  def given(self) -> list[str]:
    """Return the names of what was given."""
    return [field.name for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default]

  def named(self) -> dict[str, str]:
    """Return what a picture's metadata say of it."""
    names = ('outpaint', 'feather', 'enlarge', 'tiling')
    given = {name: getattr(self, name) for name in names}
    return {name: str(value) for name, value in given.items() if value not in (None, '', 'none')}

  def _margins(self):
    from diffusion_jax.pipelines.known import parse_margins

    return parse_margins(self.outpaint) if self.outpaint else (0, 0, 0, 0)
