"""Held-out truth while training: losses, a run that ends by them, and what a resume makes of it."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.config import MeshConfig
from diffusion_jax.data.sources.arrays import ArraySource, open_points
from diffusion_jax.diffusion.noise import NoiseSchedule
from diffusion_jax.diffusion.objective import ObjectiveConfig
from diffusion_jax.evaluation.held_out import HeldOutLoss
from diffusion_jax.evaluation.patience import course
from diffusion_jax.formats.networks import format_of
from diffusion_jax.models.mlp import MLPConfig
from diffusion_jax.parallel.mesh import make_mesh, put_params
from diffusion_jax.pipelines.model import DENOISER
from diffusion_jax.pipelines.spaces import VectorSpace
from diffusion_jax.registry import SOURCES
from diffusion_jax.train import loop
from diffusion_jax.train.tasks.toy import PointDiffusion, ToyTaskConfig
from tests import tiny

OWN = (('held_out_loss', {'pictures': 64, 'levels': 4}),)
LOOP = {
  'total_steps': 400, 'checkpoint_every_steps': 20, 'evaluate_every_steps': 20,
  'keep_checkpoints': 1, 'evaluators': OWN, 'evaluate_samples': 0, 'log_every_steps': 20,
  'keep_best': 'held_out_loss', 'stop_when': 'held_out_loss', 'stop_patience': 3,
}


def test_the_best_and_how_long_none_was_better():
  values = {1: 3.0, 2: 1.0, 3: float('nan'), 4: 1.05, 5: 0.95}
  assert course(values, highest=False) == (5, 0, 5)
  assert course(values, highest=False, margin=0.1) == (2, 3, 5)
  assert course(values, highest=True) == (1, 4, 5)
  assert course({1: float('nan')}, highest=True) is None


def planted(config):
  """Eight points to train on, and a thousand others of the same two half circles."""
  train, test = (open_points('moons', split, 8) for split in ('train', 'test'))
  first = np.tile(train[0]['points'], (8, 1, 1))
  return ArraySource({'points': first}), ArraySource({
    'points': np.stack([test[i]['points'] for i in range(128)])
  })


@pytest.fixture(scope='module')
def arguments(tmp_path_factory):
  """arguments(workdir): a training that soon learns its few points by heart."""
  values = tiny.toy_config(
    {'width': 64, 'depth': 2}, loop=LOOP, optimizer={'learning_rate': 1e-2},
    data={'dataset': 'planted', 'size': 8},
  )
  recipe = tiny.write_config(tmp_path_factory.mktemp('held_out') / 'recipe.py', values)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(SOURCES, 'planted', planted)
    yield lambda workdir: ('train', '--config', recipe, '--workdir', workdir, '--quiet')


def test_a_planted_overfit_ends_a_run_and_a_kill_changes_nothing(
  arguments, command, tmp_path, monkeypatch
):
  run = tmp_path / 'run'
  assert command(*arguments(run)) == 0
  lines = tiny.metrics(run, 'evaluation')
  loss = {step: line['held_out_loss'] for step, line in lines.items()}
  best, last = min(loss, key=loss.get), max(loss)
  # It is learned first, and then by heart: the loss on what is trained on goes on falling.
  assert 20 < best < last == best + 60 < 400
  assert lines[last]['seen_loss'] < lines[best]['seen_loss'] < lines[20]['seen_loss']
  assert lines[last]['held_out_gap'] > lines[best]['held_out_gap'] > lines[20]['held_out_gap']
  for line in lines.values():
    of = [line[f'held_out_loss_{n}_of_4'] for n in (1, 2, 3, 4)]
    assert line['held_out_loss'] == pytest.approx(np.mean(of), rel=1e-6)
  status = json.loads((run / 'status.json').read_text())
  assert status['step'] == last and f'held_out_loss was best at step {best}' in status['message']
  kept = {int(path.name) for path in (run / 'checkpoints').iterdir() if path.is_dir()}
  assert kept == {best, last}
  page = (run / 'report.html').read_text()
  assert 'Learning, remembering, forgetting' in page
  assert f'Take the checkpoint of step {best} (kept by loop.keep_best)' in page

  # Killed at the last step, between its evaluation and the note of it.
  cut, calls, put = tmp_path / 'cut', [], loop.put_batch

  def put_and_stop(*given):
    calls.append(given)
    if len(calls) == last:
      os.kill(os.getpid(), signal.SIGTERM)
    return put(*given)

  monkeypatch.setattr(loop, 'put_batch', put_and_stop)
  assert command(*arguments(cut)) == 143
  noted = cut / 'checkpoints' / 'scores.json'
  values = json.loads(noted.read_text())
  values.pop(str(last), None)
  noted.write_text(json.dumps(values))
  assert command(*arguments(cut)) == 0
  again = tiny.metrics(cut, 'evaluation')
  names = [name for name in lines[last] if 'loss' in name]
  assert {s: [line[n] for n in names] for s, line in again.items()} == {
    s: [line[n] for n in names] for s, line in lines.items()
  }
  assert len(calls) == last  # No further step is made.


@pytest.mark.parametrize(('change', 'words'), [
  ({'stop_when': 'held_out_los'}, 'which way held_out_los is better is not known; set '
                                  'loop.stop_when_is'),
  ({'stop_when': 'fid'}, "loop.stop_when is 'fid', which"),
  ({'keep_best': 'drift'}, "loop.keep_best is 'drift', which"),
  ({'evaluate_every_steps': 0, 'keep_best': ''}, "loop.stop_when is 'held_out_loss', but nothing"),
  ({'evaluators': [['held_out_loss', {'levels': 0}]]}, 'levels of held_out_loss is 0'),
  ({'evaluators': [['drift', {}]]}, 'this one begins with none'),
])
def test_figures_that_are_not_measured(fails, tmp_path, change, words):
  values = tiny.toy_config(loop=LOOP | change)
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  assert words in fails('train', '--config', recipe, '--workdir', tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_the_loss_is_the_objective_s_and_alike_on_one_device_and_eight():
  """A network that says nothing but zero has the mean square of its target for an error."""
  objective = ObjectiveConfig('flow_prediction')
  noise = NoiseSchedule.of(ToyTaskConfig('flow').noise)
  mlp = MLPConfig(width=8, depth=1, label_range=noise.label_range, out_features=2)
  model = PointDiffusion(
    VectorSpace(), format_of(mlp).network(mlp), {}, noise, objective.parameterization
  )
  points = open_points('moons', 'test', 1)
  params = model.denoiser.initialize(jax.random.key(0))
  found = []
  for devices in (1, 8):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    one = HeldOutLoss(train=points, test=points, mesh=mesh, objective=objective, pictures=40)
    weights = {DENOISER: put_params(jax.device_get(params), mesh)}
    with jax.set_mesh(mesh):
      found.append(dict(one.run(model, weights, jax.random.key(3))))
      zero = jax.tree.map(jnp.zeros_like, weights)
      assert found[-1] == dict(one.run(model, weights, jax.random.key(3)))
      found.append(dict(one.run(model, zero, jax.random.key(3))))
  for name in found[0].keys() - {'settings'}:
    assert found[0][name] == pytest.approx(found[2][name], rel=1e-5, abs=1e-6), name
  assert found[0]['held_out_gap'] == 0
  square = np.mean([points[i]['points'] ** 2 for i in range(len(points))])
  # The target of a flow is noise - data.
  assert found[1]['held_out_loss'] == pytest.approx(1 + square, rel=0.2)
