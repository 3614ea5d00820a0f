"""How a run learns, remembers and forgets, in one chart, and which of its checkpoints to take."""

from __future__ import annotations

import math

from diffusion_jax.config import DECIDING
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import HIGHEST, best_is
from diffusion_jax.viz import page
from diffusion_jax.viz.charts import Point, line_chart
from diffusion_jax.viz.run_files import Run, is_number
from diffusion_jax.viz.scores import metric_words

TITLE = 'Learning, remembering, forgetting'
NOTE = ('Losses as fractions of the first held-out one, prompt fidelity as a cosine, drift as a '
        'cosine distance.')
LOSSES = {'held_out_loss': 'learning: held-out loss', 'seen_loss': 'loss on pictures trained on'}
AS_THEY_ARE = {
  'memorised_fraction': ('remembering: fraction nearer to a training picture', 1.0),
  'drift': ('forgetting: distance to the base model', 1.0),
  'clip_score': ('prompt fidelity', 0.01),
}
"""Metric -> (its line in the chart, factor on it)."""
CHOOSING = ('held_out_loss', 'fd_clip', 'clip_score')
"""Metrics by which a checkpoint is recommended where the config names none, in this order."""


def section(run: Run) -> str:
  """Return the section of the chart, '' for a run that measures none of it."""
  drawn: dict[str, list[Point]] = {}
  values = {name: _values(run, name) for name in (*LOSSES, *AS_THEY_ARE)}
  held_out = next(iter(LOSSES))
  first = next(iter(values[held_out].values()), 0.0)
  for name, title in LOSSES.items():
    if values[name] and first > 0:
      drawn[title] = [(step, value / first) for step, value in values[name].items()]
  for name, (title, factor) in AS_THEY_ARE.items():
    if values[name]:
      drawn[title] = [(step, factor * value) for step, value in values[name].items()]
  if not any(values[name] for name in values if name != 'clip_score'):
    return ''
  chart = line_chart(drawn, title=TITLE, ylabel='from 0 to about 1')
  return page.section('learning', TITLE, NOTE, page.chart_grid([(TITLE, chart)]))


def recommended(run: Run) -> str:
  """Return the section of the `verdict`, if there is one."""
  sentence = verdict(run)
  body = f'<p>{page.escape(sentence)}</p>' if sentence else ''
  return page.section('checkpoint', 'Which checkpoint', '', body)


def verdict(run: Run) -> str:
  """Which checkpoint to take, and why: of a finished run that is a fine-tune, or chooses; or ''."""
  found = run.config.get('loop')
  loop = found if isinstance(found, dict) else {}
  named = [loop[key] for key in DECIDING if isinstance(loop.get(key), str) and loop[key]]
  if run.status.get('state') != 'finished' or not (named or run.config.get('task') == 'finetune'):
    return ''
  name = next((one for one in (*named[:1], *CHOOSING) if _values(run, one)), '')
  values = _values(run, name)
  if not values:
    last = run.moment.step
    return '' if last is None else (
      f'Take the last checkpoint, of step {page.number(last)}: nothing was measured by which '
      'another would be better.'
    )
  highest = _is_highest(name, loop)
  best = max(values, key=lambda step: (values[step] if highest else -values[step], step))
  last, words = max(values), metric_words(name).rstrip(' ↑↓')
  kept = 'the last' if best == last else (
    'kept by loop.keep_best' if loop.get('keep_best') == name else
    f'not kept unless it was due: loop.keep_best={name} keeps it'
  )
  why = f'{words[:1].lower()}{words[1:]} was {"highest" if highest else "lowest"} there of '
  text = (
    f'Take the checkpoint of step {best:,} ({kept}): {why}{len(values)} evaluations '
    f'({page.number(values[best])})'
  )
  if best != last:
    text += f', and {page.number(values[last])} at step {last:,}'
    text += ', where training was stopped for it' if loop.get('stop_when') == name and (
      last < (run.moment.of or last)
    ) else ''
  return f'{text}.'


def _is_highest(name: str, loop: dict) -> bool:
  """True where more of a metric is better, as the config or the metric itself says."""
  said = next((loop[f'{key}_is'] for key in DECIDING
               if loop.get(key) == name and loop.get(f'{key}_is')), '')
  try:
    return (said or best_is(name)) == HIGHEST
  except UserError:  # Of another version, or a part from outside that is not loaded.
    return False


def _values(run: Run, name: str) -> dict[int, float]:
  """Return the finite values of a metric of the evaluation, by step."""
  points = run.metrics.evaluation.curve(name).points if name else ()
  return {int(step): value for step, value in points if is_number(value) and math.isfinite(value)}
