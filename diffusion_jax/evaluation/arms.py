"""Arms of an experiment: runs by config and seed, compared in pairs of one seed.

Runs of one seed draw the same examples, noise and times: the loader's order and the key of a step
are functions of loop.seed and the step alone. Differences within a pair are therefore free of what
both have in common.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.config import completed, flatten
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.bootstrap import Interval
from diffusion_jax.evaluation.metrics.metric import HIGHEST, best_is
from diffusion_jax.evaluation.paired import over_seeds, over_steps
from diffusion_jax.evaluation.report import as_read, differences
from diffusion_jax.files import read_object
from diffusion_jax.runs.directory import MAY_CHANGE, normalise
from diffusion_jax.runs.trained_on import DATA
from diffusion_jax.viz.run_files import Line, Run, is_number, read_run
from diffusion_jax.viz.scores import ScoreTable

SEED = 'loop.seed'
LAST_FRACTION = 0.5
"""Of the steps, the last, over which the mean loss is taken."""
WINDOW = 5
"""Lines of metrics in the running mean of a loss that is to reach a value."""
_NO_ARM = tuple(
  key for key in MAY_CHANGE if key not in ('loop.total_steps', 'mesh.', 'remat', 'attention')
)
"""Beginnings of keys that make no other arm."""
_SAME_DATA = ('task', 'data.dataset', 'data.size', 'data.mixture', 'data.test_of', 'data.caption',
              'data.caption_column', 'data.test_fraction', 'data.background')
"""Keys that say which examples there are."""
_SAME_LOSS = ('settings.objective', 'settings.schedule', 'settings.process', 'settings.autoencoder')
"""Beginnings of keys that say what the loss is of."""
_SAME_DRAWS = ('loop.batch_size', 'loop.accumulation_steps', 'data.transforms', 'data.crop')
"""Keys without which a step's examples, noise and times differ between arms."""
_TIMES = 'importance'
"""Times that are no function of the seed and the step."""


@dataclasses.dataclass(frozen=True)
class Arm:
  """Runs of one config by seed; name: what sets it apart. config: by dotted key."""

  name: str
  runs: Mapping[int, Run]
  config: Mapping[str, Any]

  def lines(self, kind: str, seed: int) -> dict[int, Line]:
    """Return step -> line of metrics; kind: train, evaluation."""
    return {line['step']: line for line in getattr(self.runs[seed].metrics, kind).lines}


@dataclasses.dataclass(frozen=True)
class Difference:
  """A metric of an arm less that of the first arm, in pairs; step: 0 for the mean of many."""

  metric: str
  arm: str
  step: int
  values: tuple[float, ...]
  interval: Interval


