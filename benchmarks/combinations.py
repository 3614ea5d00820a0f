"""Judge pictures of combinations that training never shows, such as 'man farmer light skin tone'.

The held-out test has professions and activities in the one skin tone that they do not have in
training. The judge is made of training pictures alone. Who is shown is told by a Gaussian for each
figure, with a mean and a variance at every pixel over the tones in training, so that what differs
by tone counts little. The tone is told where that figure's training pictures have the colours of
skin: it is that which most of these pixels are nearest to. What the judge makes of the real test
pictures is given beside.

  python -m benchmarks.combinations --model asset:text-to-image-openmoji-64
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from benchmarks.command import run_command
from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.files import atomic_write
from diffusion_jax.session import Session

DESCRIPTION = __doc__
SKIN = {
  'light': (250, 220, 188), 'medium-light': (222, 187, 144), 'medium': (193, 154, 101),
  'medium-dark': (165, 121, 57), 'dark': (106, 70, 47),
}
"""OpenMoji's colours of skin, red, green and blue."""
NEAR = 40
"""Distance in colour within which a training picture has its tone at a pixel."""
BLUR, DEVIATION = 1.0, 25.0
"""Pixels of blur before figures are compared; the least deviation of a pixel, in levels."""
_CAPTION = re.compile(r'(.+?) (light|medium-light|medium|medium-dark|dark) skin tone')


class Combination(NamedTuple):
  """who: name without tone, such as 'man farmer'. tone: a key of SKIN."""

  who: str
  tone: str


def combination(caption: str) -> Combination | None:
  """Return what a caption of one person in one tone names; None for another caption."""
  found = _CAPTION.fullmatch(caption)
  return Combination(*found.groups()) if found else None


def tone_of(pixels: np.ndarray) -> str:
  """Return the tone that most pixels, uint8 [n 3], are nearest to."""
  away = np.linalg.norm(pixels[:, None].astype(float) - np.array([*SKIN.values()]), axis=-1)
  return [*SKIN][np.bincount(away.argmin(axis=-1), minlength=len(SKIN)).argmax()]


def blurred(pictures: np.ndarray) -> np.ndarray:
  """Return pictures, uint8 [n h w 3], slightly blurred, as float32 rows [n h*w*3]."""
  soft = ndimage.gaussian_filter(pictures.astype(np.float32), (0, BLUR, BLUR, 0))
  return soft.reshape(len(pictures), -1)


class Judge:
  """A Gaussian and the places of skin for each figure of training pictures."""

  def __init__(self, pictures: np.ndarray, shown: list[Combination]):
    rows: dict[str, list[int]] = {}
    for i, one in enumerate(shown):
      rows.setdefault(one.who, []).append(i)
    self.names, soft = [*rows], blurred(pictures)
    self.means = np.stack([soft[own].mean(axis=0) for own in rows.values()])
    self.variances = np.stack([soft[own].var(axis=0) for own in rows.values()]) + DEVIATION**2
    colours = np.stack([np.array(SKIN[one.tone]) for one in shown])[:, None, None]
    near = np.linalg.norm(pictures - colours, axis=-1) < NEAR
    share = [near[own].mean(axis=0) for own in rows.values()]
    self.skin = np.stack([one >= max(0.6 * one.max(), 0.1) for one in share])

  def _who(self, row: np.ndarray) -> int:
    """Return the number of the most likely figure of a blurred picture [h*w*3]."""
    terms = (row - self.means) ** 2 / self.variances + np.log(self.variances)
    return int(terms.sum(axis=-1).argmin())

  def __call__(self, pictures: np.ndarray) -> list[Combination]:
    """Return what is told of pictures, uint8 [n h w 3]."""
    found = [self._who(row) for row in blurred(pictures)]
    return [
      Combination(self.names[who], tone_of(image[self.skin[who]]))
      for who, image in zip(found, pictures, strict=True)
    ]


def read(size: int = 64) -> dict[str, tuple[np.ndarray, list[Combination]]]:
  """Return pictures and what they show, of training and of the unseen combinations in the test."""
  found = {}
  for name, split in zip(('train', 'test'), open_data(DataConfig('openmoji', size)), strict=True):
    records = map(split.__getitem__, range(len(split)))
    named = [(record['image'], combination(record['captions'][0])) for record in records]
    kept = [(image, one) for image, one in named if one]
    found[name] = np.stack([image for image, _ in kept]), [one for _, one in kept]
  seen = {one.who for one in found['train'][1]}
  pictures, shown = found['test']
  rows = [i for i, one in enumerate(shown) if one.who in seen]
  return found | {'test': (pictures[rows], [shown[i] for i in rows])}


def shares(told: list[Combination], shown: list[Combination]) -> dict[str, float]:
  """Return the shares that are right: of both, of who, and of the tone."""
  pairs = [*zip(told, shown, strict=True)]
  share = lambda right: round(float(np.mean([right(*pair) for pair in pairs])), 4)
  return {
    'right': share(lambda a, b: a == b), 'who': share(lambda a, b: a.who == b.who),
    'tone': share(lambda a, b: a.tone == b.tone),
  }


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Which model draws, and where the shares go."""
  parser.add_argument('--model', required=True, help='a directory, or a name of the package')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=Path, help='file for the shares (.json)')


def run(args: argparse.Namespace) -> int:
  """Draw the unseen combinations and judge them and the real ones."""
  data = read()
  judge, (real, shown) = Judge(*data['train']), data['test']
  prompts = [f'{one.who} {one.tone} skin tone' for one in shown]
  session = Session.open(model=args.model)
  drawn = np.stack([image for image, _ in session.sample(prompts, seed=args.seed, batch=32)])
  report = {
    'model': args.model, 'seed': args.seed, 'pictures': len(shown),
    'drawn': shares(judge(drawn), shown), 'real': shares(judge(real), shown),
  }
  print(json.dumps(report, indent=1))
  if args.out:
    with atomic_write(args.out) as file:
      file.write((json.dumps(report, indent=1) + '\n').encode())
  return 0


if __name__ == '__main__':
  raise SystemExit(run_command('benchmarks.combinations', sys.modules[__name__]))
