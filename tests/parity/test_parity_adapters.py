"""Adapters of LyCORIS and PEFT read by us, and ours read by PEFT: the same outputs."""

import jax
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.adapter_weights import AdapterWeights
from diffusion_jax.formats.adapters import (
  from_params,
  read_lora,
  to_params,
  write_lora,
  write_peft,
)
from diffusion_jax.models.adapters import KINDS, Rank, change, new_parts
from diffusion_jax.models.lora import merge_lora

torch = pytest.importorskip('torch')
from safetensors.torch import load_file, save_file  # noqa: E402

SHAPES = {'dense': (12, 8), 'conv': (8, 6, 3, 3), 'point': (8, 6, 1, 1)}


class Net(torch.nn.Module):
  """A dense layer, a convolution and a pointwise one."""

  def __init__(self):
    super().__init__()
    torch.manual_seed(0)
    self.dense = torch.nn.Linear(8, 12)
    self.conv, self.point = torch.nn.Conv2d(6, 8, 3, padding=1), torch.nn.Conv2d(6, 8, 1)

  def forward(self, x, z):
    return self.dense(x), self.conv(z), self.point(z)


@pytest.fixture
def inputs():
  return torch.randn(3, 8), torch.randn(2, 6, 5, 5)


def ours():
  """The parameters of a Net."""
  out = {}
  for name, value in Net().state_dict().items():
    layer, _, leaf = name.rpartition('.')
    value = value.numpy()
    if leaf == 'weight':
      value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
    out[f'{layer}.{"kernel" if leaf == "weight" else leaf}'] = value
  return out


def merged(weights, strength=1.0):
  """A Net with adapters merged into it."""
  sizes, params = to_params(weights)
  found = merge_lora({**ours(), **params}, sizes, strength)
  net = Net()
  with torch.no_grad():
    for layer in SHAPES:
      kernel = np.asarray(found[f'{layer}.kernel'])
      kernel = kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
      getattr(net, layer).weight.copy_(torch.tensor(kernel.copy()))
      getattr(net, layer).bias.copy_(torch.tensor(np.asarray(found[f'{layer}.bias'])))
  return net


def assert_same(net, wanted, inputs, atol=1e-4):
  with torch.no_grad():
    for found, other in zip(net(*inputs), wanted(*inputs), strict=True):
      torch.testing.assert_close(found, other, atol=atol, rtol=1e-4)


def randomize(module):
  with torch.no_grad():
    for parameter in module.parameters():
      if parameter.requires_grad:
        noise = 0.3 * torch.randn(parameter.shape)
        parameter.copy_(noise + (parameter if parameter.min() > 0 else 0))  # Norms stay above 0.


OF_LYCORIS = {
  'locon': ('locon', 'LoConModule', {}), 'tucker': ('locon', 'LoConModule', {'use_tucker': True}),
  'dora': ('locon', 'LoConModule', {'weight_decompose': True}),
  'dora-inputs': ('locon', 'LoConModule', {'weight_decompose': True, 'wd_on_out': False}),
  'loha': ('loha', 'LohaModule', {}), 'loha-tucker': ('loha', 'LohaModule', {'use_tucker': True}),
  'loha-dora': ('loha', 'LohaModule', {'weight_decompose': True}),
  'lokr': ('lokr', 'LokrModule', {'factor': 2, 'lora_dim': 1}),
  'lokr-both': ('lokr', 'LokrModule', {'decompose_both': True, 'factor': 3, 'lora_dim': 1}),
  'lokr-full': ('lokr', 'LokrModule', {'full_matrix': True}),
  'lokr-tucker': ('lokr', 'LokrModule', {'use_tucker': True, 'factor': 2, 'lora_dim': 1}),
  'rank-stabilized': ('locon', 'LoConModule', {'rs_lora': True}),
  'diag-oft': ('diag_oft', 'DiagOFTModule', {}),
  'diag-oft-limited': ('diag_oft', 'DiagOFTModule', {'constraint': 0.01, 'rescaled': True}),
  'full': ('full', 'FullModule', {}),
}


