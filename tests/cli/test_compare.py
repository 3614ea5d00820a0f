"""compare trains arms that see the same examples, noise and times."""

import collections
import json

import jax
import numpy as np

from diffusion_jax.diffusion.objective import Objective
from tests import tiny


def test_arms_of_a_seed_see_the_same_batches_noise_and_times(
  command, tmp_path, monkeypatch, capsys
):
  seen, losses = collections.defaultdict(list), Objective.losses
  current = ['']

  def watched(self, network, x0, key, *more):
    """The network's input is a function of examples, noise and times, its label of times."""
    note = lambda *values: seen[current[0]].append([np.asarray(value) for value in values])

    def told(x, t):
      jax.debug.callback(note, x0, x, t)
      return network(x, t)

    return losses(self, told, x0, key, *more)

  monkeypatch.setattr(Objective, 'losses', watched)
  from diffusion_jax.cli import compare

  train = compare._run
  monkeypatch.setattr(compare, '_run', lambda workdir, config: (
    current.__setitem__(0, str(workdir.relative_to(tmp_path / 'arms'))), train(workdir, config)
  )[1])
  loop = {'evaluate_samples': 0, 'total_steps': 3, 'checkpoint_every_steps': 0}
  config = tiny.write_config(tmp_path / 'toy.py', tiny.toy_config(loop=loop))
  asked = ('compare', '--config', config, '--arms', 'config.optimizer.learning_rate=0.001,0.1',
           '--workdir', tmp_path / 'arms', '--seeds', 1)
  assert command(*asked) == 0
  slow, fast = (seen[f'learning_rate={rate}/seed_0'] for rate in ('0.001', '0.1'))
  assert len(slow) == len(fast) == 3
  for one, other in zip(slow, fast, strict=True):
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
  assert not any(np.array_equal(slow[0][i], slow[1][i]) for i in range(3))
  found = json.loads((tmp_path / 'arms' / 'comparison.json').read_text())
  values = [one['values'][0] for one in found['curves']]
  assert values[0] == 0 and values[2] != 0  # The first loss is of the same weights, too.

  seen.clear()  # What is there is kept.
  capsys.readouterr()
  assert command(*asked) == 0 and not seen
  assert command(*asked, '--config.optimizer.b1=0.5') == 2  # Another experiment's folder.
  assert 'optimizer.b1' in capsys.readouterr().err
  alike = ('--arms', 'config.data.workers=1,2', '--workdir', tmp_path / 'alike')
  assert command('compare', '--config', config, *alike) == 2 and not (tmp_path / 'alike').exists()
  assert 'train alike' in capsys.readouterr().err