@dataclasses.dataclass(frozen=True)
class Reached:
  """How long an arm takes to a value of a metric, by seed; None where it is never reached.

  ratio: of its steps to those of the first arm, in pairs; None for the first arm, and where no pair
  has both.
  """

  metric: str
  value: float
  arm: str
  steps: dict[int, int | None]
  seconds: dict[int, float | None]
  ratio: Interval | None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Arms with what sets them apart; curves: differences at every step that has them."""

  arms: list[Arm]
  seeds: list[int]
  differences: list[Difference]
  curves: list[Difference]
  reached: list[Reached]
  notes: list[str]

  def as_json(self) -> dict[str, Any]:
    """Return everything; what is not finite is None."""
    return _finite({
      'arms': {arm.name: {str(seed): run.name for seed, run in arm.runs.items()}
               for arm in self.arms},
      'seeds': self.seeds, 'notes': self.notes,
      'differences': [_as_json(one) for one in self.differences],
      'curves': [_as_json(one) for one in self.curves],
      'reached': [_as_json(one) for one in self.reached],
    })


def _as_json(one: Difference | Reached) -> dict[str, Any]:
  interval = lambda value: value._asdict() if isinstance(value, Interval) else value
  return {field.name: interval(getattr(one, field.name)) for field in dataclasses.fields(one)}


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(key): _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_arms(workdirs: Sequence[Path]) -> list[Arm]:
  """Sort runs into arms: those that differ in loop.seed alone are one.

  UserError: no run, fewer than two arms, a run twice, or arms on other data or other scores.
  """
  found: list[tuple[dict[str, Any], dict[int, Run], dict[str, Any]]] = []
  for path in map(Path, workdirs):
    run = read_run(path)
    own = own_keys(completed(run.config))
    seed = own.pop(SEED, 0)
    data = read_object(path / DATA) if (path / DATA).is_file() else {}
    runs = next((runs for other, runs, _ in found if other == own), None)
    if runs is None:
      found.append((own, {seed: run}, data))
    elif seed in runs:
      raise UserError(
        f'{path} and {runs[seed].name} are runs of one config and one seed, {seed}; leave one of '
        'them out, or give runs that differ.'
      )
    else:
      runs[seed] = run
    _check_data(found[0][2], data, path)
  if len(found) < 2:
    raise UserError('these runs differ in their seed alone; give runs of two configs or more.')
  for own, runs, _ in found[1:]:
    _check_config(found[0][0], own, next(iter(runs.values())).name)
  names = _names([own for own, _, _ in found], [runs for _, runs, _ in found])
  arms = [Arm(name, runs, own) for name, (own, runs, _) in zip(names, found, strict=True)]
  _check_scores(arms)
  return arms


def own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return what makes a config an arm of its own, and its seed, by dotted key."""
  flat = flatten(normalise(dict(config)))
  return {key: value for key, value in flat.items() if not key.startswith(_NO_ARM)}


def _check_data(first: Mapping[str, Any], other: Mapping[str, Any], path: Path) -> None:
  for split in first.keys() & other.keys():
    for part in first[split].keys() & other[split].keys():
      if first[split][part] != other[split][part]:
        raise UserError(
          f'the {part} of the {split} data of {path} are not those of the first run; runs are '
          'compared on the same data.'
        )


def _check_config(first: Mapping[str, Any], other: Mapping[str, Any], name: str) -> None:
  for key in sorted(first.keys() | other.keys()):
    if key.startswith(_SAME_DATA) and first.get(key) != other.get(key):
      raise UserError(
        f'{key} of {name} is {other.get(key)!r:.80} and that of the first run '
        f'{first.get(key)!r:.80}; runs are compared on the same data.'
      )


def _check_scores(arms: Sequence[Arm]) -> None:
  """Raise UserError where scores differ by more than the model."""
  tables = [(run.name, ScoreTable.of(run.scores)) for arm in arms for run in arm.runs.values()]
  tables = [(name, table) for name, table in tables if table.columns]
  for name, table in tables[1:]:
    rows = [settings_row(one) for one in (tables[0][1], table)]
    for metric in table.rows:
      for reason in differences(metric, *rows):
        raise UserError(
          f'{metric} of {name} and of {tables[0][0]} cannot be compared: {reason}; score both '
          'alike.'
        )


def settings_row(scores: ScoreTable) -> dict[str, str]:
  """Return settings as in a table of evaluations, where features are a list."""
  listed = lambda name, value: [value] if name == 'features' and isinstance(value, str) else value
  return as_read({
    f'settings.{name}': listed(name, value) for name, value in scores.settings.items()
  })


def _names(configs: Sequence[Mapping], runs: Sequence[Mapping[int, Run]]) -> list[str]:
  """Return what sets each config apart, else the name of a run of it."""
  keys = dict.fromkeys(key for config in configs for key in config)
  differ = [key for key in keys if any(c.get(key) != configs[0].get(key) for c in configs)]
  if 0 < len(differ) <= 3:
    names = [', '.join(f'{key}={config.get(key)}' for key in differ) for config in configs]
    if max(map(len, names)) <= 80:
      return names
  names = [next(iter(one.values())).name for one in runs]
  return names if len(set(names)) == len(names) else [
    f'{name} ({n})' for n, name in enumerate(names, 1)
  ]


