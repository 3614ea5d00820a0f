"""Sizes of the package as someone meets it who reads or extends it, for one or several checkouts.

  python -m benchmarks.house
  python -m benchmarks.house OLD_CHECKOUT NEW_CHECKOUT
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = 'diffusion_jax'
TASK = 'train/tasks/diffusion.py'
"""The task of text to image, whose closure is measured."""
PATH = {
  'config': ('config.py', 'recipe.py', 'train/config.py'),
  'build': ('build.py', 'registry.py'),
  'loop': ('train/loop.py', 'train/session.py', 'train/training.py'),
  'step': ('train/step.py', 'train/state.py'),
  'task': ('train/tasks/task.py', TASK, 'train/tasks/noising.py'),
  'model': ('pipelines/model.py', 'pipelines/text_to_image.py'),
  'noise': ('diffusion/noise.py', 'diffusion/processes.py', 'diffusion/schedules.py',
            'diffusion/levels.py'),
  'parameterization': ('diffusion/parameterization.py', 'diffusion/denoiser.py'),
  'objective': ('diffusion/objective.py', 'diffusion/training.py', 'diffusion/losses.py',
                'diffusion/objectives.py', 'diffusion/weightings.py'),
  'samplers': ('diffusion/samplers/grid.py', 'diffusion/samplers/common.py',
               'diffusion/samplers/steps.py', 'diffusion/samplers/ode.py',
               'diffusion/samplers/one_step.py', 'diffusion/samplers/__init__.py'),
  'pipeline': ('pipelines/options.py', 'pipelines/sampling.py', 'pipelines/conditions.py',
               'pipelines/conditioners.py', 'pipelines/image_conditioners.py'),
}
"""Files that a newcomer reads, by idea, those of earlier plans too: a checkout has some."""
SKIPPED = (
  tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
  tokenize.ENDMARKER, tokenize.ENCODING,
)


def code_lines(text: str) -> set[int]:
  """Return the numbers of lines that hold code: no docstring, no comment, not blank."""
  found: set[int] = set()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type not in SKIPPED:
      found.update(range(token.start[0], token.end[0] + 1))
  for node in ast.walk(ast.parse(text)):
    # A text alone is a statement: a docstring, or one below a name.
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(
      node.value.value, str
    ):
      found.difference_update(range(node.lineno, node.end_lineno + 1))
  return found


def lines_of(nodes: Iterable[ast.AST]) -> set[int]:
  """Return the numbers of all lines of some statements."""
  return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


def imports(tree: ast.AST) -> Iterator[ast.AST]:
  """All import statements."""
  return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def refusals(tree: ast.AST) -> Iterator[ast.AST]:
  """All `raise` and `assert`, and each `if` that does nothing else."""
  ends = lambda node: isinstance(node, ast.Raise | ast.Assert)
  return (
    node for node in ast.walk(tree)
    if ends(node) or (isinstance(node, ast.If) and not node.orelse and all(map(ends, node.body)))
  )


class House:
  """The files of a package in a checkout, and what they import of each other, wherever in a file.

  A table's 'module:Name' is no import: that is what it is for.
  """

  def __init__(self, root: Path):
    self.root = root
    self.texts = {path: path.read_text() for path in sorted((root / PACKAGE).rglob('*.py'))}
    self.trees = {path: ast.parse(text) for path, text in self.texts.items()}
    self.imports = {path: set(self._imported(path)) - {path} for path in self.texts}

  def _imported(self, path: Path) -> Iterator[Path]:
    for node in ast.walk(self.trees[path]):
      names = []
      if isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
      elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      for name in names:
        place = self.root.joinpath(*name.split('.'))
        yield from (p for p in (place.with_suffix('.py'), place / '__init__.py') if p in self.texts)

  def closure(self, start: Path) -> set[Path]:
    """Return a file and all that it imports, and so on."""
    found, left = set(), [start]
    while left:
      path = left.pop()
      if path not in found:
        found.add(path)
        left += self.imports[path]
    return found

  def lines(self, paths) -> int:
    """Return the number of lines of some files."""
    return sum(self.texts[path].count('\n') for path in paths)

  def importers(self, path: Path) -> int:
    """Return how many other files import one."""
    return sum(path in imported for imported in self.imports.values())


def newcomer(house: House) -> dict[str, list[Path]]:
  """Return the files of PATH that a checkout has, by idea."""
  package = house.root / PACKAGE
  return {
    idea: [package / name for name in names if package / name in house.texts]
    for idea, names in PATH.items()
  }


def measure(root: Path) -> dict[str, str]:
  """Return what is measured of a checkout, in words."""
  house = House(root)
  code = {path: code_lines(text) for path, text in house.texts.items()}
  total = sum(map(len, code.values()))
  share = lambda kind: sum(
    len(code[path] & lines_of(kind(tree))) for path, tree in house.trees.items()
  ) / total
  files = [path for path in house.texts if path.name not in ('__init__.py', '__main__.py')]
  closure = house.closure(root / PACKAGE / TASK)
  path = [file for files_ in newcomer(house).values() for file in files_]
  lengths = sorted(text.count('\n') for text in house.texts.values())
  sizes = lambda *tops: _sizes(root, tops)
  return {
    'package': f'{len(house.texts)} files, {house.lines(house.texts):,} lines',
    'code without docstrings and comments': f'{total:,} lines',
    'median and longest file': f'{lengths[len(lengths) // 2]}, {lengths[-1]} lines',
    'files with one importer': str(sum(house.importers(file) == 1 for file in files)),
    'imports': f'{share(imports):.1%} of the code',
    'refusals': f'{share(refusals):.1%} of the code',
    'closure of the text-to-image task': f'{len(closure)} files, {house.lines(closure):,} lines',
    'path of a newcomer': f'{len(path)} files, {house.lines(path):,} lines',
    'tests': sizes('tests'), 'benchmarks, configs, launch': sizes(
      'benchmarks', 'configs', 'launch'
    ),
  }


def _sizes(root: Path, tops: tuple[str, ...]) -> str:
  paths = [path for top in tops for path in (root / top).rglob('*.py')]
  return f'{len(paths)} files, {sum(path.read_text().count(chr(10)) for path in paths):,} lines'


def main() -> None:
  """Measure each checkout and print a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('roots', nargs='*', type=Path, default=[Path(__file__).parents[1]])
  parser.add_argument('--files', action='store_true',
                      help="list the newcomer's path and the closure too")
  args = parser.parse_args()
  columns = [measure(root) for root in args.roots]
  names = ['', *(str(root) for root in args.roots)]
  rows = [names, *([name, *(column[name] for column in columns)] for name in columns[0])]
  widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
  for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
  for root in args.roots if args.files else ():
    house = House(root)
    print(f'\n{root}: path of a newcomer')
    for idea, files in newcomer(house).items():
      print(f'  {idea}: ' + ', '.join(_told(house, file) for file in files))
    print(f'{root}: closure of the text-to-image task')
    for file in sorted(house.closure(root / PACKAGE / TASK)):
      print(f'  {_told(house, file)}')


def _told(house: House, file: Path) -> str:
  return f'{file.relative_to(house.root / PACKAGE)} ({house.lines([file])})'


if __name__ == '__main__':
  main()
