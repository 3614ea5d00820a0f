"""Reading and writing model directories: errors and exactness. Libraries: tests/parity."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from diffusion_jax import registry
from diffusion_jax.errors import UserError
from diffusion_jax.formats import networks
from diffusion_jax.formats.networks import load, load_params, resolve, save_params
from diffusion_jax.formats.published import from_published
from diffusion_jax.models.autoencoder import AutoencoderKLConfig
from diffusion_jax.models.mlp import MLP, MLPConfig
from diffusion_jax.models.network import PLAIN, Compute, abstract
from tests import tiny_pipeline
from tests.tiny import ROOT
from tests.tiny_pipeline import random_params

CONFIG = AutoencoderKLConfig(
  block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
  shift_factor=0.2,
)
WEIGHTS = 'diffusion_pytorch_model.safetensors'


@pytest.fixture(scope='module')
def params():
  return random_params(CONFIG)


@pytest.fixture
def saved(tmp_path, params):
  save_params(tmp_path, CONFIG, params)
  return tmp_path


def test_round_trip_is_exact(saved, params):
  config, again = load_params('autoencoder', saved)
  assert config == CONFIG and again.keys() == params.keys()
  for name, value in params.items():
    np.testing.assert_array_equal(again[name], value)
  assert sorted(p.name for p in saved.iterdir()) == ['config.json', WEIGHTS]


def test_conversion_is_its_own_inverse(params):
  published = tiny_pipeline.published(params)
  assert published['encoder.conv_in.weight'].shape == (4, 3, 3, 3)
  assert 'decoder.mid_block.attentions.0.to_out.0.weight' in published
  back = from_published(published, params, 'here')
  assert all(np.array_equal(back[name], params[name]) for name in params)


def test_float16_is_stored_and_loaded_as_float32(tmp_path, params):
  save_params(tmp_path, CONFIG, params, dtype='float16')
  assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {np.dtype('float16')}
  _, again = load_params('autoencoder', tmp_path)
  for name, value in params.items():
    assert again[name].dtype == np.float32
    np.testing.assert_array_equal(again[name], np.asarray(value, np.float16))


def test_float16_that_overflows_is_refused(tmp_path, params):
  large = params | {'encoder.conv_in.bias': params['encoder.conv_in.bias'] + 1e6}
  with pytest.raises(UserError, match=r'encoder\.conv_in\.bias .* float16'):
    save_params(tmp_path, CONFIG, large, dtype='float16')
  assert not list(tmp_path.iterdir())


def edit(path, change):
  tensors = load_file(path / WEIGHTS)
  change(tensors)
  save_file(tensors, path / WEIGHTS)


def test_missing_unused_and_misshapen_tensors_are_named(saved):
  key = 'quant_conv.weight'
  value = load_file(saved / WEIGHTS)[key]
  edit(saved, lambda t: t.pop(key))
  with pytest.raises(UserError, match=r'lacks quant_conv\.weight'):
    load_params('autoencoder', saved)
  edit(saved, lambda t: t.update({key: value[:, :4]}))
  with pytest.raises(UserError, match=r'quant_conv\.weight has shape \[8, 4, 1, 1\]'):
    load_params('autoencoder', saved)
  edit(saved, lambda t: t.update({key: value, 'extra.bias': value}))
  with pytest.raises(UserError, match=r'holds extra\.bias'):
    load_params('autoencoder', saved)


def test_truncated_or_missing_files_are_named(saved):
  whole = (saved / WEIGHTS).read_bytes()
  for size in (0, 5, len(whole) // 2, len(whole) - 1):
    (saved / WEIGHTS).write_bytes(whole[:size])
    with pytest.raises(UserError, match='not a whole safetensors file'):
      load_params('autoencoder', saved)
  (saved / WEIGHTS).unlink()
  (saved / 'diffusion_pytorch_model.bin').write_bytes(b'')
  with pytest.raises(UserError, match=f'no .*{WEIGHTS} .*pickle'):
    load_params('autoencoder', saved)
  (saved / 'config.json').write_text('{"_class_name": ')
  with pytest.raises(UserError, match='not readable JSON'):
    load_params('autoencoder', saved)
  (saved / 'config.json').unlink()
  with pytest.raises(UserError, match=r'no file .*config\.json'):
    load_params('autoencoder', saved)


@pytest.mark.parametrize(('change', 'words'), [
  ({'use_quant_conv': False}, r'holds quant_conv\.bias, quant_conv\.weight'),
  ({'latents_mean': [0.1]}, 'latents_mean'),
  ({'down_block_types': ['AttnDownEncoderBlock2D'] * 2}, r'lacks encoder\.down_blocks\.0\.att'),
  ({'down_block_types': ['DownBlock2D'] * 2}, r"down_block_types\[0\] is 'DownBlock2D'"),
  ({'up_block_types': ['UpDecoderBlock2D']}, 'up_block_types is .* must have 2 entries'),
  ({'_class_name': 'AutoencoderTiny'}, "'AutoencoderTiny'"),
  ({'norm_num_groups': 3}, 'norm_num_groups=3'),
])
def test_what_we_do_not_implement_is_refused(saved, change, words):
  values = json.loads((saved / 'config.json').read_text())
  (saved / 'config.json').write_text(json.dumps(values | change))
  with pytest.raises(UserError, match=words):
    load_params('autoencoder', saved)


def test_keys_without_effect_are_accepted(saved):
  values = json.loads((saved / 'config.json').read_text())
  more = {'latents_mean': None, 'latents_std': None, '_name_or_path': 'x'}
  (saved / 'config.json').write_text(json.dumps(values | more))
  assert load_params('autoencoder', saved)[0] == CONFIG


def test_a_failed_write_leaves_the_old_files(saved, params):
  before = {p.name: p.read_bytes() for p in saved.iterdir()}
  broken = params | {'encoder.conv_in.bias': params['encoder.conv_in.bias'] * np.nan}
  with pytest.raises(UserError, match=r'encoder\.conv_in\.bias'):
    save_params(saved, CONFIG, broken)
  assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_assets(tmp_path, monkeypatch, params):
  monkeypatch.setattr(networks, 'ASSETS', tmp_path / 'assets')
  with pytest.raises(UserError, match='no asset at all'):
    resolve('asset:x')
  save_params(tmp_path / 'assets' / 'tiny', CONFIG, params)
  assert resolve('asset:tiny') == tmp_path / 'assets' / 'tiny'
  assert load_params('autoencoder', 'asset:tiny')[0] == CONFIG
  assert str(resolve('some/where')) == 'some/where'
  (tmp_path / 'secret').mkdir()
  for name in ('asset:none', 'asset:../secret', 'asset:', 'asset:/etc'):
    with pytest.raises(UserError, match='there is asset:tiny'):
      resolve(name)


def test_unknown_kinds_are_listed(tmp_path):
  with pytest.raises(UserError, match='choose one of autoencoder, unet, unet2d'):
    load_params('vae', tmp_path)


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
  """A network that no library knows."""

  width: int = 2
  edges: tuple[int, ...] = (1, 2)


class Scale(nnx.Module):

  def __init__(self, config: ScaleConfig, *, compute: Compute = PLAIN, rngs: nnx.Rngs):
    del rngs
    self.config = config
    self.scale = nnx.Param(jax.numpy.ones(config.width, compute.param_dtype))


def test_a_network_from_outside_is_saved_and_loaded(tmp_path, monkeypatch):
  monkeypatch.setitem(registry.NETWORKS, 'scale', Scale)
  params = {'scale': np.arange(3, dtype=np.float32)}
  for layout in ('diffusers', 'native'):
    save_params(tmp_path / layout, ScaleConfig(3, (4,)), params, layout=layout)
    config, found = load_params('scale', tmp_path / layout)
    assert config == ScaleConfig(3, (4,))
    np.testing.assert_array_equal(found['scale'], params['scale'])
  assert isinstance(load('scale', tmp_path / 'native'), Scale)
  with pytest.raises(UserError, match="there is no network 'scal'; did you mean scale"):
    load('scal', tmp_path / 'native')


MB = 2**20
# Six matrices of 16 MB: all of them at once would be far beyond one and the margin.
WIDE = MLPConfig(width=2048, depth=3)
LARGEST, MARGIN = 16 * MB, 12 * MB

SCRIPT = """
import json, sys
import jax
from flax import nnx
from benchmarks.peak_memory import PeakMemory
from diffusion_jax.formats import convert, networks
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

