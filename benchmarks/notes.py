"""The systems of the field's notes: train and score each by its recipe, and tell of them together.

  python -m benchmarks.notes run lcm           trains, scores, adds to benchmarks/notes.json
  python -m benchmarks.notes speed             times their drawing, one after another
  python -m benchmarks.notes table             writes the table in README.md
  python -m benchmarks.notes sheet             draws docs/notes.png, all systems side by side
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.command import run_command
from benchmarks.systems import ALL, BY_STEPS, CAPTIONS, MANY, SYSTEMS, System
from benchmarks.table import markdown
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write
from diffusion_jax.registry import check
from diffusion_jax.session import Session
from diffusion_jax.viz.grids import make_grid, save_png

DESCRIPTION = __doc__
ROOT = Path(__file__).parents[1]
README, FIGURES, SHEET = ROOT / 'README.md', ROOT / 'benchmarks/notes.json', ROOT / 'docs/notes.png'
BEGIN = '<!-- Systems: written by python -m benchmarks.notes table -->'
END = '<!-- End of systems -->'
CLIP, CLASSIFIER = 'clip:asset:clip-openmoji-64', 'classifier:asset:classifier-openmoji-64'
CELL = 64
"""Pixels of a picture on the sheet; smaller ones are enlarged."""


def _workdir(name: str) -> Path:
  """Return where a system keeps what is its own."""
  return Path('runs/notes') / name


def _source(name: str) -> list[str]:
  """Return the arguments that name what a system draws with, and how."""
  system = ALL[name]
  if system.cascade:
    return ['--model', f'{_workdir(name)}/cascade', *system.options]
  weights = system.weights or name
  place = ['--workdir', str(_workdir(weights))] if weights in ALL else ['--model', weights]
  return [*place, *system.options]


def commands(name: str) -> dict[str, list[str]]:
  """Return what trains and scores a system, as arguments of `python -m diffusion_jax`."""
  system, workdir = ALL[name], str(_workdir(name))
  train = ['train', '--config', f'configs/{system.recipe}', '--workdir', workdir]
  found = {} if system.weights else {'train': train}
  if system.cascade:
    base, *stages = (f'{_workdir(one)}/model' for one in (*system.parts, name))
    more = [part for stage in stages for part in ('--stage', stage)]
    found['cascade'] = [
      'convert', '--from', base, *more, '--to', f'{workdir}/cascade', '--layout', 'cascade',
    ]
  scored = [
    '--features', CLIP, '--features', CLASSIFIER, '--metrics', ','.join(system.metrics),
    '--samples', '379',
  ]
  if system.metrics:
    what = ('sweep', f'steps={system.steps}') if system.steps else ('model',)
    found['scores'] = [
      'evaluate', *what, *_source(name), *(scored if system.pictures else ()),
      '--out', f'{workdir}/table.json',
    ]
  if system.likelihood:
    found['likelihood'] = [
      'evaluate', 'likelihood', '--workdir', workdir, '--samples', '128',
      '--out', f'{workdir}/likelihood.json',
    ]
  return found


def _command(arguments: list[str]) -> list[str]:
  return [sys.executable, '-m', 'diffusion_jax', *arguments]


def _newest(folder: Path) -> float:
  """Return when a file of a folder was last written, 0 for no folder."""
  return max((file.stat().st_mtime for file in folder.rglob('*')), default=0.0)


def _is_new(cascade: Path, name: str) -> bool:
  """Tell if a cascade is there and was written after its parts."""
  written = max((file.stat().st_mtime for file in cascade.glob('*.json')), default=0.0)
  parts = (*SYSTEMS[name].parts, name)
  return written > max(_newest(ROOT / _workdir(part) / 'model') for part in parts)


def _trained(names: Sequence[str]) -> dict[str, Any]:
  """Return what training runs took, and the parameters that they trained."""
  loaded = lambda name, file: json.loads((ROOT / _workdir(name) / file).read_text('utf-8'))
  status = [loaded(name, 'status.json') for name in names]
  seconds = sum(one['goodput']['step'] + one['goodput']['compile'] for one in status)
  return {
    'steps': status[-1]['step'], 'train_seconds': round(seconds, 1),
    'parameters': sum(loaded(name, 'step.json')['parameters'] for name in names),
  }


def measure(name: str) -> dict[str, Any]:
  """Train and score a system; return its entry. A run that is there goes on, or is kept."""
  system, made = ALL[name], commands(name)
  for kind, arguments in made.items():
    if kind == 'cascade':
      cascade = ROOT / _workdir(name) / kind
      if _is_new(cascade, name):
        continue
      shutil.rmtree(cascade, ignore_errors=True)
    print('python -m diffusion_jax', *arguments, flush=True)
    if subprocess.run(_command(arguments), cwd=ROOT).returncode:
      raise UserError(f'{name}: {arguments[0]} has failed; see what it said above.')
  entry: dict[str, Any] = {
    'commands': [' '.join(['python -m diffusion_jax', *arguments]) for arguments in made.values()],
  }
  if not system.weights:
    entry |= _trained((*system.parts, name))
  elif system.weights in ALL:
    entry |= _trained((system.weights,))
  loaded = lambda file: json.loads((ROOT / _workdir(name) / file).read_text('utf-8'))
  if 'scores' in made:
    scores, columns = loaded('table.json'), {'generated', 'untrained', 'real', 'test'}
    own = {f'steps={system.steps}': 'generated'} | {column: column for column in columns}
    entry |= {own[column]: values for column, values in scores.items() if column in own}
  if 'likelihood' in made:
    entry['likelihood'] = loaded('likelihood.json')
  return entry


def read() -> dict[str, dict[str, Any]]:
  """Return the entries by the systems' names."""
  return json.loads(FIGURES.read_text(encoding='utf-8')) if FIGURES.exists() else {}


