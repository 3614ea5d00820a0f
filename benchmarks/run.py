"""The speed at which a config trains, samples, encodes or reads.

  python -m benchmarks.run train --config configs/openmoji/quickstart.py --synthetic
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError

DESCRIPTION = """Measures what the config describes on the devices that are there; no run is started
and nothing but --json is written. Any key of the config can be changed as for train.

  train    steps of the train loop: time, model FLOPs, utilisation, memory, compile time
  sample   pictures by the run's sampler, from prompts to pixels; needs no data
  encode   autoencoder and text encoder, as settings.cache uses them; needs no data
  data     the loader alone
  scaling  what simulated devices send each other in a step of train, data parallel and FSDP, each
           with loop.batch_size examples; nothing is run

examples:
  python -m benchmarks.run train --config configs/openmoji/quickstart.py --synthetic
  python -m benchmarks.run sample --config configs/openmoji/quickstart.py
  python -m benchmarks.run scaling --config configs/openmoji/quickstart.py --devices 1,2,4,8"""
SILENT = {'evaluate_every_steps': 0, 'evaluate_samples': 0, 'keep_best': '', 'wandb_project': ''}
BATCHES = {'sample': 4, 'encode': 64}


def built(config: dict[str, Any], workdir: str, synthetic: bool) -> Any:
  """Build the Training of a resolved config, without networks that only score the model."""
  from diffusion_jax.build import build

  return build({**config, 'loop': {**config['loop'], **SILENT}}, workdir, synthetic)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add what to measure, --config, and how often."""
  parser.add_argument('what', choices=('train', 'sample', 'encode', 'data', 'scaling'))
  parser.add_argument('--config', required=True, metavar='FILE', help='config file to '
                      'measure, or the name of a recipe of the package, as openmoji/quickstart')
  parser.add_argument('--json', metavar='FILE', help='where the figures go, with device, versions, '
                      'command and config')
  parser.add_argument('--synthetic', action='store_true',
                      help='random numbers in place of the data set, which need not be there')
  parser.add_argument('--steps', type=_positive, default=20, metavar='N',
                      help='steps or batches that are measured (default: 20)')
  parser.add_argument('--warmup', type=_positive, default=3, metavar='N',
                      help='steps or batches before those (default: 3)')
  parser.add_argument('--batch', type=_positive, metavar='N',
                      help='of sample and encode: images at a time (default: 4 and 64); train and '
                      'data take loop.batch_size')
  parser.add_argument('--devices', type=_counts, default=[1, 2, 4, 8], metavar='N,N,...',
                      help='of scaling: numbers of devices (default: 1,2,4,8)')
  parser.add_argument('--config.KEY', dest='example', metavar='VALUE',
                      help='change any key of the config; repeat for several')


def _positive(text: str) -> int:
  if (value := int(text)) < 1:
    raise argparse.ArgumentTypeError(f'{value} is below 1')
  return value


def _counts(text: str) -> list[int]:
  return sorted({_positive(part) for part in text.split(',')})


def run(args: argparse.Namespace) -> int:
  """Measure, print, write."""
  from diffusion_jax.config import parse, untyped
  from diffusion_jax.recipe import load_config

  if args.json and not (out := Path(args.json)).absolute().parent.is_dir():
    raise UserError(f'--json {out} cannot be written; give a file in a directory that is there.')
  config = untyped(parse(load_config(args.config, args.overrides)))
  result = {'what': args.what, **_measure(config, args)}
  import jax

  from benchmarks.report import table

  if jax.process_index() == 0:
    print(table(result))
    if args.json:
      _write(Path(args.json), args, config, result)
  return 0


def _measure(config: dict, args: argparse.Namespace) -> dict:
  from benchmarks import sampling, scaling, timing, training
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.parallel.startup import start_distributed

  if args.what == 'scaling':
    return {'meshes': scaling.measure_scaling(config, args.devices)}
  if args.what in BATCHES:
    sampling.check(config, args.what)
  enable_compile_cache()
  start_distributed(say=lambda text: None)
  counts, load = training.Counts(args.warmup, args.steps), timing.load_average()
  synthetic, batch = args.synthetic or args.what in BATCHES, args.batch or BATCHES.get(args.what)
  with tempfile.TemporaryDirectory() as folder:
    made = built(config, folder, synthetic)
    result = {
      'train': lambda: training.measure_training(made, counts),
      'data': lambda: training.measure_data(made, counts),
      'sample': lambda: sampling.measure_sampling(made, counts, batch),
      'encode': lambda: sampling.measure_encoding(made, counts, batch),
    }[args.what]()
  return {**result, 'synthetic': synthetic, 'load_average': load}


def _write(path: Path, args: argparse.Namespace, config: dict, result: dict) -> None:
  from benchmarks.timing import cpu_cores
  from diffusion_jax.runs.directory import versions

  found = versions()
  device = {name: found.pop(name) for name in ('platform', 'device', 'devices', 'processes')}
  device['cpu_cores'] = cpu_cores()
  command = shlex.join(['python', '-m', 'benchmarks.run', *sys.argv[1:]])
  values = {'command': command, 'device': device, 'versions': found, **result,
            'config_file': args.config, 'config': config}
  path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
  print(f'the figures are in {path}')


if __name__ == '__main__':
  from benchmarks import command

  sys.exit(command.run_command('benchmarks.run', sys.modules[__name__], overrides=True))
