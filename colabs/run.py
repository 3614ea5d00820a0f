"""Run the notebooks of this folder and keep their outputs, with small pictures.

  python colabs/run.py [NAME ...] [--workdir DIR]

Each runs in a folder of its own below the workdir, where trainings go on that have begun there. All
that it needs is in the extra `test`.
"""

import argparse
import base64
import copy
import io
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
WIDEST, COLOURS = 760, 32
"""Of pictures that are kept: their width in pixels, and their palette."""
LONGEST = 20_000
"""Characters of HTML that is kept; whole pages are left out."""
WIDGET = 'application/vnd.jupyter.widget-view+json'


def names() -> list[str]:
  """Return the notebooks of this folder."""
  return sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def read(name: str) -> nbformat.NotebookNode:
  """Return a notebook of this folder."""
  return nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)


def stripped(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """Return a copy without outputs."""
  notebook = copy.deepcopy(notebook)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs, cell.execution_count, cell.metadata = [], None, nbformat.NotebookNode()
  return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, kernel: str = 'python3') -> None:
  """Run a notebook from top to bottom in a folder, in place.

  nbclient.exceptions.CellExecutionError: a cell failed.
  """
  notebook.metadata.kernelspec.name = kernel
  NotebookClient(
    notebook, timeout=None, kernel_name=kernel, record_timing=False, coalesce_streams=True,
    resources={'metadata': {'path': str(folder)}},
  ).execute()


def keep(notebook: nbformat.NotebookNode, folder: Path) -> None:
  """Make the outputs of a notebook that ran in a folder small, without its path, in place."""
  for cell in notebook.cells:
    for output in cell.get('outputs', ()):
      if output.output_type == 'stream':
        output.text = output.text.replace(f'{folder}{os.sep}', '').replace(str(folder), '.')
        continue
      data = output.get('data', {})
      if data.pop(WIDGET, None):
        data['text/plain'] = 'a widget of a running notebook'
      if len(data.get('text/html', '')) > LONGEST:
        del data['text/html']
      if 'image/png' in data:
        data.pop('image/jpeg', None)  # The same once more.
        data['image/png'] = small(data['image/png'])
  notebook.metadata.language_info = {'name': 'python'}
  notebook.metadata.pop('widgets', None)


def small(png: str) -> str:
  """Return a picture, PNG as base64, of few colours and no wider than a page."""
  image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
  if image.width > WIDEST:
    image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.LANCZOS)
  buffer = io.BytesIO()
  image.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, 'PNG', optimize=True)
  return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('names', nargs='*', metavar='NAME', help='notebooks (default: all)')
  parser.add_argument('--workdir', metavar='DIR', help='where they run (default: a temporary one)')
  options = parser.parse_args()
  workdir = Path(options.workdir or tempfile.mkdtemp(prefix='colabs_')).resolve()
  for name in options.names or names():
    folder = workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    notebook = stripped(read(name))
    execute(notebook, folder)
    keep(notebook, folder)
    nbformat.write(notebook, FOLDER / f'{name}.ipynb')
    print(f'{name}: ran in {folder}')


if __name__ == '__main__':
  main()
