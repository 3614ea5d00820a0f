"""What `prepare --source` is told."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from diffusion_jax.config import DataConfig
from diffusion_jax.data.prepare.rules import Rule
from diffusion_jax.data.storage import is_remote
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Fraction, Help, Range

LEAST = 16
"""Pixels of the longest edge that is left."""


@dataclasses.dataclass(frozen=True)
class SourceOptions:
  """Pictures of any source, and how they are kept."""

  source: Annotated[str, Help(
    'pictures to put into records of one kind: folder:DIR, tar:GLOB and all that data.dataset may '
    'name', 'KIND:PATH'
  )] = ''
  out: Annotated[str, Help('folder of the records, for data.dataset=records:DIR', 'DIR')] = ''
  caption: Annotated[str, Help(
    'as data.caption: of pictures without one of their own; {name}, {folder} and {label} are words '
    'of path and class, {path} is the path itself', 'TEXT'
  )] = ''
  caption_column: Annotated[str, Help('as data.caption_column', 'NAME')] = ''
  replace: Annotated[tuple[str, ...], Help(
    'rewrite captions: what a regular expression finds becomes TEXT; repeat for several, one after '
    'another', 'PATTERN=TEXT'
  )] = ()
  classes: Annotated[bool, Help(
    'where pictures have no class, take the first folder in their names for it'
  )] = False
  test_fraction: Annotated[float, Range(0, 1, below=True), Help(
    'of the pictures for the test split, chosen by their content, where there is none; 0 for none '
    '(default: 0.1)', 'FRACTION'
  )] = 0.1
  shards: Annotated[int, Range(0, 100_000 // 2), Help(
    'files of the training split (default: one for 1,024 pictures)', 'N'
  )] = 0
  workers: Annotated[int, Range(0, 1024), Help(
    'processes (default: one for each processor); they change nothing in what is written', 'N'
  )] = 0
  picture_format: Annotated[Literal['stored', 'png', 'jpeg', 'webp'], Help(
    'stored (default): every byte as it was; else pictures of other formats are written anew: '
    'upright, of 8 bits, on white', 'FORMAT'
  )] = 'stored'
  quality: Annotated[int, Range(1, 100), Help(
    'of jpeg and webp, 1 to 100 (default: 90); webp of 100 is lossless', 'Q'
  )] = 90
  max_edge: Annotated[int, Range(0, 2**16), Help(
    'shrink pictures until their longer edge is that long; needs a --picture_format other than '
    'stored', 'PIXELS'
  )] = 0
  most_unreadable: Annotated[Fraction, Help(
    'fraction of the pictures that may be damaged before the command ends (default: 0.5)',
    'FRACTION'
  )] = 0.5
  credit: Annotated[str, Help('whom to thank, for the cards', 'TEXT')] = ''

  def __post_init__(self):
    if bool(self.source) != bool(self.out):
      raise UserError('--source needs --out, the folder of the records, and --out a --source.')
    self.rules()
    if is_remote(self.out):
      raise UserError(f'--out is {self.out}; give a folder of a disk, and copy it from there.')
    if self.max_edge and self.picture_format == 'stored':
      raise UserError('--max_edge needs --picture_format png, jpeg or webp: pictures are written '
                      'anew.')
    if 0 < self.max_edge < LEAST:
      raise UserError(f'--max_edge is {self.max_edge}; give at least {LEAST} pixels.')

  def data(self, size: int, data_dir: str) -> DataConfig:
    """How the source is opened."""
    return DataConfig(
      self.source, size, data_dir, caption=self.caption, caption_column=self.caption_column,
      test_fraction=self.test_fraction,
    )

  def rules(self) -> list[Rule]:
    """The rules of `replace`. UserError: one is none."""
    return [Rule.parse(given) for given in self.replace]

  @property
  def folder(self) -> Path:
    """The folder of the records; a link to one is followed once, here."""
    return Path(self.out).expanduser().resolve()

  def kept(self) -> dict[str, object]:
    """What the records depend on, as values of JSON."""
    without = ('out', 'workers', 'most_unreadable', 'replace')
    kept = {name: value for name, value in vars(self).items() if name not in without}
    # Not where there are none: sets that were begun before there were rules say nothing of them.
    return kept | ({'replace': list(self.replace)} if self.replace else {})
