"""Files of the FID Inception's weights: every format gives the same, and every fault is named.

With a sixteenth of the channels; tests/parity compares the network itself.
"""

import io
import pickle
import re
import sys
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.formats.inception import load_inception
from diffusion_jax.formats.torch_files import _Unpickler, read_script
from diffusion_jax.models.features.inception import Inception, InceptionConfig
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests.tiny import ROOT

TINY = InceptionConfig(divisor=16, classes=5)
SHAPES = Network.of(Inception, TINY).shapes
LAYER = 'Mixed_6d.branch7x7_2'


@pytest.fixture(scope='module')
def state():
  """Published tensors by published names, as torch-fidelity's file has them."""
  rng = np.random.default_rng(0)
  tensors = {}
  for name, leaf in SHAPES.items():
    module, _, end = name.rpartition('.')
    shape = leaf.shape
    if module == 'fc':
      turned = shape[::-1]
      tensors['fc.weight' if end == 'kernel' else 'fc.bias'] = rng.normal(size=turned)
    elif end == 'kernel':
      tensors[f'{module}.conv.weight'] = rng.normal(size=(shape[3], shape[2], *shape[:2]))
    else:
      tensors[f'{module}.bn.num_batches_tracked'] = np.array(0)
      for norm in ('weight', 'bias', 'running_mean', 'running_var'):
        tensors[f'{module}.bn.{norm}'] = rng.uniform(0.1, 1, size=shape)
  return {name: v if v.dtype == np.int64 else v.astype(np.float32) for name, v in tensors.items()}


@pytest.fixture
def modules(state):
  """A PyTorch module of modules with these tensors."""
  torch = pytest.importorskip('torch')

  class Holder(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
      return x

  root = Holder()
  for name, value in state.items():
    *path, leaf = name.split('.')
    module = root
    for part in path:
      if not hasattr(module, part):
        module.add_module(part, Holder())
      module = getattr(module, part)
    if value.dtype == np.float32 and not leaf.startswith('running'):
      module.register_parameter(leaf, torch.nn.Parameter(torch.tensor(value)))
    else:
      module.register_buffer(leaf, torch.tensor(value))
  return root


def _readme_command():
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  line, = re.findall(r'python -m diffusion_jax (convert --from pt_inception.*)', text)
  return line.split()


@pytest.mark.parametrize('script', [False, True])
def test_the_command_of_the_readme_makes_the_published_file_safetensors(
  state, modules, script, tmp_path, monkeypatch, command
):
  torch = pytest.importorskip('torch')
  monkeypatch.chdir(tmp_path)
  arguments = _readme_command()
  source, target = (arguments[arguments.index(name) + 1] for name in ('--from', '--to'))
  if script:
    torch.jit.script(modules).save(source)
  else:
    torch.save({name: torch.tensor(value) for name, value in state.items()}, source)
  assert command(*arguments) == 0
  assert_equal = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  jax.tree.map(assert_equal, load_file(target), state)
  jax.tree.map(assert_equal, load_inception(target, TINY)[1], load_inception(source, TINY)[1])


def test_only_files_of_pytorch_become_tensors_and_none_that_runs_code(tmp_path, fails):
  class Evil:
    def __reduce__(self):
      return (open, (str(tmp_path / 'ran'), 'w'))

  (tmp_path / 'evil.pth').write_bytes(pickle.dumps({'a': Evil()}))
  run = lambda source, target: fails('convert', '--from', source, '--to', target,
                                     '--layout', 'tensors')
  assert 'without running code' in run(tmp_path / 'evil.pth', tmp_path / 'x.safetensors')
  assert 'a file of PyTorch' in run(tmp_path / 'evil.pth', tmp_path / 'x.bin')
  assert 'a file of PyTorch' in run(tmp_path, tmp_path / 'x.safetensors')
  assert {path.name for path in tmp_path.iterdir()} == {'evil.pth'}


def test_a_norm_and_its_convolution_become_one(state, tmp_path):
  save_file(state, tmp_path / 'x.safetensors')
  _, params = load_inception(tmp_path / 'x.safetensors', TINY)
  assert params.keys() == SHAPES.keys()
  x = np.random.default_rng(1).normal(size=(1, 9, 9, 10)).astype(np.float32)
  convolve = lambda kernel: np.asarray(jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest'
  ))
  read = lambda name: state[f'{LAYER}.{name}'].astype(np.float64)
  y = convolve(state[f'{LAYER}.conv.weight'].transpose(2, 3, 1, 0))
  y = (y - read('bn.running_mean')) / np.sqrt(read('bn.running_var') + 1e-3)
  wanted = y * read('bn.weight') + read('bn.bias')
  found = convolve(params[f'{LAYER}.kernel']) + params[f'{LAYER}.bias']
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
  assert all(value.dtype == np.float32 for value in params.values())


