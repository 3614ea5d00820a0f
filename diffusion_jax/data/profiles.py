"""Colours as a picture's embedded ICC profile means them, as sRGB."""

import functools
import io

from PIL import Image, ImageCms

MOST_BYTES = 2**22
"""Of a profile; those of printers have half a megabyte."""
_SPACES = {'RGB': 'RGB', 'L': 'GRAY', 'CMYK': 'CMYK'}
"""Mode of an image -> colour space of a profile that can be of it."""
_KEPT = 16
"""Transforms that are kept: pictures of a set have few different profiles."""


def to_srgb(image: Image.Image) -> Image.Image:
  """The image with its colours in sRGB, RGB or RGBA if it has a profile of another space, by
  perceptual intent; otherwise, or where its profile is damaged or of other modes, as it is."""
  profile = image.info.get('icc_profile')
  if not isinstance(profile, bytes) or len(profile) > MOST_BYTES:
    return image
  plain, alpha = image, None
  if image.mode in ('P', 'PA') or 'transparency' in image.info:
    wide = 'transparency' in image.info or image.mode == 'PA'
    plain = image.convert(('LA' if image.mode == 'L' else 'RGBA') if wide else 'RGB')
  elif image.mode == '1':
    plain = image.convert('L')
  if plain.mode in ('LA', 'RGBA'):
    alpha, plain = plain.getchannel('A'), plain.convert(plain.mode[:-1])
  transform = _transform(profile, plain.mode) if plain.mode in _SPACES else None
  if transform is None:
    return image
  found = ImageCms.applyTransform(plain, transform)
  if alpha is not None:
    found.putalpha(alpha)
  found.info.clear()
  return found


@functools.lru_cache(_KEPT)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
  """None where nothing is to be done, or nothing can be."""
  try:
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    name = ImageCms.getProfileDescription(opened)
    if space != _SPACES[mode] or (mode == 'RGB' and 'srgb' in name.lower()):
      return None
    return ImageCms.buildTransform(opened, ImageCms.createProfile('sRGB'), mode, 'RGB')
  except (ImageCms.PyCMSError, OSError, ValueError, AttributeError):
    return None
