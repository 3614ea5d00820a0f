"""The README's tables say what the code does, and what was measured."""

import json

from benchmarks.table import FIGURES, README, replaced, tables
from diffusion_jax.diffusion.samplers import SPACINGS, infos

SAMPLERS = infos()


def test_the_table_of_samplers_is_the_one_in_force():
  rows = [
    f'| `{name}` | {info.description} | {"yes" if info.stochastic else "no"} | '
    f'{info.order or "-"} | {info.calls or "adaptive"} |' for name, info in SAMPLERS.items()
  ]
  head = '| sampler | what it is | stochastic | order | calls a step |\n|---|---|---|---|---|\n'
  text = README.read_text()
  assert head + '\n'.join(rows) + '\n\n' in text, 'README.md has another table; paste this one'
  for spacing in SPACINGS:
    assert spacing in text


def test_the_tables_of_speed_are_those_of_the_figures():
  text = README.read_text()
  assert replaced(text) == text, 'run python -m benchmarks.table'
  files = sorted(FIGURES.glob('*.json'))
  assert files and tables() in text
  for file in files:
    found = json.loads(file.read_text())
    assert found['command'] and found['device'] and found['versions']['jax'], file
