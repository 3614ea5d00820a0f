"""The notebooks of colabs/: each runs whole with the package as a wheel, and is kept small."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
import sysconfig
import venv

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

from colabs.run import FOLDER, WIDEST, execute, keep, names, read, stripped
from tests import tiny

NAMES = [
  'diffusion_from_the_notes', 'evaluate', 'quickstart', 'sharded', 'stable_diffusion',
  'your_own_pictures',
]
MOST = 600_000
"""Bytes of a notebook with its outputs."""
BADGE = re.compile(
  r'\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]'
  r'\(https://colab\.research\.google\.com/github/([\w/]+)/blob/main/colabs/(\w+)\.ipynb\)'
)


def code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


@pytest.fixture(scope='session')
def fresh(once):
  """An environment with the wheel, which finds what that depends on here; its kernel."""

  def make(folder):
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    quiet = {'check': True, 'capture_output': True}
    subprocess.run([
      *pip, 'wheel', '--no-deps', '--no-index', '--no-build-isolation', '-w', folder, tiny.ROOT,
    ], **quiet)
    venv.create(folder / 'venv', with_pip=False, symlinks=True)
    python = folder / 'venv' / 'bin' / 'python'
    subprocess.run([
      *pip, '--python', python, 'install', '--no-deps', '--no-index', *folder.glob('*.whl'),
    ], **quiet)
    site, = (folder / 'venv' / 'lib').glob('*/site-packages')
    (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    kernel = folder / 'kernels' / 'fresh'
    kernel.mkdir(parents=True)
    (kernel / 'kernel.json').write_text(json.dumps({
      'argv': [str(python), '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
      'display_name': 'fresh', 'language': 'python',
    }))

  return once('fresh', make)


@pytest.fixture
def kernel(fresh, once, monkeypatch):
  """The name of that kernel, which sees one device and a small data set, and no checkout."""
  data = once('emoji_64', lambda folder: tiny.prepare_emoji(folder, 64, 14))
  env = tiny.environment(str(data), COLABS_SMALL='1', JUPYTER_PATH=str(fresh))
  env['XLA_FLAGS'] = re.sub(r'--xla_force_host_platform_device_count=\d+', '', env['XLA_FLAGS'])
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv('PYTHONPATH', raising=False)
  return 'fresh'


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_each_notebook_runs_from_top_to_bottom(name, kernel, fresh, tmp_path):
  notebook = stripped(read(name))
  where = nbformat.v4.new_code_cell('import diffusion_jax\nprint(diffusion_jax.__file__)')
  notebook.cells.append(where)
  execute(notebook, tmp_path, kernel)
  assert where.outputs[0].text.startswith(str(fresh / 'venv'))
  assert code(notebook)[0].outputs == []  # Nothing was left to install.
  assert any('image/png' in o.get('data', {}) for cell in code(notebook) for o in cell.outputs)
  keep(notebook, tmp_path)
  assert str(tmp_path) not in nbformat.writes(notebook)
  nbformat.validate(notebook)


@pytest.mark.parametrize('name', NAMES)
def test_notebooks_use_the_package_and_define_nothing(name):
  notebook = read(name)
  cells, sources = code(notebook), '\n'.join(cell.source for cell in code(notebook))
  badge = BADGE.search(notebook.cells[0].source)
  assert badge and badge[2] == name
  assert f"REPOSITORY = 'https://github.com/{badge[1]}'" in cells[0].source
  assert "find_spec('diffusion_jax') is None" in cells[0].source and '%pip' in cells[0].source
  assert cells[0].source == code(read(NAMES[0]))[0].source
  assert sources.count('COLABS_SMALL') == 1 and 'COLABS_SMALL' in cells[1].source
  assert 'from diffusion_jax' in sources
  tree = ast.parse(TransformerManager().transform_cell(sources))
  kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
  assert not [node.name for node in ast.walk(tree) if isinstance(node, kinds)]
  row = f'| [`{name}`](colabs/{name}.ipynb) | '
  readme = (tiny.ROOT / 'README.md').read_text()
  assert row in readme and badge[0] in readme


@pytest.mark.parametrize('name', NAMES)
def test_kept_outputs_are_of_a_whole_run_and_small(name):
  assert names() == NAMES
  path, notebook = FOLDER / f'{name}.ipynb', read(name)
  cells = code(notebook)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert not [o for o in outputs if o.output_type == 'error']
  assert any('image/png' in o.get('data', {}) for o in outputs)
  assert path.stat().st_size < MOST
  assert not re.search(r'/(tmp|home|root|work|content)/', json.dumps(outputs))


def test_pictures_are_kept_small_and_widgets_and_pages_in_words(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (200, 2 * WIDEST, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(noise).save(buffer, 'PNG')
  display = lambda data: nbformat.v4.new_output('display_data', data)
  outputs = [
    display({'image/png': base64.b64encode(buffer.getvalue()).decode(), 'image/jpeg': 'same'}),
    display({'application/vnd.jupyter.widget-view+json': {'model_id': 'x'}, 'text/plain': 'x'}),
    display({'text/html': 'x' * 10**5, 'text/plain': 'the page'}),
    nbformat.v4.new_output('stream', text=f'see {tmp_path}/runs/report.html'),
  ]
  cell = nbformat.v4.new_code_cell('1', outputs=outputs)
  notebook = nbformat.v4.new_notebook(cells=[cell])
  keep(notebook, tmp_path)
  picture, widget, page, stream = cell.outputs
  image = Image.open(io.BytesIO(base64.b64decode(picture.data['image/png'])))
  assert image.size == (WIDEST, 100) and image.mode == 'P' and len(picture.data) == 1
  assert widget.data == {'text/plain': 'a widget of a running notebook'}
  assert page.data == {'text/plain': 'the page'} and stream.text == 'see runs/report.html'
  assert stripped(notebook).cells[0].outputs == [] and len(cell.outputs) == 4