def add(name: str, entry: dict[str, Any]) -> None:
  """Write the entry of a system in place of an earlier one."""
  found = read() | {name: entry}
  ordered = {name: found[name] for name in ALL if name in found}
  with atomic_write(FIGURES) as file:
    file.write((json.dumps(ordered, indent=1) + '\n').encode())


def _number(value: float | None, digits: str) -> str:
  return '' if value is None else format(value, digits)


MORE = {
  'spectrum_error': ('spectrum off by', '.2f', ' dB'), 'psnr': ('PSNR', '.1f', ' dB'),
  'retrieval_r1_of_100': ('own caption of 100 nearest:', '.2f', ''),
  'accuracy': ('right class:', '.2f', ''), 'codes_used': ('codes used:', '.0%', ''),
  'code_perplexity': ('perplexity', '.0f', ''),
}
"""Other figures that may be told: words before, digits, unit."""
BOUNDS = ('bits_per_dim_bound', 'latent_bits_per_dim_discrete', 'elbo_bits_per_dim')
"""Of pixels by steps, of latents and of a VAE: a likelihood has one of them."""
FLOW = 'bits_per_dim_flow'


def _more(entry: dict[str, Any]) -> str:
  """Return what else was measured, each with the value of real data behind it."""
  parts = []
  own = entry.get('generated') or entry.get('test', {})
  for name, (words, digits, unit) in MORE.items():
    if name in own:
      real = entry.get('real', {}).get(name)
      real = '' if real is None else f' (real data {real:{digits}})'
      parts.append(f'{words} {own[name]:{digits}}{unit}{real}')
  if 'likelihood' in entry:
    bits = entry['likelihood']['model']
    name = next(n for n in BOUNDS if n in bits)
    exact = f' ({bits[FLOW]:.2f} by the ODE)' if FLOW in bits else ''
    parts.append(f'{bits[name]:.2f} bits/dim{exact}')
  return ', '.join(parts)


AGREEMENT = {'clip_score': '.1f', 'retrieval_r1': '.2f', 'class_accuracy': '.2f'}
"""Scores that have a column, and their digits."""


def _agreement(scores: dict[str, Any]) -> tuple[str, ...]:
  return tuple(_number(scores.get(name), digits) for name, digits in AGREEMENT.items())


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
  system, scores, first = SYSTEMS[name], entry.get('generated', {}), entry.get('untrained', {})
  distance = _number(scores.get('fd_clip'), '.1f')
  if distance and 'fd_clip' in first:
    distance += f' ({first["fd_clip"]:.0f})'
  training = f'{entry["train_seconds"] / 60:.0f} min'
  return (
    f'{system.number}. {system.title}', f'`run {name}`', f'`configs/{system.recipe}`',
    f'that of `{system.weights}`' if system.weights else training,
    f'{entry["parameters"] / 1e6:.1f} M', distance, *_agreement(scores),
    _number(entry.get('seconds_a_picture'), '.2g'), _more(entry), system.paper,
  )