@pytest.mark.parametrize('name', OF_LYCORIS)
def test_what_lycoris_trains(name, inputs, tmp_path):
  modules = pytest.importorskip('lycoris.modules')
  file, kind, extra = OF_LYCORIS[name]
  net, tensors = Net(), {}
  for layer in SHAPES:
    keys = {'lora_dim': 2, 'alpha': 3.0} | extra
    one = getattr(getattr(modules, file), kind)(f'lycoris_{layer}', getattr(net, layer), **keys)
    randomize(one)
    one.apply_to()
    state = one.custom_state_dict() or one.state_dict()
    tensors |= {f'lycoris_{layer}.{key}': value for key, value in state.items()}
  tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
  save_file(tensors, tmp_path / 'x.safetensors')
  found = read_lora(tmp_path / 'x.safetensors', {'unet': ours()})['unet']
  assert found.keys() == SHAPES.keys()
  assert_same(merged(found), net, inputs)

  # What we write of it are the same tensors, in both of its spellings.
  for layout, start in (('lycoris', 'lycoris_'), ('kohya', 'lora_unet_')):
    write_lora(tmp_path / 'y.safetensors', {'unet': found}, layout)
    again = load_file(tmp_path / 'y.safetensors')
    for key, value in tensors.items():
      other = again.pop(key.replace('lycoris_', start), None)
      if name not in ('tucker',) and not key.endswith('.alpha'):
        assert torch.equal(other, value), key
    assert name == 'tucker' or not [key for key in again if not key.endswith('.alpha')]


def peft_configs():
  import peft

  common = {'target_modules': list(SHAPES)}
  lora = {'r': 2, 'lora_alpha': 3, 'rank_pattern': {'conv': 4}, 'alpha_pattern': {'point': 7}}
  scaled = {'r': 2, 'alpha': 3, 'rank_pattern': {'conv': 4}, 'alpha_pattern': {'point': 7}}
  return {
    'rank-stabilized': peft.LoraConfig(**common, **lora, use_rslora=True),
    'dora': peft.LoraConfig(**common, **lora, use_dora=True),
    'biases': peft.LoraConfig(**common, **lora, lora_bias=True),
    'loha': peft.LoHaConfig(**common, **scaled),
    'loha-cores': peft.LoHaConfig(**common, **scaled, use_effective_conv2d=True),
    'lokr': peft.LoKrConfig(**common, **scaled),
    'lokr-both': peft.LoKrConfig(
      **common, r=1, alpha=2, decompose_both=True, decompose_factor=3, use_effective_conv2d=True
    ),
    'oft': peft.OFTConfig(**common, oft_block_size=2, r=0),
    'oft-exact': peft.OFTConfig(
      target_modules=['dense', 'point'], oft_block_size=2, r=0, use_cayley_neumann=False
    ),
    'oft-shared': peft.OFTConfig(
      target_modules=['dense'], oft_block_size=4, r=0, block_share=True,
      num_cayley_neumann_terms=3
    ),
  }


@pytest.mark.parametrize('name', [
  'rank-stabilized', 'dora', 'biases', 'loha', 'loha-cores', 'lokr', 'lokr-both', 'oft',
  'oft-exact', 'oft-shared',
])
def test_what_peft_trains_and_what_it_reads_of_ours(name, inputs, tmp_path):
  peft = pytest.importorskip('peft')
  torch.manual_seed(1)
  model = peft.get_peft_model(Net(), peft_configs()[name])
  for key, parameter in model.named_parameters():
    if parameter.requires_grad:
      scale = 0.05 if 'oft' in name else 0.3
      with torch.no_grad():
        parameter.copy_(
          parameter.abs() + 0.1 if 'magnitude' in key else scale * torch.randn(parameter.shape)
        )
  model.save_pretrained(tmp_path / 'theirs')
  net = {'unet': ours()}
  found = read_lora(tmp_path / 'theirs', net)['unet']
  wanted = model.merge_and_unload()  # Of OFT's convolutions it merges what it computes without.
  assert_same(merged(found), wanted, inputs)

  write_peft(tmp_path / 'ours', found)
  again = read_lora(tmp_path / 'ours', net)['unet']
  for layer, one in found.items():
    assert name == 'lokr' or again[layer].size == one.size
    for part, value in one.parts.items():
      np.testing.assert_array_equal(again[layer].parts[part], value)
  opened = peft.PeftModel.from_pretrained(Net(), tmp_path / 'ours')
  assert_same(opened.merge_and_unload(), wanted, inputs)
  if name != 'biases' and 'oft' not in name:
    write_lora(tmp_path / 'x.safetensors', {'unet': found})
    assert_same(merged(read_lora(tmp_path / 'x.safetensors', net)['unet']), wanted, inputs)


