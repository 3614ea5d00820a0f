"""Records what torch-fidelity's TensorFlow 1 resizing gives, as resize.npz beside this file.

Run where torch-fidelity is installed; resize.npz was made with 0.4.0, torch 2.13.0, Python 3.11.
Of the 299 x 299 results every 13th row and column is kept. The images are drawn again by a test.

python tests/evaluation/golden/record_resize.py
"""

import importlib.util
from pathlib import Path

import numpy as np

SIZES, OUT, EVERY = ((32, 32), (256, 100), (640, 480), (299, 301)), 299, 13


def draw(size: tuple[int, int]) -> np.ndarray:
  """uint8 [1 h w 3]: noise, the hardest to resize."""
  return np.random.default_rng(size).integers(0, 256, (1, *size, 3), np.uint8)


def record() -> dict[str, np.ndarray]:
  """Size -> float32 [23 23 3]. The package's one file is run without the rest of it."""
  import torch

  place = importlib.util.find_spec('torch_fidelity').submodule_search_locations[0]
  file = Path(place) / 'interpolate_compat_tensorflow.py'
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  found = {}
  for size in SIZES:
    resized = module.interpolate_bilinear_2d_like_tensorflow1x(
      torch.tensor(draw(size)).permute(0, 3, 1, 2).float(), size=(OUT, OUT), align_corners=False
    )
    found['x'.join(map(str, size))] = resized[0, :, ::EVERY, ::EVERY].permute(1, 2, 0).numpy()
  return found


if __name__ == '__main__':
  np.savez_compressed(Path(__file__).with_name('resize.npz'), **record())