def compare(arms: Sequence[Arm], until: Iterable[tuple[str, float]] = ()) -> Comparison:
  """Compare every arm with the first one, in pairs of one seed.

  until: (metric, value) that arms are to reach. UserError: the arms have no seed in common, or a
  metric of `until` is not there.
  """
  first, *others = arms
  seeds = sorted(set.intersection(*(set(arm.runs) for arm in arms)))
  if not seeds:
    raise UserError(
      f'the runs have no {SEED} in common, so that no two of them saw the same data and noise; '
      'train the arms with the same seeds.'
    )
  found, curves = [], []
  for arm in others:
    own, along = _loss(first, arm, seeds)
    scores, over = _scores(first, arm, seeds)
    found += own + scores
    curves += along + over
  if not found:
    raise UserError('the runs have no step with metrics in common; train them longer.')
  reached = [one for metric, value in until for one in _reached(arms, seeds, metric, value)]
  return Comparison(list(arms), seeds, found, curves, reached, _notes(arms, seeds))


def _notes(arms: Sequence[Arm], seeds: Sequence[int]) -> list[str]:
  notes = []
  for arm in arms[1:]:
    for key in sorted(arms[0].config.keys() | arm.config.keys()):
      if key.startswith(_SAME_DRAWS) and arms[0].config.get(key) != arm.config.get(key):
        notes.append(
          f'{arm.name}: {key} differs, so that its steps are of other examples, noise and times '
          'than those of the first arm; the differences are noisier for that.'
        )
    if _TIMES in (one.config.get('settings.objective.times') for one in (arms[0], arm)):
      notes.append(
        f'{arm.name}: times by {_TIMES} follow the losses of each run, so that they are not those '
        'of the first arm.'
      )
    if _other_loss(arms[0], arm):
      notes.append(f'{arm.name}: its loss is another one, and is not compared.')
  left = [seed for arm in arms for seed in arm.runs if seed not in seeds]
  if left:
    notes.append(f'seeds {", ".join(map(str, sorted(set(left))))} are not in all arms: left out.')
  if len(seeds) == 1:
    notes.append(
      'there is one seed: intervals are over the steps of these runs and say nothing of other '
      'seeds, and scores have none.'
    )
  return notes


def _other_loss(first: Arm, arm: Arm) -> bool:
  keys = [key for key in first.config.keys() | arm.config.keys() if key.startswith(_SAME_LOSS)]
  return any(first.config.get(key) != arm.config.get(key) for key in keys)


def _pairs(
  first: Arm, arm: Arm, seeds: Sequence[int], kind: str, metric: str
) -> tuple[list[int], np.ndarray]:
  """Return (steps that all pairs have, differences [seeds steps]) of a metric."""
  known = []
  for seed in seeds:
    mine, other = arm.lines(kind, seed), first.lines(kind, seed)
    known.append({
      step: mine[step][metric] - other[step][metric] for step in mine.keys() & other.keys()
      if all(is_number(one[step].get(metric)) for one in (mine, other))
    })
  steps = sorted(set.intersection(*map(set, known)))
  return steps, np.array([[one[step] for step in steps] for one in known], np.float64)


def _metrics(arm: Arm, seeds: Sequence[int], kind: str) -> list[str]:
  """Return the metrics that runs of all seeds have."""
  names = [getattr(arm.runs[seed].metrics, kind).names for seed in seeds]
  return [name for name in names[0] if all(name in other for other in names)]


