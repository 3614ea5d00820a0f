"""How torch-fidelity, pytorch-fid and clean-fid scale and shift images: by a loop, PyTorch, PIL."""

import numpy as np
import torch
from PIL import Image


def tensorflow(images, height, width):
  """Pixel i lies at i * old / new; each of the two nearest counts by the distance of the other."""
  x = images.astype(np.float64)
  for axis, new in ((1, height), (2, width)):
    old, rows = x.shape[axis], []
    for i in range(new):
      place = float(np.float32(i) * np.float32(old / new))
      low = int(place)
      first, second = (np.take(x, min(n, old - 1), axis) for n in (low, low + 1))
      rows.append(first + (second - first) * (place - low))
    x = np.stack(rows, axis)
  return x


def pytorch(images, height, width):
  x = torch.tensor(images).permute(0, 3, 1, 2).float()
  x = torch.nn.functional.interpolate(x, (height, width), mode='bilinear', align_corners=False)
  return x.permute(0, 2, 3, 1).numpy()


def clean(images, height, width):
  """Every channel as a picture of floats."""
  one = lambda plane: np.asarray(
    Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.BICUBIC)
  ).clip(0, 255)
  return np.stack([
    np.stack([one(image[..., c]) for c in range(image.shape[-1])], -1) for image in images
  ])


def pillow(images, height, width):
  """As whole pictures of uint8, their widths first: Pillow 13 has another order for tall ones."""
  wide = lambda image: Image.fromarray(image).resize((width, len(image)), Image.BICUBIC)
  return np.stack([
    np.asarray(wide(image).resize((width, height), Image.BICUBIC)) for image in images
  ])


def feed(name, images):
  """What each tool's Inception sees of uint8 images: a tensor [b 3 299 299]."""
  x = globals()[name](images, 299, 299)
  x = 2 * (x / 255) - 1 if name == 'pytorch' else (x - 128) / 128
  return torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)
