"""plan: what a config needs on chips that are not here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from diffusion_jax.cli.options import add_options, check_overrides, read_options, writing
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Help, Range

if TYPE_CHECKING:
  from diffusion_jax.planning.plan import Plan
  from diffusion_jax.planning.targets import Target

HELP = 'compile the training step for chips that are not here: memory, time, money'
DESCRIPTION = """Compiles the step that train would run, by the real compiler of each target, from
shapes alone: no data and no weights are read, and no chip is needed. TPUs need the wheel libtpu,
GPUs that of JAX's CUDA plugin; what is missing is said with the command that installs it.

A target is a TPU slice (v5e:4x4, v5p:2x2x2, v6e:2x4), GPUs of a machine, perhaps times machines
(h100:8, a100:8x4), or devices of a CPU (cpu:4). A plan is kept: asking again is instant.

examples:
  python -m diffusion_jax plan --config openmoji/quickstart --target v5e:2x2,h100:8
  python -m diffusion_jax plan --config finetune/sd21 --target v5p:2x2x2 --search --price 4.2"""


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
  html: Annotated[str, Help('where a page with bars of memory and time goes', 'FILE')] = ''
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
  from diffusion_jax.planning.words import NOTE, plan_lines, table
  from diffusion_jax.recipe import load_config

  config = untyped(parse(load_config(options.config, args.overrides)))
  folder, plans = Path(options.cache) if options.cache else CACHE, []
  paid = [prices.get(target.name, prices.get('')) for target in targets]
  for target, price in zip(targets, paid, strict=True):
    compiled = partial(make_plan, target=target, folder=folder)
    own = _searched(config, target, compiled, options.most) if options.search else config
    plans.append(compiled(own))
    print('\n'.join(plan_lines(plans[-1], price)), flush=True)
  print('\n'.join(['', *table(plans, paid), '', NOTE]))
  if options.json:
    rows = [plan.as_json(price) for plan, price in zip(plans, paid, strict=True)]
    with writing(options.json, '--json') as path:
      text = json.dumps({'config': config, 'plans': rows}, indent=2)
      path.write_text(f'{text}\n', encoding='utf-8')
    print(f'the figures are in {path}')
  if options.html:
    with writing(options.html, '--html') as path:
      _write_page(path, plans, paid)
    print(f'the page is {path}')
  return int(any(plan.error for plan in plans))


def _write_page(path: Path, plans: list[Plan], prices: list[float | None]) -> None:
  from diffusion_jax.planning.words import NOTE, page_row, table
  from diffusion_jax.viz.plan import write_plan_page

  rows = [page_row(plan, price) for plan, price in zip(plans, prices, strict=True)]
  write_plan_page(path, rows, table(plans, prices), NOTE)


def _searched(
  config: dict[str, Any], target: Target, compiled: Callable[[dict[str, Any]], Plan], most: int
) -> dict[str, Any]:
  """Return the config with the best of what a search finds, after printing that."""
  from diffusion_jax.planning.search import search, search_lines

  try:
    found = search(config, target, compiled, most)
  except UserError as error:  # The other targets go on.
    print(f'{target}: {error}')
    return config
  print(f'{target}: ' + '\n'.join(search_lines(found)), flush=True)
  return found[0].applied(config)


def _only_cpus(count: int) -> None:
  """Have this process use no chip that may be here, and so many CPU devices, if none is in use."""
  import jax

  try:
    jax.config.update('jax_platforms', 'cpu')
    # Two ways to ask for devices exclude each other.
    if count > 1 and 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
      jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # In a notebook; the devices that are there have to do.
    return
