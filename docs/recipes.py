"""Write docs/recipes.md, the recipes of the package with pictures.

  python docs/recipes.py
"""

import itertools
from pathlib import Path

from diffusion_jax.recipe import recipes, summary

PAGE = Path(__file__).with_suffix('.md')
HEAD = """# Recipes

Each runs by its name, `--config openmoji/quickstart`, in any folder; any of its keys can be changed
beside it. To edit one:

```sh
python -m diffusion_jax configs --copy openmoji/quickstart --to mine.py
python -m diffusion_jax train --config mine.py --workdir runs/mine --config.loop.total_steps=1600
```

This page is written by `python docs/recipes.py`.
"""
FOLDERS = {
  'finetune': (
    'Public weights', 'What each begins with and holds: [Start from public weights](finetuning.md).'
  ),
  'notes': (
    'Systems of the literature, small',
    'Trained on OpenMoji on two CPU cores; their scores are in the [README](../README.md).'
  ),
  'openclipart': (
    'Drawings of your own',
    'A folder of drawings, from `prepare` to scores: [Your own pictures](pictures.md).'
  ),
  'openmoji': (
    'Text to image on OpenMoji', 'The models in the package, and others on the same data.'
  ),
  'papers': (
    'Systems of the literature, as published', 'Sizes and settings of the papers, for accelerators.'
  ),
  'toy': ('Points in the plane', 'Whole methods on points, beside exact answers.'),
}
"""Folder of recipes -> title, and a sentence."""
PICTURES = {
  'openclipart': ('openclipart.png', 'Pictures for sixteen captions of drawings'),
  'openmoji': ('samples.png', 'Pictures for sixteen captions of OpenMoji'),
  'toy': ('toy.png', 'Points that toys draw, and their data'),
}
"""Folder of recipes -> a picture beside this page, and what it shows."""


def text() -> str:
  """Return the page."""
  known, parts = recipes(), [HEAD]
  for folder, found in itertools.groupby(known, lambda name: name.partition('/')[0]):
    title, sentence = FOLDERS[folder]
    parts.append(f'\n## {title}\n\n{sentence}\n')
    if folder in PICTURES:
      file, shown = PICTURES[folder]
      parts.append(f'\n![{shown}]({file})\n')
    rows = [f'| `{name}` | {summary(known[name])} |\n' for name in found]
    parts.append('\n| recipe | what it is |\n|---|---|\n' + ''.join(rows))
  return ''.join(parts)


if __name__ == '__main__':
  PAGE.write_text(text())
