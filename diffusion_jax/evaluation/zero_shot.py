"""Zero-shot classification (Radford et al. 2021, section 3.1): classes are words."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.embeddings import Embedded, class_embeddings
from diffusion_jax.evaluation.extractors.clip import CLIPFeatures
from diffusion_jax.files import atomic_write

SLOT = '{}'
"""The place of the class in a template."""


def check_templates(templates: Sequence[str]) -> None:
  """Raise UserError for a template without a place for the class."""
  for template in templates:
    if SLOT not in template:
      raise UserError(f'the template {template!r} has no {SLOT} in the place of the class; add it.')


def words_of(named: Iterable[str]) -> dict[str, list[str]]:
  """Return the words of each class of 'NAME' or 'NAME=WORDS', of which one may have several.

  UserError where either is empty.
  """
  classes: dict[str, list[str]] = {}
  for text in named:
    name, _, words = text.partition('=')
    name, words = name.strip(), (words if '=' in text else name).strip()
    if not (name and words):
      raise UserError(f'the class {text!r} is not of the form NAME or NAME=WORDS.')
    known = classes.setdefault(name, [])
    known += [words] * (words not in known)
  return classes


@dataclasses.dataclass(frozen=True)
class Answers:
  """probabilities: [n k] of the classes. names, labels: of the n pictures, a label '' if unknown.
  """

  classes: Sequence[str]
  names: Sequence[str]
  labels: Sequence[str]
  probabilities: np.ndarray

  def best(self, index: int, count: int) -> list[tuple[str, float]]:
    """Return the most probable classes of a picture, and how probable they are."""
    row = self.probabilities[index]
    return [(self.classes[k], float(row[k])) for k in np.argsort(-row, kind='stable')[:count]]

  def accuracy(self) -> dict[str, float] | None:
    """Return how often the first answer is right, beside chance; None where no label is known.

    chance: of a guess among all classes; commonest: of always the commonest label.
    """
    rows = [i for i, label in enumerate(self.labels) if label]
    if not rows:
      return None
    true = np.asarray([self.classes.index(self.labels[i]) for i in rows])
    right = self.probabilities[rows].argmax(axis=1) == true
    return {
      'accuracy': float(right.mean()),
      'accuracy_per_class': float(np.mean([right[true == k].mean() for k in np.unique(true)])),
      'chance': 1 / len(self.classes),
      'commonest': float(np.bincount(true).max() / len(true)),
      'pictures': float(len(true)),
    }


def answer(
  features: CLIPFeatures, embedded: Embedded, names: Sequence[str], labels: Sequence[str],
  classes: Mapping[str, Sequence[str]], templates: Sequence[str],
) -> Answers:
  """Classify embedded pictures by CLIP's temperature; names, labels: of all of them.

  classes, templates: as of `class_embeddings`.
  """
  params = features.extractor.params
  logits = np.exp(np.float64(params['logit_scale'])) * (
    embedded.embeddings.astype(np.float64) @ class_embeddings(features, classes, templates).T
  )
  odds = np.exp(logits - logits.max(axis=1, keepdims=True))
  return Answers(
    list(classes), [names[i] for i in embedded.rows], [labels[i] for i in embedded.rows],
    odds / odds.sum(axis=1, keepdims=True),
  )


def write(out: Path, answers: Answers, top: int, settings: dict[str, Any]) -> None:
  """Write FILE.json and FILE.csv: of each picture its label and its `top` best classes."""
  pictures = [
    {'picture': name, **({'label': label} if label else {}), 'classes': [
      {'class': found, 'probability': round(p, 6)} for found, p in answers.best(i, top)
    ]} for i, (name, label) in enumerate(zip(answers.names, answers.labels, strict=True))
  ]
  values = {**settings, 'accuracy': answers.accuracy(), 'pictures': pictures}
  with atomic_write(out) as file:
    file.write((json.dumps(values, indent=2, ensure_ascii=False) + '\n').encode())
  top = min(top, len(answers.classes))
  columns = ['picture', 'label', *(f'{w}_{n}' for n in range(1, top + 1) for w in
             ('class', 'probability'))]
  rows = [
    [one['picture'], one.get('label', ''), *(v for c in one['classes'] for v in c.values())]
    for one in pictures
  ]
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows([columns, *rows])
  with atomic_write(out.with_suffix('.csv')) as file:
    file.write(text.getvalue().encode())
