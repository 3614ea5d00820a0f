"""Optimizers side by side: time of a step, memory, loss after equal steps and equal time.

  python -m benchmarks.optimizers --json benchmarks/optimizers.json --table docs/craft.md
"""

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.run import built
from benchmarks.table import markdown, seconds
from diffusion_jax.errors import UserError

DESCRIPTION = """Trains a small latent model on OpenMoji with each optimizer, from the same weights,
on the same pictures in the same order, with the same noise and times. Each goes on until it has
made --steps steps and has taken --seconds for them; at both points the loss of its average is
measured on pictures that none has trained on, with one noise. What is in --json already is not made
again, so a run that was stopped goes on.

examples:
  python -m benchmarks.optimizers --json benchmarks/optimizers.json --table docs/craft.md
  python -m benchmarks.optimizers --arms adamw muon --steps 20 --seconds 5"""
BEGIN = '<!-- Optimizers: written by python -m benchmarks.optimizers -->'
END = '<!-- End of optimizers -->'
RATE = 1.5e-3
ARMS: dict[str, dict[str, Any]] = {
  'adamw': {},
  'adamw, bfloat16': {'moments': 'bfloat16'},
  'adamw, int8_dynamic': {'moments': 'int8_dynamic'},
  'adamw, int8_linear': {'moments': 'int8_linear'},
  'adafactor': {'options': {'multiply_by_parameter_scale': False, 'min_dim_size_to_factor': 32}},
  'lion': {'learning_rate': RATE / 5, 'weight_decay': 0.05},
  'muon': {},
  'muon, int8_linear': {'moments': 'int8_linear'},
  'prodigy': {'learning_rate': 1.0},
  'schedule_free': {'learning_rate': 2 * RATE},
  'schedule_free, int8_linear': {'learning_rate': 2 * RATE, 'moments': 'int8_linear'},
}
"""Keys of `config.optimizer` that differ from BASE; the name is what stands before a comma."""
BASE = {'learning_rate': RATE, 'schedule': 'constant', 'warmup_steps': 20, 'b2': 0.99}
HELD_OUT, EPOCH = 8, 92
"""Batches that are scored, and trained on again and again; an epoch has 103."""
CHANGES = (
  '--config.settings.unet.block_out_channels=(48,96)', '--config.loop.ema_halflife_images=640.0',
  '--config.data.workers=0',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add which arms, how long each, and where figures and table go."""
  parser.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS), metavar='ARM',
                      help=f'of: {"; ".join(ARMS)} (default: all)')
  parser.add_argument('--steps', type=int, default=150, help='at least (default: 150)')
  parser.add_argument('--seconds', type=float, default=25.0, help='at least (default: 25)')
  parser.add_argument('--json', metavar='FILE', help='figures, kept after each arm')
  parser.add_argument('--table', metavar='FILE', help='markdown file with the two marks')


@dataclasses.dataclass
class Arm:
  """One optimizer in training: steps are timed one by one, and evaluating takes no time."""

  update: Callable[..., Any]
  score: Callable[..., Any]
  state: Any
  took: list[float] = dataclasses.field(default_factory=list)

  def run(self, batches: Sequence[Any], steps: int, budget: float) -> dict[str, Any]:
    """The losses after so many steps and so many seconds, whichever comes first and second."""
    found: dict[str, Any] = {}
    while len(found) < 2:
      self.took.append(self._step(batches[len(self.took) % len(batches)]))
      if len(self.took) == steps:
        found['at_steps'] = self._point()
      if 'at_seconds' not in found and sum(self.took) >= budget:
        found['at_seconds'] = self._point()
    return found

  def _step(self, batch: Any) -> float:
    import jax

    start = time.perf_counter()
    self.state, _ = self.update(self.state, batch)
    jax.block_until_ready(self.state)
    return time.perf_counter() - start

  def _point(self) -> dict[str, Any]:
    return {
      'steps': len(self.took), 'seconds': round(sum(self.took), 2),
      'loss': round(float(self.score(self.state)), 5),
    }


def collect(training: Any) -> tuple[list[Any], list[Any]]:
  """(batches to train on, batches that are scored), of one epoch: no picture is in two."""
  from diffusion_jax.parallel.mesh import put_batch

  found = []
  for _ in range(EPOCH + HELD_OUT):
    batch = next(training.loader)
    fields = {name: batch[name] for name in training.task.batch_fields}
    found.append(put_batch(fields, training.mesh))
  return found[:EPOCH], found[EPOCH:]


def measure(training: Any, name: str, batches: tuple[list, list], args: Any) -> dict[str, Any]:
  """Train with an arm's optimizer, and measure."""
  import jax
  import jax.numpy as jnp

  from benchmarks.timing import load_average, quartiles
  from diffusion_jax.config import OptimizerConfig
  from diffusion_jax.parallel.mesh import put_params
  from diffusion_jax.train.compile import compile_step, held
  from diffusion_jax.train.optimizer import make_optimizer
  from diffusion_jax.train.state import abstract_state, initializer
  from diffusion_jax.train.step import make_step

  t, (train, held_out) = training, batches
  config = OptimizerConfig(**{'name': name.partition(',')[0], **BASE, **ARMS[name]})
  shapes = jax.eval_shape(t.task.initialize, jax.random.key(0))
  optimizer = make_optimizer(config, shapes, args.steps, t.mesh.devices.flat[0].platform)
  abstract = abstract_state(t.task, optimizer, True, t.mesh)
  frozen = {role: put_params(params, t.mesh) for role, params in t.task.frozen.items()}
  step = make_step(
    t.task, optimizer, abstract, batch_size=t.loop.batch_size,
    ema_halflife_images=t.loop.ema_halflife_images,
  )
  update, report = compile_step(step, abstract, frozen, train[0])
  state = initializer(t.task, optimizer, t.loop.seed, abstract)(None)

  @jax.jit
  def loss(params, frozen, carry, batch, key):
    return t.task.loss(params, frozen, carry, batch, key, jnp.zeros((), jnp.int32))[0]

  def score(state):
    keys = jax.random.split(jax.random.key(1), len(held_out))
    scored = zip(held_out, keys, strict=True)
    return jnp.stack([loss(state.ema, frozen, state.carry, *one) for one in scored]).mean()

  arm = Arm(lambda state, batch: update(state, frozen, batch), score, state)
  before, first = load_average(), round(float(score(state)), 5)
  found = arm.run(train, args.steps, args.seconds)
  return {
    'optimizer': dataclasses.asdict(config), 'steps': args.steps, 'seconds': args.seconds,
    'step_seconds': quartiles(arm.took), 'compile_seconds': report.seconds,
    'parameters': report.parameters, 'optimizer_bytes': held(abstract.opt_state),
    'state_bytes': report.state, 'temporary_bytes': report.temporary, 'loss_before': first,
    **found, 'load_average': before,
  }


def run(args: argparse.Namespace) -> int:
  """Measure each arm that is not there yet; write figures and table."""
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.config import parse, untyped
  from diffusion_jax.recipe import load_config

  found = _read(args.json)
  todo = [name for name in args.arms if not _is_done(found['arms'].get(name), args)]
  if todo:
    import jax

    enable_compile_cache()
    config = untyped(parse(load_config('openmoji/quickstart', list(CHANGES))))
    with tempfile.TemporaryDirectory() as folder:
      training = built(config, folder, False)
      with jax.set_mesh(training.mesh):
        batches = collect(training)
        for name in todo:
          found['arms'][name] = measure(training, name, batches, args)
          print(f'{name}: {_row(name, found["arms"][name])[1:]}', flush=True)
          _write(args.json, found)
          jax.clear_caches()
  text = table(found)
  print(text)
  if args.table:
    path = Path(args.table)
    path.write_text(replaced(path.read_text(), text))
  return 0


def _is_done(found: dict[str, Any] | None, args: Any) -> bool:
  return found is not None and (found['steps'], found['seconds']) == (args.steps, args.seconds)


def _read(file: str | None) -> dict[str, Any]:
  if file and Path(file).exists():
    return json.loads(Path(file).read_text())
  return {'what': 'optimizers', 'arms': {}}


def _write(file: str | None, found: dict[str, Any]) -> None:
  if not file:
    return
  from benchmarks.timing import cpu_cores
  from diffusion_jax.runs.directory import versions

  of = versions()
  device = {name: of.pop(name) for name in ('platform', 'device', 'devices', 'processes')}
  command = shlex.join(['python', '-m', 'benchmarks.optimizers', *sys.argv[1:]])
  values = {
    'what': 'optimizers', 'command': command, 'config_file': 'openmoji/quickstart',
    'changes': CHANGES, 'device': {**device, 'cpu_cores': cpu_cores()}, 'versions': of,
    'arms': {name: found['arms'][name] for name in ARMS if name in found['arms']},
  }
  Path(file).write_text(json.dumps(values, indent=1) + '\n')


def _row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
  """What the table says of an arm."""
  steps, budget = one['at_steps'], one['at_seconds']
  return (
    name, f'{one["optimizer"]["learning_rate"]:g}', seconds(one['step_seconds']['median']),
    f'{one["optimizer_bytes"] / 1e6:.1f} MB',
    f'{one["optimizer_bytes"] / one["parameters"]:.1f}', f'{steps["loss"]:.4f}',
    f'{budget["loss"]:.4f} ({budget["steps"]} steps)',
  )


def table(found: dict[str, Any]) -> str:
  """The arms in markdown."""
  arms = found['arms']
  if not arms:
    raise UserError('there is nothing to show; give --arms.')
  one = next(iter(arms.values()))
  head = (
    'optimizer, moments', 'learning rate', 'a step', 'its state', 'bytes a parameter',
    f'loss after {one["steps"]} steps', f'loss after {one["seconds"]:g} s',
  )
  return markdown(head, [_row(name, arms[name]) for name in ARMS if name in arms])


def replaced(text: str, new: str) -> str:
  """The file with the table between its marks. UserError where it lacks them."""
  if BEGIN not in text or END not in text:
    raise UserError(f'the file has no two lines {BEGIN} and {END}; add them where the table goes.')
  before, rest = text.split(BEGIN)
  return f'{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}'


if __name__ == '__main__':
  from benchmarks import command

  sys.exit(command.run_command('benchmarks.optimizers', sys.modules[__name__]))
