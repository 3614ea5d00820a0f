"""Reads what a run leaves in its directory, also while it goes on and after a crash."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory in memory; parts that are not there are empty.

  Attributes:
    name: the directory's own name.
    train, evaluation: one line of metrics per step, in order of the step.
    latest: the train line written last, which after a resume need not be that of the largest step.
    unreadable: lines of metrics.jsonl that were left out, such as one torn by a crash.
    grids: (step, path) of the sample grids, in order of the step.
    has_model_card: whether there is a README.md.
  """

  name: str
  config: dict[str, Any]
  train: list[Line]
  evaluation: list[Line]
  latest: Line
  unreadable: int
  grids: list[tuple[int, Path]]
  scores: dict[str, Any]
  versions: dict[str, Any]
  status: dict[str, Any]
  has_model_card: bool


def read_run(workdir: Path) -> Run:
  """Reads a run directory. UserError if it is missing, holds no run or a JSON file is damaged."""
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise UserError(f'There is no run directory {workdir}: give the workdir of a training run.')
  lines, unreadable = _read_metrics(workdir / 'metrics.jsonl')
  grids = _find_grids(workdir / 'samples')
  objects = {name: _read_object(workdir / f'{name}.json')
             for name in ('config', 'scores', 'versions', 'status')}
  if not (lines or grids or objects['config'] or objects['scores']):
    raise UserError(
      f'{workdir} holds no run (no config.json, metrics.jsonl, samples or scores.json): give the '
      'workdir of a training run that has started.'
    )
  train = [line for line in lines if line['kind'] == 'train']
  return Run(
    name=workdir.resolve().name,
    train=_one_per_step(train),
    evaluation=_one_per_step([line for line in lines if line['kind'] == 'evaluation']),
    latest=train[-1] if train else {},
    unreadable=unreadable,
    grids=grids,
    has_model_card=(workdir / 'README.md').is_file(),
    **objects,
  )


def is_number(value: Any) -> bool:
  """Whether a JSON value is a number; true and false are not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_metrics(path: Path) -> tuple[list[Line], int]:
  """All whole lines that have a kind and a step, in the order written, and how many are not."""
  if not path.is_file():
    return [], 0
  lines, unreadable = [], 0
  for text in path.read_text(encoding='utf-8', errors='replace').split('\n'):
    if not text.strip():
      continue
    try:
      line = json.loads(text)
    except (ValueError, RecursionError):
      line = None
    if isinstance(line, dict) and isinstance(line.get('kind'), str) and is_number(line.get('step')):
      lines.append(line)
    else:
      unreadable += 1
  return lines, unreadable


def _one_per_step(lines: list[Line]) -> list[Line]:
  """The last line of each step: a resume repeats the steps after its checkpoint."""
  return [line for _, line in sorted({line['step']: line for line in lines}.items())]


def _find_grids(folder: Path) -> list[tuple[int, Path]]:
  matches = ((re.fullmatch(r'step_(\d+)\.png', path.name), path) for path in folder.glob('*.png'))
  return sorted((int(match[1]), path) for match, path in matches if match)


def _read_object(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not valid JSON: repair it, or remove it and try again.') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} must hold a JSON object: repair it, or remove it and try again.')
  return value