@pytest.mark.parametrize('kind', ['lokr', 'loha', 'diag_oft', 'oft'])
def test_fresh_ones_open_in_their_libraries_and_reload_to_the_bit(kind, inputs, tmp_path):
  peft = pytest.importorskip('peft')
  params, sizes = {}, {}
  for number, layer in enumerate(SHAPES):
    size = Rank(2, 0.0 if 'oft' in kind else 2.0, kind, factor=2 if kind == 'lokr' else -1)
    parts = new_parts(ours()[f'{layer}.kernel'].shape, size, jax.random.key(number))
    sizes[layer] = size
    params |= {f'{layer}.lora.{part}': value + 0.1 for part, value in parts.items()}
  mine, net = from_params(params, sizes), {'unet': ours()}
  if kind != 'diag_oft':
    write_peft(tmp_path / 'x', mine)
    opened = peft.PeftModel.from_pretrained(Net(), tmp_path / 'x')
    assert_same(opened.merge_and_unload(), merged(mine), inputs)
    again = read_lora(tmp_path / 'x', net)['unet']
  else:
    with pytest.raises(UserError, match='PEFT has no adapters of the kinds diag_oft'):
      write_peft(tmp_path / 'x', mine)
  if kind == 'oft':
    with pytest.raises(UserError, match="kohya's files has no names for the kind oft"):
      write_lora(tmp_path / 'x.safetensors', {'unet': mine})
  else:
    write_lora(tmp_path / 'x.safetensors', {'unet': mine})
    again = read_lora(tmp_path / 'x.safetensors', net)['unet']
  for layer, one in mine.items():
    for part, value in one.parts.items():
      np.testing.assert_array_equal(again[layer].parts[part], value)
  assert_same(merged(again), merged(mine), inputs, atol=0)


def test_a_layer_of_a_file_that_is_several_of_the_networks(tmp_path):
  """Queries, keys, values and the MLP of Flux.1's single blocks are one in its original files."""
  block = 'single_transformer_blocks.0'
  widths = {f'{block}.attn.to_q': 4, f'{block}.attn.to_k': 4, f'{block}.attn.to_v': 4,
            f'{block}.proj_mlp': 12}
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  net = {f'{name}.kernel': draw(4, width) for name, width in widths.items()}
  stem = 'lora_unet_single_blocks_0_linear1'
  w1, w2, norms = draw(3, 2), draw(8, 2), 1 + np.abs(draw(24, 1))
  tensors = {f'{stem}.lokr_w1': w1, f'{stem}.lokr_w2': w2, f'{stem}.dora_scale': norms,
             f'{stem}.alpha': np.float32([1e10])}
  save_file({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / 'x.safetensors')
  found = read_lora(tmp_path / 'x.safetensors', {'transformer': net})['transformer']
  sizes, params = to_params(found)
  result = merge_lora({**net, **params}, sizes)
  weight = np.concatenate([net[f'{name}.kernel'].T for name in widths]) + np.kron(w1, w2)
  weight *= norms / np.linalg.norm(weight, axis=1, keepdims=True)
  got = np.concatenate([np.asarray(result[f'{name}.kernel']).T for name in widths])
  np.testing.assert_allclose(got, weight, atol=1e-5)
  with pytest.raises(UserError, match='several layers at once cannot be written'):
    write_lora(tmp_path / 'y.safetensors', {'transformer': found})


def test_odd_spellings_of_one_adapter(tmp_path):
  """kohya's names with dots, wholly or in part; and without an alpha, which is the rank."""
  kernel = np.zeros((4, 6), np.float32)
  net = {'mid_block.attentions.0.to_q.kernel': kernel}
  rng = np.random.default_rng(0)
  parts = {p: rng.normal(size=s).astype(np.float32) for p, s in
           {'w1_a': (6, 2), 'w1_b': (2, 4), 'w2_a': (6, 2), 'w2_b': (2, 4)}.items()}
  wanted = change(parts, kernel, Rank(2, 2.0, 'loha'))
  for stem in (
    'lora_unet_mid_block_attentions_0_to_q', 'lora_unet_mid_block.attentions.0.to_q',
    'lora_unet.mid_block.attentions.0.to_q', 'unet.mid_block.attentions.0.to_q',
    'lycoris_mid_block_attentions_0_to_q', 'diffusion_model.mid_block.attentions.0.to_q',
    'base_model.model.mid_block.attentions.0.to_q', 'mid_block.attentions.0.to_q',
  ):
    tensors = {f'{stem}.hada_{part}': torch.tensor(value) for part, value in parts.items()}
    save_file(tensors, tmp_path / 'x.safetensors')
    one = read_lora(tmp_path / 'x.safetensors', {'unet': net})['unet'][
      'mid_block.attentions.0.to_q'
    ]
    assert isinstance(one, AdapterWeights) and one.size.alpha == 2
    np.testing.assert_array_equal(change(one.parts, kernel, one.size), wanted)
  assert set(KINDS) == {'lora', 'loha', 'lokr', 'oft', 'diag_oft', 'full'}