def test_every_file_gives_the_same(state, modules, tmp_path):
  torch = pytest.importorskip('torch')
  save_file(state, tmp_path / 'x.safetensors')
  torch.save(modules.state_dict(), tmp_path / 'new.pth')
  torch.save(modules.state_dict(), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
  torch.jit.script(modules.eval()).save(str(tmp_path / 'script.pt'))
  wanted = load_inception(tmp_path / 'x.safetensors', TINY)[1]
  for name in ('new.pth', 'old.pth', 'script.pt'):
    found = load_inception(tmp_path / name, TINY)[1]
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[n], wanted[n]) for n in wanted), name
  placed = load_inception(tmp_path / 'x.safetensors', TINY, mesh=make_mesh(MeshConfig()))[1]
  assert all(isinstance(v, jax.Array) and np.array_equal(v, wanted[n]) for n, v in placed.items())


def test_a_script_is_read_without_pytorch(state, modules, tmp_path, monkeypatch):
  torch = pytest.importorskip('torch')
  torch.jit.script(modules.eval()).save(str(tmp_path / 'script.pt'))
  torch.save(modules.state_dict(), tmp_path / 'state.pth')
  monkeypatch.setitem(sys.modules, 'torch', None)  # As where it is not installed.
  found = read_script(tmp_path / 'script.pt')
  assert found.keys() - {'training'} == state.keys()
  assert all(np.array_equal(found[name], state[name]) for name in state)
  with pytest.raises(UserError, match='only be read where PyTorch is installed'):
    load_inception(tmp_path / 'state.pth', TINY)


def test_a_script_is_never_run(modules, tmp_path):
  """Its table is an unpickler's program: here one that opens a file."""
  torch = pytest.importorskip('torch')
  torch.jit.script(modules.eval()).save(str(tmp_path / 'good.pt'))

  class Evil:
    def __reduce__(self):
      return open, (str(tmp_path / 'made'), 'w')

  def rewritten(name, table):
    with zipfile.ZipFile(tmp_path / 'good.pt') as old, zipfile.ZipFile(tmp_path / name, 'w') as new:
      for entry in old.namelist():
        data = old.read(entry)
        new.writestr(entry, table(data) if entry.endswith('/data.pkl') else data)
    return tmp_path / name

  evil = rewritten('evil.pt', lambda data: pickle.dumps(Evil()))
  with pytest.raises(UserError, match=r'evil\.pt holds _?io\.open, which is no tensor'):
    load_inception(evil, TINY)
  assert not (tmp_path / 'made').exists()
  cut = rewritten('cut.pt', lambda data: data[: len(data) // 2])
  with pytest.raises(UserError, match=r'cut\.pt is not a whole TorchScript archive'):
    load_inception(cut, TINY)


@pytest.mark.parametrize(('offset', 'shape', 'strides'), [
  (0, (5,), (1,)), (2, (3,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (-1,)), (-1, (2,), (1,)),
])
def test_no_tensor_leaves_its_storage(offset, shape, strides):
  storage, rebuild = np.arange(4.0), _Unpickler(io.BytesIO(), None).rebuild
  np.testing.assert_array_equal(rebuild(storage, 1, (2, 2), (1, 1)), [[1, 2], [2, 3]])
  with pytest.raises(ValueError, match='leaves its storage'):
    rebuild(storage, offset, shape, strides)


def _without(state):
  return {name: value for name, value in state.items() if name != f'{LAYER}.bn.running_var'}


@pytest.mark.parametrize(('change', 'words'), [
  (_without, rf'lacks {LAYER}\.bn\.running_var;'),
  (lambda s: s | {'AuxLogits.fc.bias': np.zeros(3, np.float32)}, r'holds AuxLogits\.fc\.bias, '),
  (lambda s: s | {'fc.bias': np.zeros(1000, np.float32)}, r'fc\.bias has shape \[1000\]'),
])
def test_another_network(change, words, state, tmp_path):
  save_file(change(state), tmp_path / 'x.safetensors')
  with pytest.raises(UserError, match=words):
    load_inception(tmp_path / 'x.safetensors', TINY)


def test_no_such_file(tmp_path):
  for name in ('x.safetensors', 'x.pth'):
    with pytest.raises(UserError, match=f'no file .*{name}'):
      load_inception(tmp_path / name, TINY)
