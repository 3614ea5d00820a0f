"""compare: arms of an experiment in pairs of one seed, from runs or trained for it."""

import argparse
import ast
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from diffusion_jax.cli.options import add_options, check_overrides, read_options
from diffusion_jax.errors import Diverged, UserError
from diffusion_jax.limits import Help, Range

HELP = 'compare runs in pairs of one seed, with intervals; train the arms if asked'
DESCRIPTION = """Compares runs: the mean loss of the last half of the steps, the scores of the last
evaluation, and with --until the time to a value, each less that of the first arm, with confidence
intervals. Runs that differ in loop.seed alone are one arm. Runs of one seed see the same pictures,
noise and times, so that pairs of them are compared: over seeds by a paired t, over the steps of one
seed by means of ten stretches. Writes comparison.html and comparison.json. Refused are runs on
other data, or scored by other features.

With --config and --arms it first trains one run for each value and seed, in folders of --workdir;
the same command again goes on where it was stopped. An arm that diverges is left out, and said.
Any key of the config can be changed for all arms: --config.loop.total_steps=500

examples:
  python -m diffusion_jax compare runs/a runs/b --until fd_clip=0.3
  python -m diffusion_jax compare --config toy/edm --workdir runs/rates --seeds 3 \\
    --arms config.optimizer.learning_rate=1e-3,3e-3"""


@dataclasses.dataclass(frozen=True)
class Options:
  """Runs, or how to train them."""

  runs: tuple[str, ...] = ()
  config: Annotated[str, Help('the config of all arms, as of train', 'FILE')] = ''
  arms: Annotated[tuple[str, ...], Help(
    'a key of the config and its values; of several, every combination is an arm; the first is '
    'what others are compared with', 'config.KEY=V1,V2'
  )] = ()
  seeds: Annotated[int | None, Range(1, 1000), Help(
    'with --arms, runs of each, from the loop.seed of the config on (default: 3)', 'N'
  )] = None
  workdir: Annotated[str, Help(
    'where runs of --arms, comparison.html and comparison.json go (default: the first run)', 'DIR'
  )] = ''
  until: Annotated[tuple[str, ...], Help(
    'also compare the time to this value; repeat for several', 'METRIC=VALUE'
  )] = ()

  def __post_init__(self):
    if self.arms and self.runs:
      raise UserError('runs are given, and --arms, which trains some; leave one of them out.')
    if self.arms and not (self.config and self.workdir):
      raise UserError('--arms needs --config FILE and --workdir DIR; give both.')
    if not self.arms and (self.config or self.seeds):
      raise UserError('--config and --seeds are for --arms; give --arms config.KEY=V1,V2, too.')
    if not self.arms and len(self.runs) < 2:
      raise UserError('give the workdirs of two runs or more, or --config and --arms.')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('runs', nargs='*', metavar='RUN', default=None, help='a run of train')
  add_options(parser, Options)
  parser.add_argument('--config.KEY', dest='example', metavar='VALUE',
                      help='with --arms, change any key of the config in all of them')


def run(args: argparse.Namespace) -> int:
  args.runs = args.runs or None
  check_overrides(args)
  options = read_options(Options, args)
  if args.overrides and not options.arms:
    raise UserError(f'{args.overrides[0]} changes what is trained; it needs --config and --arms.')
  until = [_value(text) for text in options.until]
  runs, code = [Path(one) for one in options.runs], 0
  if options.arms:
    runs, code = _train(options, args.overrides)
  if code == 0 and _is_first():
    _write(Path(options.workdir or runs[0]), runs, until)
  return code


def _is_first() -> bool:
  import jax

  return jax.process_index() == 0


def _value(text: str) -> tuple[str, float]:
  name, _, value = text.partition('=')
  try:
    return name, float(value)
  except ValueError as error:
    raise UserError(f'--until is {text!r:.80}; give METRIC=VALUE, such as loss=0.1.') from error


def arms_of(texts: Sequence[str]) -> list[dict[str, str]]:
  """Return the overrides of each arm, by key, from texts such as 'config.KEY=V1,V2'.

  Commas within brackets and quotes belong to a value. UserError: another form, a key twice, one
  value, the same value twice, or loop.seed.
  """
  found: dict[str, list[str]] = {}
  for text in texts:
    key, _, values = text.removeprefix('--').partition('=')
    if not key.startswith('config.') or not values:
      raise UserError(f'--arms is {text!r:.80}; give config.KEY=V1,V2.')
    if key in found or key == 'config.loop.seed':
      why = 'twice; give it once' if key in found else 'which is for --seeds; give another key'
      raise UserError(f'--arms gives {key}, {why}.')
    found[key] = _split(values)
    if len(found[key]) < 2 or len(set(found[key])) < len(found[key]):
      raise UserError(f'--arms {key} has the values {values!r:.80}; give two or more that differ.')
  return [dict(zip(found, each, strict=True)) for each in itertools.product(*found.values())]


