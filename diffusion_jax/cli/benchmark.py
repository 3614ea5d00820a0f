"""benchmark: how fast a config trains, samples, encodes or reads."""

import argparse
import json
import tempfile
from pathlib import Path

from diffusion_jax.cli.options import check_overrides
from diffusion_jax.errors import UserError

HELP = 'measure speed, memory and compile time of a config'
WHAT = ('train', 'sample', 'encode', 'data')
DESCRIPTION = """Measures what the config describes on the devices that are there; no run is started
and nothing but --json is written. Any key of the config can be changed as for train.

  train   steps of the train loop: time, model FLOPs, utilisation, memory, compile time
  sample  pictures by the run's sampler, from prompts to pixels; needs no data
  encode  autoencoder and text encoder, as settings.cache uses them; needs no data
  data    the loader alone

examples:
  python -m diffusion_jax benchmark --config configs/openmoji/quickstart.py --synthetic
  python -m diffusion_jax benchmark --config configs/openmoji/quickstart.py --what sample
  python -m diffusion_jax benchmark --config configs/openmoji/quickstart.py --scaling 1,2,4,8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """--config, what to measure, and how often."""
  parser.add_argument('--config', required=True, metavar='FILE', help='config file to '
                      'measure, or the name of a recipe of the package, as openmoji/quickstart')
  parser.add_argument('--json', metavar='FILE', help='where the figures go, with device, versions, '
                      'command and config')
  parser.add_argument('--what', default='train', choices=WHAT, help='default: train')
  parser.add_argument('--synthetic', action='store_true',
                      help='random numbers in place of the data set, which need not be there')
  parser.add_argument('--steps', type=int, default=20, metavar='N',
                      help='steps or batches that are measured (default: 20)')
  parser.add_argument('--warmup', type=int, default=3, metavar='N',
                      help='steps or batches before those (default: 3)')
  parser.add_argument('--batch', type=int, metavar='N',
                      help='of sample and encode: images at a time (default: 4 and 64); train and '
                      'data take loop.batch_size')
  parser.add_argument('--scaling', metavar='N,N,...',
                      help='instead: what so many simulated devices send each other in a step of '
                      'train, data parallel and FSDP, each with loop.batch_size examples')
  parser.add_argument('--config.KEY', dest='example', metavar='VALUE',
                      help='change any key of the config; repeat for several')


def check(args: argparse.Namespace) -> list[int]:
  """The numbers of devices of --scaling; UserError for what cannot be, before any work."""
  check_overrides(args)
  for name, least in (('steps', 1), ('warmup', 1), ('batch', 1)):
    value = getattr(args, name)
    if value is not None and value < least:
      raise UserError(f'--{name} is {value}; give {least} or more.')
  if args.batch is not None and args.what not in ('sample', 'encode'):
    raise UserError(
      f'--batch does nothing with --what {args.what}; set --config.loop.batch_size={args.batch}.'
    )
  if args.json:
    out = Path(args.json)
    if out.is_dir() or not out.absolute().parent.is_dir():
      raise UserError(f'--json {out} cannot be written; give a file in a directory that is there.')
  if args.scaling is None:
    return []
  if args.what != 'train':
    raise UserError(f'--scaling is of training steps; leave --what {args.what} out.')
  try:
    counts = [int(part) for part in args.scaling.split(',')]
  except ValueError:
    counts = [0]
  if min(counts) < 1:
    raise UserError(f'--scaling {args.scaling} is no list of devices; give one such as 1,2,4,8.')
  return sorted(set(counts))


def run(args: argparse.Namespace) -> int:
  """Measures, prints, writes."""
  counts = check(args)
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.benchmark.report import NOTE, collective_rows, rows, table
  from diffusion_jax.recipe import load_config, parse, resolved

  config = resolved(parse(load_config(args.config, args.overrides)))
  _check_task(config, args.what)
  if counts:
    from diffusion_jax.benchmark.scaling import measure_scaling

    result = {'what': 'scaling', 'meshes': measure_scaling(config, counts)}
    lines = collective_rows(result['meshes'])
  else:
    enable_compile_cache()
    result = {'what': args.what, **_measure(config, args)}
    lines = rows(result)
  import jax

  if jax.process_index() == 0:
    print(table(lines))
    if counts:
      print(NOTE)
    if args.json:
      _write(Path(args.json), args, config, result)
  return 0


def _check_task(config: dict, what: str) -> None:
  from diffusion_jax.recipe import LATENT

  if what in ('sample', 'encode') and config['task'] not in LATENT:
    raise UserError(
      f'--what {what} is of models that draw from prompts, and this config trains '
      f'{config["task"]}; use --what train or data.'
    )
  pictured = config['settings'].get('train') == 'controlnet' or (
    config['settings'].get('inputs', 'none') != 'none'
  )
  if what == 'sample' and pictured:
    raise UserError('--what sample is of models that are told a prompt alone; use --what train.')


def _measure(config: dict, args: argparse.Namespace) -> dict:
  from diffusion_jax.benchmark import sampling, training
  from diffusion_jax.benchmark.building import built
  from diffusion_jax.benchmark.timing import load_average
  from diffusion_jax.parallel.startup import start_distributed

  start_distributed(say=lambda text: None)
  counts, load = training.Counts(args.warmup, args.steps), load_average()
  synthetic = args.synthetic or args.what in ('sample', 'encode')
  with tempfile.TemporaryDirectory() as folder:
    made = built(config, folder, synthetic)
    result = {
      'train': lambda: training.measure_training(made, counts),
      'data': lambda: training.measure_data(made, counts),
      'sample': lambda: sampling.measure_sampling(made, counts, args.batch or 4),
      'encode': lambda: sampling.measure_encoding(made, counts, args.batch or 64),
    }[args.what]()
  return {**result, 'synthetic': synthetic, 'load_average': load}


def _write(path: Path, args: argparse.Namespace, config: dict, result: dict) -> None:
  from diffusion_jax.benchmark.timing import cpu_cores
  from diffusion_jax.runs.directory import command_line, versions

  found = versions()
  device = {name: found.pop(name) for name in ('platform', 'device', 'devices', 'processes')}
  device['cpu_cores'] = cpu_cores()
  values = {'command': command_line(), 'device': device, 'versions': found, **result,
            'config_file': args.config, 'config': config}
  path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
  print(f'the figures are in {path}')
