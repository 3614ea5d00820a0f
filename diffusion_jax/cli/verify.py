"""verify: steps of a run made again, and what differs."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Annotated

from diffusion_jax.cli.options import add_options, read_options
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Count, Help, Positive

HELP = 'make steps of a run again and say whether they are what was recorded'
DESCRIPTION = """Makes steps of a run again from one of its checkpoints, and compares exact digests
of the loss, the norm of the gradient and the parameters with those that training recorded in
digests.jsonl. The config, the package's files, the data, the exported weights and versions are
compared with run_card.json; what differs is named. The run is left as it is.

The exit code is 0 where all is the same, 1 where anything differs. Another machine, or another
number of devices, may round otherwise. On GPUs train with --config.deterministic=True.

example:
  python -m diffusion_jax verify runs/quickstart --steps 40"""


@dataclasses.dataclass(frozen=True)
class Options:
  """A run, and which of its steps."""

  run: str
  step: Annotated[Count | None, Help(
    'a checkpoint to begin with (default: the newest with recorded steps after it)', 'S'
  )] = None
  steps: Annotated[Positive | None, Help(
    'how many steps (default: up to the next that was recorded)', 'K'
  )] = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('run', metavar='RUN', help='a run of train')
  add_options(parser, Options)


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.build import build
  from diffusion_jax.files import reading
  from diffusion_jax.runs import run_card
  from diffusion_jax.runs.directory import RunDirectory
  from diffusion_jax.train.rerun import rerun

  options = read_options(Options, args)
  directory = RunDirectory(options.run)
  _check_over(directory)
  card, recorded = directory.read_json(run_card.CARD), run_card.read_digests(directory)
  first, last = _steps(options, directory, recorded)
  with reading(directory.path / run_card.CARD, 'is not the card of a run', 'restore that file'):
    made_with = run_card.card_at(card, first)
    found = run_card.differences(card, {'config': directory.read_json('config.json')})
    edited = bool(found)
    found += run_card.differences(made_with, run_card.described(directory, made_with['config']))
  found += run_card.differences(card, {'weights': run_card.weight_digests(directory.model)})
  if not edited:  # Else it cannot be built.
    try:
      enable_compile_cache()
      training = build(made_with['config'], options.run)
      made = rerun(training, first, last, [s for s in recorded if run_card.PARAMS in recorded[s]])
    except UserError as error:  # Other data, another model, a damaged checkpoint.
      found.append(str(error))
    else:
      found += _compared(recorded, made)
  for sentence in found:
    print(f'differs: {sentence}')
  if found:
    return 1
  same = [
    name for step, values in made.items() for name in values if name in recorded.get(step, ())
  ]
  lines, weights = same.count(run_card.LOSS), same.count(run_card.PARAMS)
  print(
    f'verified: steps {first + 1} to {last} of {options.run} are what was recorded, to the bit: '
    f'loss and gradient norm of {lines} {"line" if lines == 1 else "lines"}, parameters of '
    f'{weights} {"step" if weights == 1 else "steps"}'
  )
  return 0


def _check_over(directory) -> None:
  from diffusion_jax.runs.keeper import FINAL

  state = directory.read_json('status.json').get('state')
  if state not in (*FINAL, 'killed'):
    raise UserError(f'{directory.path} is {state}; wait until it has ended.')


def _steps(
  options: Options, directory, recorded: Mapping[int, Mapping[str, str]]
) -> tuple[int, int]:
  """Return (the step of the checkpoint, the last step to make). UserError for impossible ones."""
  from diffusion_jax.checkpoint.checkpoints import Checkpoints
  from diffusion_jax.runs.run_card import LOSS

  steps = Checkpoints(directory.checkpoints, read_only=True).steps()
  logged = [step for step, values in recorded.items() if LOSS in values]
  end = max(logged, default=0)
  usable = [step for step in steps if step < end]
  if options.step is not None and options.step not in usable:
    raise UserError(
      f'there is no checkpoint of step {options.step} with recorded steps after it; those of '
      f'{directory.path} are of {", ".join(map(str, usable)) or "no step"}.'
    )
  if not usable:
    raise UserError(
      f'{directory.path} has no checkpoint with recorded steps after it; train with '
      '--config.loop.keep_checkpoints=2 or more.'
    )
  first = usable[-1] if options.step is None else options.step
  following = next(step for step in logged if step > first)
  last = following if options.steps is None else first + options.steps
  if not following <= last <= max(recorded):
    raise UserError(
      f'--steps {options.steps} ends at step {last}; give {following - first} to '
      f'{max(recorded) - first}, the steps after {first} that were recorded.'
    )
  return first, last


def _compared(
  recorded: Mapping[int, Mapping[str, str]], made: Mapping[int, Mapping[str, str]]
) -> list[str]:
  """Return sentences on digests that differ; of each kind the first step alone."""
  from diffusion_jax.runs.run_card import PARAMS, mean_of

  found: dict[str, str] = {}
  for step, values in made.items():
    for name, value in values.items():
      was = recorded.get(step, {}).get(name)
      if was is None or was == value or name in found:
        continue
      if name == PARAMS:
        found[name] = f'the parameters at step {step} are not those of the training'
      else:
        found[name] = (
          f'{name} at step {step} was {mean_of(was):.9g} and is now {mean_of(value):.9g}'
        )
  return list(found.values())
