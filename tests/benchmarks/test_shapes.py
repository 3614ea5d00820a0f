"""The judge of colours and shapes, on the data set's own figures and on figures by rule."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks import shapes
from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources import open_data


def test_the_real_pictures_of_coloured_figures_are_judged_right():
  found = {}
  for split in open_data(DataConfig('openmoji', 64)):
    for i in range(len(split)):
      caption = split[i]['captions'][0]
      name = re.sub(r'^(large|small) | pointed up$', '', caption)
      if name in shapes.PROMPTS:
        found.setdefault(name, set()).add(shapes.judged(split[i]['image']))
  assert found == {prompt: {prompt} for prompt in shapes.PROMPTS}


def _drawn(kind, box, fill, outline=(0, 0, 0), size=64):
  image = Image.new('RGB', (size, size), 'white')
  getattr(ImageDraw.Draw(image), kind)(box, fill=fill, outline=outline, width=max(1, size // 32))
  return np.asarray(image)


@pytest.mark.parametrize(('drawn', 'judgement'), [
  (_drawn('ellipse', (10, 8, 50, 48), (234, 90, 71)), 'red circle'),
  (_drawn('ellipse', (30, 30, 120, 120), (146, 211, 245), size=128), 'blue circle'),
  (_drawn('rectangle', (12, 12, 52, 52), (177, 204, 51)), 'green square'),
  (_drawn('rectangle', (12, 12, 52, 52), (165, 121, 57)), '? square'),
  (_drawn('rectangle', (4, 28, 60, 36), (234, 90, 71)), 'red ?'),
  (_drawn('ellipse', (12, 12, 52, 52), (255, 255, 255)), '? circle'),
  (np.full((64, 64, 3), 255, np.uint8), '? ?'),
  (np.zeros((64, 64, 3), np.uint8), '? square'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_figures_by_rule(drawn, judgement):
  assert shapes.judged(drawn) == judgement


def test_noise_and_a_cross_are_no_figures():
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  assert shapes.judged(noise).split()[0] == '?'
  cross = np.full((64, 64, 3), 255, np.uint8)
  cross[28:36, 8:56] = cross[8:56, 28:36] = (234, 90, 71)
  assert shapes.judged(cross).split()[1] == '?'
