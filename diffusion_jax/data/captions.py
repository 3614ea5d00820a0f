"""Which captions belong to which picture of a folder.

The text file beside a picture counts first, then the list nearest to it, then what is given for
all.
"""

from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.data.finding import SUFFIXES, Left, key_of, with_suffixes
from diffusion_jax.data.metadata import LISTS, read_list
from diffusion_jax.data.text import lines_of, read_lines
from diffusion_jax.errors import UserError

TEXTS = ('.txt', '.caption')
"""Of files beside pictures, one caption a line; the first that is there counts."""


def captions_of(
  files: Sequence[Path], pictures: Sequence[Path], root: Path, caption: str, column: str,
  left: Left,
) -> list[list[str]]:
  """The captions of each of `pictures`, one at least.

  Args:
    files: all in the folder `root`.
    caption: of pictures that have none of their own; several, one a line.
    column: of lists; '' for all of `metadata.CAPTIONS`.
    left: is told of what belongs to no picture, and of what another source is preferred to.

  Raises:
    UserError: a picture has no caption, or something cannot be read.
  """
  keys = {path: key_of(path.relative_to(root).as_posix()) for path in files}
  listed = _listed(files, root, column, left)
  beside = _beside(files, keys, left)
  every = [keys[path] for path in with_suffixes(files)]
  for name in sorted(listed.keys() - set(every)):
    left.add('rows without a picture', name)
  for stem in sorted(beside.keys() - set(map(_stem, every))):
    left.add('texts beside no picture', keys[beside[stem]])
  for path in files:
    if path.suffix.lower() not in (*SUFFIXES, *TEXTS) and path.name.lower() not in LISTS:
      left.add(f'files of another kind ({path.suffix or "no suffix"})', keys[path])
  general, found, without = lines_of(caption, 'data.caption'), [], []
  for path in pictures:
    text, rows = beside.get(_stem(keys[path])), listed.get(keys[path], [])
    own = read_lines(text, 'captions') if text else []
    if own and rows:
      left.add('rows of pictures that have a text beside them', keys[path])
    found.append(own or rows or general)
    if not (own or rows):
      without.append(path)
  if without and not general:
    raise _no_caption(without, left)
  if without and len(without) < len(pictures):
    left.add(
      'pictures without a caption of their own, which have data.caption',
      keys[without[0]], len(without),
    )
  return found


def _listed(
  files: Sequence[Path], root: Path, column: str, left: Left
) -> dict[str, list[str]]:
  """Key of a picture -> its captions in the list that is nearest to it."""
  lists = [path for path in files if path.name.lower() in LISTS]
  lists.sort(key=lambda path: (-len(path.parts), LISTS.index(path.name.lower())))
  known: dict[str, list[str]] = {}
  for path in lists:
    for key, texts in read_list(path, root, column, left).items():
      if known.get(key) and texts:
        left.add('rows of pictures that another list names first', key)
      known[key] = known.get(key) or texts
  return known


def _beside(files: Sequence[Path], keys: dict[Path, str], left: Left) -> dict[str, Path]:
  """Key of a text without its suffix -> its path."""
  texts = with_suffixes(files, TEXTS)
  texts.sort(key=lambda path: TEXTS.index(path.suffix.lower()))
  found: dict[str, Path] = {}
  for path in texts:
    if found.setdefault(_stem(keys[path]), path) != path:
      left.add('texts beside pictures that have another', keys[path])
  return found


def _stem(key: str) -> str:
  return key.rpartition('.')[0]


def _no_caption(without: Sequence[Path], left: Left) -> UserError:
  first, told = without[0], '; '.join(left.told())
  return UserError(
    f'{first} has no caption' + f', nor have {len(without) - 1:,} more' * (len(without) > 1)
    + f' ({told})' * bool(told)
    + f'; write {first.with_suffix(".txt").name} beside it, name it in metadata.jsonl, or set '
    'data.caption.'
  )
