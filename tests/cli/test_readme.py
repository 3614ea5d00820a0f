"""The README's table says of each sampler what the code does."""

from pathlib import Path

from diffusion_jax.diffusion.samplers import SAMPLERS, SPACINGS

README = Path(__file__).parents[2] / 'README.md'


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
