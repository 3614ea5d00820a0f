"""classify: pictures into classes that are words."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated

from diffusion_jax.cli.options import add_options, read_options, writing
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.options import CLIP
from diffusion_jax.limits import Help, Positive

if TYPE_CHECKING:
  from diffusion_jax.evaluation.zero_shot import Answers

HELP = 'name what pictures show, of classes that are words'
DESCRIPTION = """Zero-shot classification: each picture's class is the one whose text CLIP finds
nearest. The text of a class is the mean over the templates, such as 'a drawing of a {}'. Where
pictures lie in a folder for each class (DIR/cat/1.png), or a data set has labels, those are the
classes unless others are given, and the accuracy is printed beside chance.

examples:
  python -m diffusion_jax classify photo.png --class cat --class dog
  python -m diffusion_jax classify pictures --template 'a drawing of a {}' --out classes.json"""

SHOWN = 20
"""Pictures whose answers are printed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
  """Classes, templates, and where the answers go."""

  paths: tuple[str, ...] = ()
  classes: Annotated[tuple[str, ...], Help(
    'a class, or NAME=WORDS for what CLIP is asked in place of its name; repeat for each, and for '
    'several words of one (default: the names of the folders, or the labels of the data set)',
    'NAME', 'class'
  )] = ()
  class_file: Annotated[str, Help('a text file with a class a line', 'FILE', 'classes')] = ''
  template: Annotated[tuple[str, ...], Help(
    'a text with {} in the place of the class; repeat to average over several (default: {})', 'TEXT'
  )] = ()
  templates: Annotated[str, Help('a text file with a template a line', 'FILE')] = ''
  clip: Annotated[str, Help(f'a CLIP with both towers (default: {CLIP})', 'DIR')] = CLIP
  top: Annotated[Positive, Help('classes to name for each picture (default: 5)', 'N')] = 5
  dataset: Annotated[str, Help(
    'a data set with labels in place of pictures, such as openmoji', 'NAME'
  )] = ''
  split: Annotated[str, Help('of --dataset (default: test)', 'NAME')] = 'test'
  data_dir: Annotated[str | None, Help('folder of all data sets', 'DIR')] = None
  out: Annotated[str, Help('where the answers go, with FILE.csv beside it', 'FILE.json')] = ''

  def __post_init__(self):
    if bool(self.paths) == bool(self.dataset):
      raise UserError('give pictures or folders of them, or --dataset NAME, and not both.')
    if self.out and not self.out.endswith('.json'):
      raise UserError(f'--out {self.out} is no name of a JSON file; call it {self.out}.json.')

  def read(self) -> tuple[dict[str, list[str]], list[str]]:
    """Return (words by class, {} for those of the pictures, templates). UserError for a faulty one.
    """
    from diffusion_jax.data.captions import read_lines
    from diffusion_jax.evaluation.zero_shot import SLOT, check_templates, words_of

    given = lambda own, file, what: [*own, *(read_lines(file, what) if file else ())]
    classes = words_of(given(self.classes, self.class_file, 'file of classes'))
    templates = given(self.template, self.templates, 'file of templates') or [SLOT]
    check_templates(templates)
    return classes, templates


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Pictures, classes, templates."""
  parser.add_argument('paths', nargs='*', metavar='PATH', help='pictures, or folders of them')
  add_options(parser, ClassifyOptions)


def run(args: argparse.Namespace) -> int:
  """Embed, name and print."""
  options = read_options(ClassifyOptions, args)
  given, templates = options.read()
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.evaluation import zero_shot
  from diffusion_jax.evaluation.comparison import local_mesh
  from diffusion_jax.evaluation.embeddings import LabelledRecords, PictureFiles, embed
  from diffusion_jax.evaluation.extractors.clip import load_features

  enable_compile_cache()
  if options.paths:
    images = PictureFiles(options.paths)
    found = images.labels
  features = load_features(options.clip, local_mesh())
  if options.dataset:
    from diffusion_jax.data.sources.tfds import open_source

    source = open_source(
      options.dataset, options.split, size=features.extractor.size, data_dir=options.data_dir,
      prepare=True,
    )
    images, found = LabelledRecords(source, options.dataset), source.labels or ()
  classes = given or {name: [name] for name in sorted(filter(None, set(found)))}
  if len(classes) < 2:
    raise UserError(
      f'there {"is one class" if classes else "are no classes"}; give --class NAME for each of two '
      'or more, or pictures in a folder for each.'
    )
  embedded = embed(images, features)
  labels = known_labels(images.labels, classes)
  answers = zero_shot.answer(features, embedded, images.names, labels, classes, templates)
  show(answers, [*images.notes, *embedded.errors], options.top)
  if options.out:
    settings = {'clip': features.extractor.name, 'classes': classes, 'templates': templates}
    with writing(options.out) as out:
      zero_shot.write(out, answers, options.top, settings)
    print(f'written to {out} and {out.with_suffix(".csv").name}')
  return 0


def known_labels(labels: Sequence[str], classes: Collection[str]) -> list[str]:
  """Return the labels, '' in place of what is no class; none of them, with a note, if few are."""
  unknown = sorted(set(filter(None, labels)) - set(classes))
  if unknown:
    print(f'note: {", ".join(unknown[:5])}{"..." * (len(unknown) > 5)} are no classes, so that '
          'pictures of them count for no accuracy.')
  return [label if label in classes else '' for label in labels]


def show(answers: Answers, notes: list[str], top: int) -> None:
  """Print the first answers, the accuracy and what was left out."""
  for index, name in enumerate(answers.names[:SHOWN]):
    best = ', '.join(f'{found} {p:.3f}' for found, p in answers.best(index, min(top, 3)))
    label = answers.labels[index]
    print(f'{name}: {best}{f" (is {label})" if label else ""}')
  if len(answers.names) > SHOWN:
    print(f'... and {len(answers.names) - SHOWN:,} more')
  for note in notes:
    print(f'note: {note}')
  if (found := answers.accuracy()) is not None:
    print(
      f'accuracy {found["accuracy"]:.3f} of {found["pictures"]:,.0f} pictures, '
      f'{found["accuracy_per_class"]:.3f} as a mean over classes; chance {found["chance"]:.3f}, '
      f'always the commonest {found["commonest"]:.3f}'
    )