path, to = sys.argv[1:]
mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
networks.load('mlp', path + '/tiny', mesh=mesh)  # Compiles and imports what there is to.
with PeakMemory() as peak:
  model = networks.load('mlp', path + '/large', mesh=mesh)
arrays = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
loading = peak.bytes - arrays
with PeakMemory() as peak:
  convert.convert(path + '/large', to, 'native', dtype='float16')
print(json.dumps({'arrays': arrays, 'loading': loading, 'converting': peak.bytes}))
"""


def test_loading_and_converting_hold_one_tensor_at_a_time(tmp_path):
  for name, config in (('large', WIDE), ('tiny', MLPConfig(width=8))):
    shapes = abstract(lambda rngs, c=config: MLP(c, rngs=rngs))[1]
    arrays = {k: np.full(leaf.shape, 0.5, np.float32) for k, leaf in shapes.items()}
    save_params(tmp_path / name, config, arrays)
  run = subprocess.run(
    [sys.executable, '-c', SCRIPT, tmp_path, tmp_path / 'native'], cwd=ROOT, check=True,
    capture_output=True, text=True,
  )
  found = json.loads(run.stdout.splitlines()[-1])
  assert found['arrays'] > 6 * LARGEST
  assert found['loading'] < LARGEST + MARGIN
  assert found['converting'] < LARGEST + MARGIN
