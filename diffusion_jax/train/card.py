"""The model card of a run: what was trained, on what, how, and how well (Mitchell et al. 2019)."""

from collections.abc import Sequence
from typing import Any

import jax

from diffusion_jax.runs.directory import command_line
from diffusion_jax.train.training import Training
from diffusion_jax.types import Params, Scores
from diffusion_jax.viz.page import duration, plain
from diffusion_jax.viz.scores import ScoreTable, metric_title

CARD_ROWS = 200
"""Parameters with a line of their own in a model card, the first by name."""


def parameter_table(params: Params, rows: int) -> str:
  """Return a table of so many parameters, by name, with their shapes and the size of all."""
  from clu.parameter_overview import get_parameter_overview

  shapes = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in params.items()}
  return get_parameter_overview(shapes, include_stats=False, max_lines=rows + 6)


def model_card(
  training: Training, parameters: Params, steps: int, seconds: float, scores: Scores
) -> str:
  """A model card in Markdown.

  parameters: trained ones, or their shapes. seconds: spent, with sampling and scoring. scores: as a
  run keeps them, with the data they are measured on.
  """
  t, data = training, training.config['data']
  dataset = data['dataset'] if t.mixture is None else f'mixture of {" and ".join(t.mixture.parts)}'
  records, (name, edge) = steps * t.loop.batch_size, t.task.described(data['size'])
  of = f' of {t.trained_on.records:,} {name}' if t.trained_on else ''
  devices = t.mesh.devices
  lines = [
    f'# {t.task.title} ({dataset}, {edge})', '',
    f'Trained with diffusion_jax by `{command_line()}`.', '',
    f'- Trained parameters: {sum(p.size for p in parameters.values()):,}',
    f'- Steps: {steps:,} of {t.loop.total_steps:,}, {records:,} {name} seen, '
    f'batch {t.loop.batch_size}',
    f'- Time: {duration(seconds)} until this was written, on {devices.size} x '
    f'{devices.flat[0].device_kind}',
    f'- Data: {dataset}, {edge}, training split{of}',
    *([] if t.mixture is None else [f'- Examples: {t.mixture.text}']),
    f'- Transforms: {", ".join(map(_transform, data["transforms"])) or "none"}',
    '- Settings: see config.json of the run', '',
  ]
  found = ScoreTable.of(scores)
  if found.columns:
    lines += ['## Scores', '', *_listed(found.measured), *_table(found)]
  elif t.provenance:
    lines += ['## What was there before', '', *_listed(t.provenance)]
  lines += ['## Parameters', '', '```', parameter_table(parameters, CARD_ROWS), '```', '']
  if t.data_credit:
    lines += ['## Credit', '', t.data_credit, '']
  return '\n'.join(lines)


def _transform(spec: Any) -> str:
  """Return the name of a transform with its arguments."""
  if isinstance(spec, str):
    return spec
  values = list(spec.values()) if isinstance(spec, dict) else list(spec)
  words = [str(value) for value in values if not isinstance(value, dict)]
  named = {k: v for value in values if isinstance(value, dict) for k, v in value.items()}
  more = ', '.join(f'{name} {plain(value)}' for name, value in named.items())
  return ' '.join([*words, f'({more})'] if more else words)


def _table(scores: ScoreTable) -> list[str]:
  lines = [f'| metric | {" | ".join(scores.titles)} |', f'|---|{"---|" * len(scores.columns)}']
  for name, values in scores.rows.items():
    cells = ' | '.join('' if value is None else f'{value:.4g}' for value in values)
    title = metric_title(name)
    lines.append(f'| {f"{title} (`{name}`)" if title != name else f"`{name}`"} | {cells} |')
  settings = dict(scores.settings)
  step = settings.pop('step', None)
  about = [] if step is None else [f'At step {step:,}.']
  if settings:
    about.append('Settings: ' + ', '.join(f'{k} {v}' for k, v in settings.items()) + '.')
  lines += ['', ' '.join(about)] if about else []
  if scores.warnings:
    lines += ['', 'What to beware of:', '', *_listed(scores.warnings)]
  return [*lines, '']


def _listed(texts: Sequence[str]) -> list[str]:
  """Return one sentence by itself, several as a list."""
  return [*(texts if len(texts) == 1 else [f'- {text}' for text in texts]), '']
