"""The systems of the field's notes: train and score each by its recipe, and tell of them together.

  python -m benchmarks.notes run lcm           trains, scores, adds to benchmarks/notes.json
  python -m benchmarks.notes table             writes the table in README.md
  python -m benchmarks.notes sheet             draws docs/notes.png, all systems side by side
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.command import run_command
from benchmarks.table import markdown
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write
from diffusion_jax.registry import check
from diffusion_jax.viz.grids import make_grid, save_png

DESCRIPTION = __doc__
ROOT = Path(__file__).parents[1]
README, FIGURES, SHEET = ROOT / 'README.md', ROOT / 'benchmarks/notes.json', ROOT / 'docs/notes.png'
BEGIN = '<!-- Systems: written by python -m benchmarks.notes table -->'
END = '<!-- End of systems -->'
CLIP, CLASSIFIER = 'clip:asset:clip-openmoji-64', 'classifier:asset:classifier-openmoji-64'
DRAWN = ('fd', 'kid', 'clip_score', 'retrieval', 'class_accuracy')
CAPTIONS = (
  'grinning face', 'red heart', 'man farmer medium-light skin tone', 'cat face', 'flag of Japan',
  'red apple', 'sun', 'house',
)
"""Of the sheet; chosen before any was drawn."""
CELL = 64
"""Pixels of a picture on the sheet; smaller ones are enlarged."""


class System(NamedTuple):
  """A row of the table.

  number: of the note. title: how the table names it. recipe: its config, under configs/.
  paper: the paper's figure at full scale, and where it stands there.
  before: names of the systems whose runs the recipe reads; they must be run first.
  parts: the same, of systems whose networks it draws with, too, so that their training and
  parameters count as its own.
  pictures: whether it draws pictures, which `metrics` score; others have the scores of their task.
  metrics: of `evaluate model`; empty for a system that is scored only as a part of another.
  likelihood: whether `evaluate likelihood` is run, too.
  prompts: captions or classes of the pictures on the sheet.
  cascade: whether it is a cascade, of the models of `parts` and its own as the last.
  weights: the system whose run it draws with, or a model; nothing else is trained.
  options: of sampling, in place of the model's own.
  """

  number: int
  title: str
  recipe: str
  paper: str
  before: tuple[str, ...] = ()
  pictures: bool = True
  metrics: tuple[str, ...] = DRAWN
  likelihood: bool = False
  prompts: tuple[str, ...] = CAPTIONS
  parts: tuple[str, ...] = ()
  cascade: bool = False
  weights: str = ''
  options: tuple[str, ...] = ()


PICTURES = ('fd', 'kid')
"""Metrics of a model that reads no captions."""
SYSTEMS = {
  'ddpm': System(
    1, 'DDPM on pixels', 'notes/ddpm.py',
    'CIFAR-10: FID 3.17, at most 3.75 bits per dimension (Ho et al. 2020, table 1)',
    likelihood=True,
  ),
  'ddim': System(
    2, 'DDIM, 50 steps with the weights of DDPM', 'notes/ddpm.py',
    'CIFAR-10: FID 4.67 in 50 steps, eta 0 (Song, Meng & Ermon 2021, table 1)', before=('ddpm',),
    weights='ddpm', options=('--sampler', 'ddim', '--eta', '0', '--steps', '50'),
  ),
  'iddpm': System(
    1, 'Improved DDPM: a learned variance', 'notes/iddpm.py',
    'CIFAR-10: 2.94, ImageNet-64: 3.53 bits per dimension (Nichol & Dhariwal 2021)',
    likelihood=True,
  ),
  'ncsn': System(
    3, 'NCSN, annealed Langevin dynamics', 'notes/ncsn.py',
    'CIFAR-10: FID 25.32 (Song & Ermon 2019, table 1)',
  ),
  'score_ve': System(
    3, 'VE SDE, predictor-corrector', 'notes/score_ve.py',
    'CIFAR-10: FID 2.20 (NCSN++ cont., deep; Song et al. 2021, table 3)',
  ),
  'score_vp': System(
    3, 'VP SDE, Euler-Maruyama', 'notes/score_vp.py',
    'CIFAR-10: FID 2.41, predictor-corrector (DDPM++ cont., deep; Song et al. 2021, table 3)',
    likelihood=True,
  ),
  'score_subvp': System(
    3, 'Sub-VP SDE, probability flow', 'notes/score_subvp.py',
    'CIFAR-10: 2.99 bits per dimension (DDPM++ cont., deep; Song et al. 2021, table 2)',
    likelihood=True,
  ),
  'vae': System(
    4, 'VAE as a generator (one vector of 64)', 'notes/vae.py',
    'CIFAR-10: 4.51 bits per dimension (van den Oord et al. 2017, section 4.1)',
    metrics=PICTURES, likelihood=True, prompts=('',) * len(CAPTIONS),
  ),
  'vq': System(
    4, 'VQ-VAE, 512 codes', 'notes/vq.py',
    'CIFAR-10: 4.67 bits per dimension (van den Oord et al. 2017, section 4.1)', pictures=False,
  ),
  'fsq': System(
    4, 'FSQ, 512 codes', 'notes/fsq.py',
    'ImageNet 256: FID 4.53 of MaskGIT on its codes, 4.51 on those of VQ (Mentzer et al. 2023, '
    'figure 4)', pictures=False,
  ),
  'dvae': System(
    4, 'Discrete VAE, 512 codes', 'notes/dvae.py',
    '8192 codes, 32 x 32 of 256 x 256 pixels (Ramesh et al. 2021, section 2.1)', pictures=False,
  ),
  'dalle': System(
    7, 'DALL-E', 'notes/dalle.py',
    'MS-COCO 256: FID about 28, zero-shot (Ramesh et al. 2022, table 2)', parts=('dvae',),
  ),
  'dalle2_decoder': System(
    7, 'DALL-E 2, its decoder of embeddings', 'notes/dalle2_decoder.py', 'not given by itself',
    metrics=(),
  ),
  'dalle2_prior': System(
    7, 'DALL-E 2, diffusion prior and decoder', 'notes/dalle2_prior.py',
    'MS-COCO 256: FID 10.39, zero-shot (Ramesh et al. 2022, table 2)',
    parts=('dalle2_decoder',),
  ),
  'dalle2_prior_tokens': System(
    7, 'DALL-E 2, autoregressive prior and decoder', 'notes/dalle2_prior_tokens.py',
    'MS-COCO 256: FID 10.63, zero-shot (Ramesh et al. 2022, table 2)',
    parts=('dalle2_decoder',),
  ),
  'latent_diffusion': System(
    5, 'Latent diffusion (DiT, rectified flow)', 'openmoji/dit_flow.py',
    'MS-COCO 256: FID 12.63, guided, 250 steps (LDM-KL-8-G; Rombach et al. 2022, table 2)',
  ),
  'imagen_base': System(
    6, 'Imagen, its base at 16 pixels', 'notes/imagen_base.py', 'not given by itself',
  ),
  'imagen_32': System(
    6, 'Imagen, 16 to 32', 'notes/imagen_32.py', 'not given by itself', metrics=(),
  ),
  'imagen': System(
    6, 'Imagen, the cascade 16 to 32 to 64', 'notes/imagen_64.py',
    'MS-COCO 256: FID 7.27, zero-shot (Saharia et al. 2022, table 1)',
    parts=('imagen_base', 'imagen_32'), cascade=True,
  ),
  'enlarger': System(
    6, 'A network that enlarges, without diffusion', 'notes/enlarger.py', 'none', metrics=(),
  ),
  'clip': System(
    8, 'CLIP', 'openmoji/clip.py',
    'ImageNet: 76.2 %, zero-shot (ViT-L/14 at 336 pixels; Radford et al. 2021, table 1)',
    pictures=False,
  ),
  'siglip': System(
    8, 'SigLIP', 'notes/siglip.py',
    'ImageNet: 84.5 %, zero-shot, beside a locked image tower (Zhai et al. 2023, abstract)',
    pictures=False,
  ),
  'sequences': System(
    9, 'A transformer on signals', 'notes/sequences.py', 'none: the spectrum is known',
    pictures=False,
  ),
  'lcm': System(
    10, 'Consistency distillation, 4 steps', 'notes/lcm.py',
    'CIFAR-10: FID 2.93 in two steps (Song et al. 2023, table 1)',
  ),
  'progressive': System(
    10, 'Progressive distillation, 4 steps', 'notes/progressive.py',
    'CIFAR-10: FID 3.00 in four steps (Salimans & Ho 2022, table 2)',
  ),
  'progressive2': System(
    10, 'the same, 2 steps', 'notes/progressive2.py', 'FID 4.51 in two', before=('progressive',)
  ),
  'progressive1': System(
    10, 'the same, 1 step', 'notes/progressive1.py', 'FID 9.12 in one', before=('progressive2',)
  ),
  'mean_flow': System(
    10, 'Mean flow, 1 step', 'notes/mean_flow.py',
    'ImageNet 256: FID 3.43 in one step, by class (MeanFlow-XL/2; Geng et al. 2025, table 2)',
    before=('latent_diffusion',),
  ),
}
"""Systems by name, each after those that it takes something from."""


def _in_steps(of: str, steps: int, *more: str, model: str = '') -> System:
  """Return a system in another number of steps; model: in place of its own weights."""
  options = (*SYSTEMS[of].options[:-2], *more, '--steps', str(steps))
  weights = model or SYSTEMS[of].weights or of
  before = () if model else (weights,)
  return SYSTEMS[of]._replace(before=before, weights=weights, options=options)


EULER = ('--sampler', 'flow_euler', '--guidance', '2')
COMPARED = {
  **{f'ddim_{steps}': _in_steps('ddim', steps) for steps in (100, 20, 10)},
  'unet_50': _in_steps(
    'lcm', 50, '--sampler', 'ddim', '--guidance', '2', model='asset:text-to-image-openmoji-64'
  ),
  'lcm_2': _in_steps('lcm', 2),
  'lcm_1': _in_steps('lcm', 1),
  'dit_50': _in_steps('latent_diffusion', 50, *EULER),
  'mean_flow_4': _in_steps('mean_flow', 4),
  'mean_flow_2': _in_steps('mean_flow', 2),
}
"""Of the second table alone."""
ALL = SYSTEMS | COMPARED
MANY = 50
BY_STEPS = {
  'ddim': ('DDIM, eta 0', MANY), 'ddim_100': ('the same', 100), 'ddim_20': ('the same', 20),
  'ddim_10': ('the same', 10),
  'unet_50': ('U-Net of the package by DDIM, guidance 2', MANY),
  'lcm': ('consistency distillation of it', 4), 'lcm_2': ('the same', 2), 'lcm_1': ('the same', 1),
  'progressive': ('progressive distillation of it', 4), 'progressive2': ('its next round', 2),
  'progressive1': ('its last round', 1),
  'dit_50': ("DiT by Euler's method, guidance 2", MANY),
  'mean_flow_4': ('mean flow of it', 4), 'mean_flow_2': ('the same', 2),
  'mean_flow': ('the same', 1),
}
"""Rows of the second table: words and steps; those after one of MANY steps are held to it."""


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
    found['scores'] = [
      'evaluate', 'model', *_source(name), *(scored if system.pictures else ()),
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
    scores, columns = loaded('table.json'), ('generated', 'untrained', 'real', 'test')
    entry |= {column: scores[column] for column in columns if column in scores}
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
  'codes_used': ('codes used:', '.0%', ''), 'code_perplexity': ('perplexity', '.0f', ''),
}
"""Other figures that may be told: words before, digits, unit."""


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
    name = next(n for n in ('latent_bits_per_dim_discrete', 'elbo_bits_per_dim') if n in bits)
    parts.append(f'{bits[name]:.2f} bits/dim')
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
    f'{system.number}. {system.title}', f'`configs/{system.recipe}`',
    f'that of `{system.weights}`' if system.weights else training,
    f'{entry["parameters"] / 1e6:.1f} M', distance, *_agreement(scores), _more(entry), system.paper,
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
    'system', 'recipe', 'training', 'parameters', '`fd_clip` (untrained)', 'CLIP score',
    'R@1 of 100', 'classes', 'more', 'the paper, at full scale',
  )
  parts = [markdown(head, rows)]
  if rows := _rows_by_steps(found):
    head = ('by steps', 'steps', '`fd_clip`', f'more than in {MANY}', *head[5:8])
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
  parser.add_argument('what', choices=('run', 'table', 'sheet'))
  parser.add_argument('names', nargs='*', metavar='NAME', help='systems (default: all measured)')


def run(args: argparse.Namespace) -> int:
  """Do it."""
  names = [check(ALL, name, 'NAME') for name in args.names] or list(read())
  if args.what == 'run':
    for name in names:
      add(name, measure(name))
  elif args.what == 'sheet':
    sheet([name for name in names if name in SYSTEMS and _draws(SYSTEMS[name])])
  else:
    README.write_text(replaced(README.read_text(encoding='utf-8')), encoding='utf-8')
  return 0


if __name__ == '__main__':
  raise SystemExit(run_command('benchmarks.notes', sys.modules[__name__]))
