"""What a model may be given besides prompts: images to start from or to follow, masks, controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from diffusion_jax.errors import UserError, require
from diffusion_jax.pipelines.conditioners import Spec
from diffusion_jax.pipelines.known import PAINTED, check_low_pass, painted_shares

OPTIONS = {
  'images': '--image', 'masks': '--mask', 'control': '--control', 'depth': '--depth',
  'small': '--small', 'reference': '--reference',
  'embedding': '--reference',
}
"""The images among `Inputs`, and how the command `sample` is given them."""
STRENGTH = 0.8
"""Fraction of the steps that starting from an image takes, if nothing else is said."""


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Arrays of one image for each prompt, or of one for all.

  images: uint8 [n H W 3]: what to start from (Meng et al. 2022, SDEdit), to repaint or to edit.
  strength: fraction of the steps in (0, 1] that starting from an image takes; None: 1 for a model
  that is conditioned on the image itself, with masks or low_pass, else STRENGTH.
  masks: bool [n H W], true where is painted; the other pixels come back as they are.
  feather: pixels inside a mask over which what is painted fades in; None: 0, and of an inpainting
  model the whole image as it draws it.
  low_pass: edge in pixels of the squares whose averages in the images are kept, 0 for none: to
  enlarge a picture by any model, which each of its pixels is repeated for.
  control: uint8 [n H W 3], what a ControlNet sees, with control_strength.
  depth: float32 [n h w] in [-1, 1], near is 1, at the size of z.
  small: uint8 [n h w 3], to enlarge, at the size of z, with noise_level in [0, 350].
  latents: float32 [n h w c], z as another model has left it at `denoising_start`, to go on from.
  reference: uint8 [n s s 3], to vary, at the size of the model's image encoder.
  embedding: float32 [n p], the encoder's of a reference, in its place.
  small_noise: float32 [n h w 3], what the small image is noised with; None: noise of the seed.
  classes: names of what a classifier guides to; () for those that the prompts name.
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
  embedding: np.ndarray | None = None
  latents: np.ndarray | None = None
  feather: int | None = None
  low_pass: int = 0
  classes: tuple[str, ...] = ()

  def check_start(self, denoising_start: float) -> None:
    """Raise UserError unless there are latents where a model goes on from some, and only there."""
    if (self.latents is None) != (denoising_start == 0):
      raise UserError(
        f'denoising_start is {denoising_start:g}, but '
        + ('there are no latents to go on from; give Inputs(latents=...), or set it to 0.'
           if self.latents is None else 'there are latents; set it to where they were left.')
      )
    if self.latents is not None and self.images is not None:
      raise UserError('there are both latents and images to start from; leave one out.')

  def check(self, model, config, height: int, width: int) -> None:
    """Raise UserError for what contradicts itself or these settings of sampling."""
    self.check_start(config.denoising_start)
    self.check_kept(model, height, width, config.resample)

  def check_kept(self, model, height: int, width: int, resample: int = 1) -> None:
    """Raise UserError for masks and averages that say nothing, or that contradict each other."""
    if self.images is None:
      for name, option in (('masks', '--mask'), ('low_pass', '--enlarge')):
        kept = getattr(self, name)
        require(
          kept is None or not np.any(kept), f'{name} ({option}) is of a picture; give --image, too.'
        )
    require(
      self.masks is None or not self.low_pass,
      'masks and low_pass (--enlarge) are both given; leave one out.',
    )
    if self.feather is not None:
      require(self.feather >= 0, f'feather is {self.feather}; give a number of pixels, 0 for none.')
      require(self.masks is not None or not self.feather, 'feather needs a mask; leave it out.')
    if self.low_pass:
      check_low_pass(model.space, self.low_pass, height, width)
    if resample > 1 and not self.holds(model.inputs(height, width)):
      raise UserError(
        f'resample is {resample}, but no part of a picture is held while sampling; give --mask, '
        '--outpaint or --enlarge with a model that has no input of its own for it, or leave it out.'
      )

  def holds(self, needs: Mapping[str, Spec]) -> bool:
    """Return whether sampling holds part of `images` for a model with these inputs."""
    return bool(self.low_pass) or (self.masks is not None and 'masks' not in needs)

  @property
  def empty(self) -> bool:
    """True where there are neither images nor latents."""
    return all(getattr(self, name) is None for name in ('latents', *OPTIONS))

  def fraction(self, model) -> float:
    """Return the fraction of the steps that are taken."""
    if self.strength is not None:
      return self.strength
    needs = model.inputs(*model.trained_size)
    if self.images is None or 'images' in needs or self.holds(needs):
      return 1.0
    return next((c.strength for c in model.conditioners.values() if c.strength), STRENGTH)

  def rows(self, model, n: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Return columns [n ...] for the compiled program; UserError where they do not fit the model.
    """
    needs = model.inputs(height, width)
    if self.embedding is not None and needs.pop('reference', None):
      needs['embedding'] = (self.embedding.shape[1:], np.float32)
    painted = self.holds(needs) and self.masks is not None and self.masks.all()
    if painted and self.fraction(model) == 1:
      # Nothing is known: the very program without a picture, to the bit.
      images = self.images if 'images' in needs else None
      plain = dataclasses.replace(self, images=images, masks=None, feather=None)
      return plain.rows(model, n, height, width)
    given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
    for name in sorted(needs.keys() - given.keys()):
      raise UserError(
        f'the model needs {name} beside the prompts; give {OPTIONS[name]}, in code '
        f'Inputs({name}=...).'
      )
    for name in given.keys() - needs.keys() - {'images', 'masks'}:
      raise UserError(
        f'the model takes no {name}; leave {OPTIONS[name]} out, or use a model that does.'
      )
    if self.latents is not None:
      given['latents'] = self.latents
    specs = {
      'images': ((height, width, 3), np.uint8),
      'masks': ((height, width), np.bool_),
      'latents': (model.space.shape(height, width), np.float32),
    } | needs
    self.check_kept(model, height, width)
    out = {name: _fitting(name, value, *specs[name], n) for name, value in given.items()}
    started = 'images' not in needs or self.holds(needs) or self.fraction(model) < 1
    if 'images' in out and started:
      out['start'] = out['images']
    if 'masks' in out and ('masks' not in needs or self.feather is not None):
      shares = painted_shares(self.masks, self.feather or 0)
      out[PAINTED] = np.broadcast_to(shares, out['masks'].shape)
    if 'masks' not in needs:
      out.pop('masks', None)
    if 'small' in given and self.small_noise is not None:
      out['small_noise'] = _fitting(
        'small_noise', self.small_noise, specs['small'][0], np.float32, n
      )
    return out


def _fitting(
  name: str, value: np.ndarray, shape: tuple[int, ...], dtype: type, n: int
) -> np.ndarray:
  if value.dtype != dtype or value.shape[1:] != shape or len(value) not in (1, n):
    raise UserError(
      f'{name} are {value.dtype} {list(value.shape)}; give {np.dtype(dtype)} [1 or {n}, '
      f'{", ".join(map(str, shape))}].'
    )
  return np.broadcast_to(value, (n, *shape))
