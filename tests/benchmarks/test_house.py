"""What the measure of the house counts, on a package of a few lines."""

from benchmarks.house import House, code_lines, imports, lines_of, measure, refusals

MODULE = '''"""A docstring."""

import os  # A comment.


def f(x):
  """Another."""
  if x:
    raise ValueError(
      'no'
    )
  return """a
text"""


NAME = 1
"""Of a name."""
'''


def test_code_is_neither_docstrings_nor_comments_nor_blank():
  assert sorted(code_lines(MODULE)) == [3, 6, 8, 9, 10, 11, 12, 13, 16]


def test_imports_and_refusals_are_counted_with_their_conditions():
  import ast

  tree = ast.parse(MODULE)
  assert lines_of(imports(tree)) == {3} and lines_of(refusals(tree)) == {8, 9, 10, 11}


def test_a_closure_is_what_is_imported_wherever_in_a_file(tmp_path):
  package = tmp_path / 'diffusion_jax'
  (package / 'train' / 'tasks').mkdir(parents=True)
  for name, text in {
    'train/tasks/diffusion.py': 'from diffusion_jax import a\n',
    'a.py': 'def f():\n  from diffusion_jax.b import g\n  return g\n',
    'b.py': 'def g():\n  return 1\n',
    'c.py': 'import diffusion_jax.b\n',
  }.items():
    (package / name).write_text(text)
  house = House(tmp_path)
  found = house.closure(package / 'train' / 'tasks' / 'diffusion.py')
  assert {path.name for path in found} == {'diffusion.py', 'a.py', 'b.py'}
  assert house.importers(package / 'b.py') == 2
  assert measure(tmp_path)['closure of the text-to-image task'] == '3 files, 6 lines'
