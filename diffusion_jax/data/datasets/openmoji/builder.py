"""TFDS builder of OpenMoji in ArrayRecord files; needs no TensorFlow."""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from diffusion_jax.data.datasets.openmoji import render
from diffusion_jax.data.datasets.openmoji.alike import twins
from diffusion_jax.data.datasets.openmoji.captions import captions_of, make_unique
from diffusion_jax.data.datasets.openmoji.glyphs import GROUPS_OF_PEOPLE, Glyph, glyph
from diffusion_jax.data.datasets.openmoji.split import assign

SIZES = (32, 64, 128)

_DESCRIPTION = """
Colour emoji of the OpenMoji project (https://openmoji.org), rendered on white, each with several
English captions. The test split holds professions and activities in skin tones that training never
shows them in, and concepts that training never shows at all.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). The images are rendered from OpenMoji's SVG
files and remain under that licence. Names come from the Unicode CLDR through the emoji package.
"""

_CITATION = """
@misc{openmoji,
  title  = {OpenMoji: the open-source emoji and icon project},
  author = {{OpenMoji}},
  note   = {All emojis designed by OpenMoji. License: CC BY-SA 4.0},
  url    = {https://openmoji.org},
}
"""


class Openmoji(tfds.core.GeneratorBasedBuilder):
  """OpenMoji at 32, 64 or 128 pixels.

  Features of a record: image uint8 [size, size, 3]; captions, the canonical one first; id, the
  hexcode; group, one of 'flag', 'people', 'person', 'body', 'other'.
  """

  VERSION = tfds.core.Version('1.0.1')
  # TFDS would find this with importlib_resources, which it does not install.
  code_path = epath.Path(__file__)
  BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads this name)
    tfds.core.BuilderConfig(name=str(size), description=f'{size} x {size} pixels') for size in SIZES
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    size = int(self.builder_config.name)
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(size, size, 3), encoding_format='png'),
          'captions': tfds.features.Sequence(tfds.features.Text()),
          'id': tfds.features.Text(),
          'group': tfds.features.Text(),
        }
      ),
      homepage='https://openmoji.org',
      citation=_CITATION,
      license='CC BY-SA 4.0',
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # Everything is in the installed packages.
    records = records_at(int(self.builder_config.name))
    return {split: self._generate_examples(records, split) for split in ('train', 'test')}

  def _generate_examples(self, records: list[tuple[str, dict]], split: str) -> Iterator:
    for where, record in records:
      if where == split:
        yield record['id'], {**record, 'image': io.BytesIO(record['image'])}


def records_at(size: int) -> list[tuple[str, dict]]:
  """(split, record) of every distinct emoji that has a name; images as PNG bytes."""
  render.require_packages()
  named = [(glyph(hexcode), path) for hexcode, path in render.drawings()]
  named = [(one, path) for one, path in named if one is not None]
  bar = tqdm(named, desc=f'openmoji at {size} px', unit=' emoji')
  images, thumbnails = zip(*(render.render(path, size) for _, path in bar), strict=True)
  glyphs = [one for one, _ in named]
  kept = twins(glyphs, np.stack(thumbnails))
  texts = make_unique([_all_captions(glyphs, i, others) for i, others in kept.items()])
  splits = assign([glyphs[i] for i in kept])
  records = []
  for i, text, where in zip(kept, texts, splits, strict=True):
    one = glyphs[i]
    record = {'image': images[i], 'captions': text, 'id': one.hexcode, 'group': group(one)}
    records.append((where, record))
  return records


def group(one: Glyph) -> str:
  """A coarse kind: 'flag', 'people' (two or more), 'person', 'body' or 'other'."""
  if one.is_flag:
    return 'flag'
  if one.concept in GROUPS_OF_PEOPLE:
    return 'people'
  if one.gender or one.name.split()[0] in ('person', 'child', 'baby') or '1F9D1' in one.hexcode:
    return 'person'
  return 'body' if one.takes_tone else 'other'


def _all_captions(glyphs: list[Glyph], index: int, others: list[int]) -> list[str]:
  forms = [form for i in (index, *others) for form in captions_of(glyphs[i])]
  return list(dict.fromkeys(forms))
