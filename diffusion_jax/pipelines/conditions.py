"""What a model takes beside the prompt: images to start from or to follow, masks, controls."""

import dataclasses

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.conditioners import Editing, Spec

OPTIONS = {
  'images': '--image', 'masks': '--mask', 'control': '--control', 'depth': '--depth',
  'small': '--small', 'reference': '--reference',
}
"""The pictures among `Inputs`, and how the command `sample` is given them."""
STRENGTH = 0.8
"""Fraction of the steps that starting from a picture takes, if nothing else is said."""


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Arrays of one picture for each prompt, or of one for all.

  images: uint8 [n H W 3]: what to start from (Meng et al. 2022, SDEdit), to repaint or to edit.
  strength: fraction of the steps in (0, 1] that starting from an image takes; None: 1 for a
  model that is shown the image itself, else STRENGTH.
  masks: bool [n H W], true where an inpainting model paints.
  control: uint8 [n H W 3], what a ControlNet sees, with control_strength.
  depth: float32 [n h w] in [-1, 1], near is 1, at the size of z.
  small: uint8 [n h w 3], to enlarge, at the size of z, with noise_level in [0, 350].
  reference: uint8 [n s s 3], to vary, at the size of the model's image encoder.
  small_noise: float32 [n h w 3], what the small picture is noised with; None: noise of the seed.
  """

  images: np.ndarray | None = None
  strength: float | None = None
  masks: np.ndarray | None = None
  control: np.ndarray | None = None
  control_strength: float = 1.0
  depth: np.ndarray | None = None
  small: np.ndarray | None = None
  noise_level: int = 20
  small_noise: np.ndarray | None = None
  reference: np.ndarray | None = None

  def fraction(self, model) -> float:
    """Fraction of the steps that are taken."""
    if self.strength is not None:
      return self.strength
    shown = 'images' in picture_specs(model, *model.trained_size)
    return 1.0 if self.images is None or shown else STRENGTH

  def rows(self, model, n: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Columns [n ...] for the compiled program; UserError where they do not fit the model."""
    needs = picture_specs(model, height, width)
    given = {
      name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None
    }
    for name in sorted(needs.keys() - given.keys()):
      raise UserError(
        f'the model needs {name} beside the prompts; give {OPTIONS[name]}, in code '
        f'Inputs({name}=...).'
      )
    for name in given.keys() - needs.keys() - {'images'}:
      raise UserError(
        f'the model takes no {name}; leave {OPTIONS[name]} out, or use a model that does.'
      )
    specs = {'images': ((height, width, 3), np.uint8)} | needs
    out = {name: _fitting(name, value, *specs[name], n) for name, value in given.items()}
    if 'images' in out and ('images' not in needs or self.fraction(model) < 1):
      out['start'] = out['images']
    if 'small' in given and self.small_noise is not None:
      out['small_noise'] = _fitting('small_noise', self.small_noise, specs['small'][0],
                                    np.float32, n)
    return out


def picture_specs(model, height: int, width: int) -> dict[str, Spec]:
  """The pictures that all conditioners of a model take, with shape and type."""
  parts = [c.pictures(model.space, height, width) for c in model.conditioners.values()]
  return {name: spec for part in parts for name, spec in part.items()}


def _fitting(
  name: str, value: np.ndarray, shape: tuple[int, ...], dtype: type, n: int
) -> np.ndarray:
  if value.dtype != dtype or value.shape[1:] != shape or len(value) not in (1, n):
    raise UserError(
      f'{name} are {value.dtype} {list(value.shape)}; give {np.dtype(dtype)} [1 or {n}, '
      f'{", ".join(map(str, shape))}].'
    )
  return np.broadcast_to(value, (n, *shape))


def check_edited(model, image_guidance: float) -> None:
  """UserError for guidance by a picture in a model that edits none."""
  edits = any(isinstance(c, Editing) for c in model.conditioners.values())
  if image_guidance != 1 and not edits:
    raise UserError(
      f'image_guidance is {image_guidance:g}, but the model edits no picture; leave it at 1.'
    )
