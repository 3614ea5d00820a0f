"""The page on resampling has the table of what was measured."""

from benchmarks import resampling
from tests.tiny import ROOT


def test_the_page_has_the_table():
  assert resampling.table() in (ROOT / 'docs/diffusion.md').read_text(encoding='utf-8')
  found = resampling.json.loads(resampling.FILE.read_text(encoding='utf-8'))
  fine = ' and '.join(f'{one["variance"]:.2f}' for one in found['of_fine_steps'].values())
  assert f'100 passes leave {fine}.' in (ROOT / 'docs/diffusion.md').read_text(encoding='utf-8')