def _split(text: str) -> list[str]:
  """Split at commas that are not within brackets or quotes."""
  parts, start = [], 0
  for end in [i for i, letter in enumerate(text) if letter == ','] + [len(text)]:
    part = text[start:end].strip()
    if part[:1] in ('(', '[', '{', '"', "'") and end < len(text):
      try:
        ast.literal_eval(part)
      except (ValueError, SyntaxError):
        continue
    parts.append(part)
    start = end + 1
  return parts


def _train(options: Options, overrides: Sequence[str]) -> tuple[list[Path], int]:
  """Train what is not there; return (workdirs of finished runs, an exit code that ends all)."""
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.config import parse, untyped
  from diffusion_jax.evaluation.arms import own_keys
  from diffusion_jax.parallel.startup import start_distributed
  from diffusion_jax.recipe import load_config

  arms = arms_of(options.arms)  # Before anything heavy is imported.
  enable_compile_cache()
  start_distributed()
  load = lambda changes: load_config(
    options.config, [*overrides, *(f'--{key}={value}' for key, value in changes.items())]
  )
  # All of them are checked before the first is trained.
  first = parse(load({})).loop.seed
  kinds = [own_keys(untyped(parse(load(arm)))) for arm in arms]
  if any(kind in kinds[:i] for i, kind in enumerate(kinds)):
    raise UserError('--arms gives two arms that train alike; give keys that change the training.')
  plans = [
    (_folder(Path(options.workdir), arm, seed), load({**arm, 'config.loop.seed': seed}))
    for seed in range(first, first + (options.seeds or 3)) for arm in arms
  ]
  done = []
  for number, (workdir, config) in enumerate(plans, 1):
    print(f'run {number} of {len(plans)}: {workdir}', flush=True)
    try:
      code = 0 if _finished(workdir, config) else _run(workdir, config)
    except Diverged as error:
      print(f'left out: {workdir} has diverged: {error}', flush=True)
      continue
    if code:
      return [], code
    done.append(workdir)
  if len({workdir.parent for workdir in done}) < 2:
    raise UserError('all runs but those of one arm have diverged; give lower learning rates.')
  return done, 0


def _folder(workdir: Path, arm: dict[str, str], seed: int) -> Path:
  """Return the workdir of a run: letters that every file system has, and all of them of the arm."""
  safe = lambda text: ''.join(c if c.isalnum() or c in '.-_' else '_' for c in text)
  name = '+'.join(f'{safe(key.rpartition(".")[2])}={safe(value)}' for key, value in arm.items())
  return workdir / name[:150] / f'seed_{seed}'


def _finished(workdir: Path, config: Any) -> bool:
  """Return whether this very run is there and finished.

  UserError: there is another. Diverged: it was given up, as it would be again.
  """
  from diffusion_jax.config import completed, parse, untyped
  from diffusion_jax.files import read_object
  from diffusion_jax.runs.directory import RunDirectory

  parsed = parse(config)
  RunDirectory(workdir).check_config(untyped(parsed), completed)
  if not (workdir / 'status.json').is_file():
    return False
  status = read_object(workdir / 'status.json')
  if status.get('state') == 'diverged':
    raise Diverged(str(status.get('message')))
  return status.get('state') == 'finished' and status.get('step') == parsed.loop.total_steps


def _run(workdir: Path, config: Any) -> int:
  from diffusion_jax.build import build
  from diffusion_jax.train.loop import train

  return train(build(config, str(workdir)))


def _write(workdir: Path, runs: Sequence[Path], until: Sequence[tuple[str, float]]) -> None:
  from diffusion_jax.evaluation.arms import compare, read_arms
  from diffusion_jax.files import atomic_write
  from diffusion_jax.viz.compare import arms_page, interval_words
  from diffusion_jax.viz.scores import metric_words

  comparison = compare(read_arms(runs), until)
  for one in comparison.differences:
    when = f'step {one.step:,}' if one.step else 'last half'
    print(
      f'{metric_words(one.metric)}, {when}, {one.arm}: {one.interval.estimate:+.4g} '
      f'({interval_words(one.interval)}; {one.interval.method})'
    )
  for note in comparison.notes:
    print(f'note: {note}')
  text = json.dumps(comparison.as_json(), indent=1, ensure_ascii=False) + '\n'
  files = {'comparison.json': text, 'comparison.html': arms_page(comparison)}
  for name, content in files.items():
    with atomic_write(workdir / name) as file:
      file.write(content.encode(errors='replace'))
  print(f'written to {workdir / "comparison.html"}')
