"""plan: what a config needs on chips that are not here."""

import argparse
import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Annotated

from diffusion_jax.cli.options import add_options, check_overrides, read_options, writing
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Help, Range

HELP = 'compile the training step for chips that are not here: memory, time, money'
DESCRIPTION = """Compiles the step that train would run, by the real compiler of each target, from
shapes alone: no data and no weights are read, and no chip is needed. TPUs need the wheel libtpu,
GPUs that of JAX's CUDA plugin; what is missing is said with the command that installs it.

A target is a TPU slice (v5e:4x4, v5p:2x2x2, v6e:2x4), GPUs of a machine, perhaps times machines
(h100:8, a100:8x4), or devices of a CPU (cpu:4). A plan is kept: asking again is instant.

example:
  python -m diffusion_jax plan --config openmoji/quickstart --target v5e:2x2,h100:8"""


@dataclasses.dataclass(frozen=True)
class Options:
  """A config, and where it is to run."""

  config: Annotated[str, Help(
    'config file, or the name of a recipe of the package, such as openmoji/quickstart', 'FILE'
  )]
  target: Annotated[str, Help('devices, several divided by commas', 'CHIP:SHAPE,...')]
  search: Annotated[bool, Help(
    'compare meshes, remat and accumulation for the same batch; print the keys of the best'
  )] = False
  most: Annotated[int, Range(1, 100), Help(
    'with --search, candidates to compile that fit (default: 3)', 'N'
  )] = 3
  price: Annotated[str, Help(
    "of one chip's hour, for all targets or by chip: 1.2, or v5e=1.2,h100=3", 'P'
  )] = ''
  json: Annotated[str, Help('where all figures go', 'FILE')] = ''
  cache: Annotated[str, Help(
    'where plans are kept (default: ~/.cache/diffusion_jax/plans)', 'DIR'
  )] = ''

  def prices(self) -> dict[str, float]:
    """Return prices by chip; '' for all others. UserError: a price that is no number."""
    found = {}
    for part in filter(None, self.price.split(',')):
      name, _, text = part.rpartition('=')
      if not re.fullmatch(r'\d+(\.\d*)?|\.\d+', text) or not math.isfinite(float(text)):
        raise UserError(f'--price {part} is no price; give 1.2, or v5e=1.2,h100=3.')
      found[name.strip()] = float(text)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add --config, --target, and what may change."""
  add_options(parser, Options)
  parser.add_argument('--config.KEY', dest='example', metavar='VALUE',
                      help='change any key of the config; repeat for several')


def run(args: argparse.Namespace) -> int:
  """Compile for one target after the other; 1 where one of them has no program."""
  check_overrides(args)
  options = read_options(Options, args)
  from diffusion_jax.planning.targets import CPU, Target

  targets = [Target.of(text) for text in options.target.split(',')]
  prices = options.prices()
  _only_cpus(max((target.count for target in targets if target.name == CPU), default=1))
  from diffusion_jax.config import parse, untyped
  from diffusion_jax.planning.plan import CACHE, make_plan
  from diffusion_jax.planning.search import search, search_lines
  from diffusion_jax.planning.words import NOTE, plan_lines, table
  from diffusion_jax.recipe import load_config

  config = untyped(parse(load_config(options.config, args.overrides)))
  folder, plans = Path(options.cache) if options.cache else CACHE, []
  paid = [prices.get(target.name, prices.get('')) for target in targets]
  for target, price in zip(targets, paid, strict=True):
    own = config
    if options.search and target.chip:
      try:
        found = search(config, target, partial(make_plan, target=target, folder=folder),
                       options.most)
      except UserError as error:
        print(f'{target}: {error}')
      else:
        print('\n'.join([f'{target}: {line}' if not i else line for i, line in
                         enumerate(search_lines(found))]), flush=True)
        own = found[0].applied(config)
    plans.append(make_plan(own, target, folder))
    print('\n'.join(plan_lines(plans[-1], price)), flush=True)
  print('\n'.join(['', *table(plans, paid), '', NOTE]))
  if options.json:
    rows = [plan.as_json(price) for plan, price in zip(plans, paid, strict=True)]
    with writing(options.json, '--json') as path:
      path.write_text(json.dumps({'config': config, 'plans': rows}, indent=2) + '\n')
    print(f'the figures are in {path}')
  return int(any(plan.error for plan in plans))


def _only_cpus(count: int) -> None:
  """Have this process use no chip that may be here, and so many CPU devices, if none is in use."""
  import jax

  try:
    jax.config.update('jax_platforms', 'cpu')
    if count > 1:
      jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # In a notebook; the devices that are there have to do.
    return