def _loss(
  first: Arm, arm: Arm, seeds: Sequence[int]
) -> tuple[list[Difference], list[Difference]]:
  """Return differences of the mean loss over the last steps, over seeds and over steps, and of each
  step."""
  steps, values = _pairs(first, arm, seeds, 'train', 'loss')
  if not steps or _other_loss(first, arm):
    return [], []
  late = values[:, [step > (1 - LAST_FRACTION) * steps[-1] for step in steps]]
  make = lambda per, interval: Difference('loss', arm.name, 0, tuple(per), interval)
  means = late.mean(axis=1).tolist()
  found = [make(means, over_seeds(means))] if len(seeds) > 1 else []
  found.append(make(means, over_steps(late.mean(axis=0))))
  return found, _each_step('loss', arm, steps, values)


def _each_step(metric: str, arm: Arm, steps: Sequence[int], values: np.ndarray) -> list[Difference]:
  return [
    Difference(metric, arm.name, step, tuple(column.tolist()), over_seeds(column))
    for step, column in zip(steps, values.T, strict=True)
  ]


def _scores(
  first: Arm, arm: Arm, seeds: Sequence[int]
) -> tuple[list[Difference], list[Difference]]:
  """Return differences of the metrics of evaluations at the last step in common, and at each."""
  last, curves = [], []
  for metric in _metrics(arm, seeds, 'evaluation'):
    if metric == 'samples' or metric not in _metrics(first, seeds, 'evaluation'):
      continue
    steps, values = _pairs(first, arm, seeds, 'evaluation', metric)
    if found := _each_step(metric, arm, steps, values):
      last.append(found[-1])
      curves += found
  return last, curves


def _reached(arms: Sequence[Arm], seeds: Sequence[int], metric: str, value: float) -> list[Reached]:
  first = None
  found = []
  for arm in arms:
    times = {seed: _first_time(arm, seed, metric, value) for seed in seeds}
    steps = {seed: None if one is None else one[0] for seed, one in times.items()}
    seconds = {seed: None if one is None else one[1] for seed, one in times.items()}
    ratio = None
    if first is not None:
      logs = [math.log(steps[s] / first[s]) for s in seeds if steps[s] and first[s]]
      if logs:
        of_logs = over_seeds(logs)
        ratio = of_logs._replace(
          **{name: math.exp(getattr(of_logs, name)) for name in ('estimate', 'low', 'high')}
        )
    first = steps if first is None else first
    found.append(Reached(metric, value, arm.name, steps, seconds, ratio))
  return found


def _first_time(arm: Arm, seed: int, metric: str, value: float) -> tuple[int, float | None] | None:
  """Return the (step, seconds) at which a metric first reaches a value, None where it never does.

  Of a loss the running mean over `WINDOW` lines counts.
  """
  train = arm.lines('train', seed)
  kind = 'evaluation' if metric in arm.runs[seed].metrics.evaluation.names else 'train'
  lines = arm.lines(kind, seed)
  points = [(s, line[metric]) for s, line in sorted(lines.items()) if is_number(line.get(metric))]
  if not points:
    known = [*arm.runs[seed].metrics.train.names, *arm.runs[seed].metrics.evaluation.names]
    raise UserError(
      f'--until names {metric}, which {arm.runs[seed].name} does not measure; it measures '
      f'{", ".join(dict.fromkeys(known)) or "nothing"}.'
    )
  if kind == 'train':
    numbers = [number for _, number in points]
    points = [(points[i][0], float(np.mean(numbers[i - WINDOW + 1 : i + 1])))
              for i in range(WINDOW - 1, len(points))]
  sign = 1 if _falls(metric) else -1
  step = next((step for step, number in points if sign * number <= sign * value), None)
  if step is None:
    return None
  times = [(s, line['time']) for s, line in sorted(train.items()) if is_number(line.get('time'))]
  seconds = float(np.interp(step, *zip(*times, strict=True))) if times else None
  return step, seconds


def _falls(metric: str) -> bool:
  """Return whether a metric is better the lower it is. UserError where that is not known."""
  if metric.startswith('loss'):
    return True
  try:
    return best_is(metric) != HIGHEST
  except UserError as error:
    raise UserError(
      f'--until names {metric}, of which it is not known which way is better; name another metric.'
    ) from error