def _rows_by_steps(found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
  """Return the rows of the second table, as far as they and what they are held to are measured."""
  rows, many = [], None
  for name, (words, steps) in BY_STEPS.items():
    scores = found.get(name, {}).get('generated')
    if steps == MANY:
      many = scores
    if scores and many:
      more = '' if scores is many else f'{scores["fd_clip"] - many["fd_clip"]:+.1f}'
      rows.append(
        (words, str(steps), _number(scores['fd_clip'], '.1f'), more, *_agreement(scores))
      )
  return rows


def table() -> str:
  """Return the tables of all systems that have been measured."""
  found = read()
  rows = [_row(name, found[name]) for name in SYSTEMS if name in found]
  head = (
    'system', '`python -m benchmarks.notes`', 'recipe', 'training', 'parameters',
    '`fd_clip` (untrained)', 'CLIP score', 'R@1 of 100', 'classes', 'seconds a picture', 'more',
    'the paper, at full scale',
  )
  parts = [markdown(head, rows)]
  if rows := _rows_by_steps(found):
    head = ('by steps', 'steps', '`fd_clip`', f'more than in {MANY}', *head[6:9])
    parts.append(markdown(head, rows))
  return '\n\n'.join(parts)


def replaced(text: str) -> str:
  """Return the text of README.md with the table of what has been measured."""
  before, rest = text.split(BEGIN)
  return f'{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}'


def _drawn(name: str) -> np.ndarray:
  """Return what a system draws for its prompts, uint8 [n CELL CELL 3]."""
  prompts = [part for prompt in ALL[name].prompts for part in ('--prompt', prompt)]
  with tempfile.TemporaryDirectory() as out:
    command = _command(['sample', *_source(name), *prompts, '--out', out])
    if subprocess.run(command, cwd=ROOT).returncode:
      raise UserError(f'{name} could not be drawn from; run it first.')
    files = sorted(Path(out).glob('[0-9]*.png'))
    resized = [
      Image.open(file).convert('RGB').resize((CELL, CELL), Image.Resampling.NEAREST)
      for file in files
    ]
    return np.stack([np.asarray(image) for image in resized])


def _draws(system: System) -> bool:
  """Tell if a system draws pictures of captions by itself."""
  return system.pictures and bool(system.metrics)


def _value(text: str) -> Any:
  """Return the number that a text is, or the text."""
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return text


def seconds_a_picture(name: str) -> float:
  """Return the seconds that a system takes for each of 16 pictures at a time, compiled before."""
  source, place, *options = _source(name)
  settings = {
    key.removeprefix('--'): _value(value)
    for key, value in zip(options[::2], options[1::2], strict=True)
  }
  place = str(ROOT / place) if place.startswith('runs/') else place
  session = Session.open(**{source.removeprefix('--'): place})
  prompts = ALL[name].prompts * 2
  times = []
  for seed in (0, 1):
    begin = time.perf_counter()
    list(session.sample(prompts, seed=seed, batch=len(prompts), **settings))
    times.append(time.perf_counter() - begin)
  return times[-1] / len(prompts)


def sheet(names: Sequence[str]) -> None:
  """Draw a row of pictures for each system into docs/notes.png."""
  rows, captions = [], []
  for name in names:
    rows.append(_drawn(name))
    captions += [f'{name}: {SYSTEMS[name].prompts[0]}', *SYSTEMS[name].prompts[1:]]
  grid = make_grid(np.concatenate(rows), columns=len(CAPTIONS), captions=captions, scale=2)
  save_png(grid, SHEET, {'systems': ', '.join(names)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What to do, and for which systems."""
  parser.add_argument('what', choices=('run', 'speed', 'table', 'sheet'))
  parser.add_argument('names', nargs='*', metavar='NAME', help='systems (default: all measured)')


def run(args: argparse.Namespace) -> int:
  """Do it."""
  names = [check(ALL, name, 'NAME') for name in args.names] or list(read())
  if args.what == 'run':
    for name in names:
      add(name, measure(name))
  elif args.what == 'speed':
    for name in (name for name in names if name in SYSTEMS and _draws(SYSTEMS[name])):
      add(name, read()[name] | {'seconds_a_picture': round(seconds_a_picture(name), 4)})
  elif args.what == 'sheet':
    sheet([name for name in names if name in SYSTEMS and _draws(SYSTEMS[name])])
  else:
    README.write_text(replaced(README.read_text(encoding='utf-8')), encoding='utf-8')
  return 0


if __name__ == '__main__':
  raise SystemExit(run_command('benchmarks.notes', sys.modules[__name__]))
