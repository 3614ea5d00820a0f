"""LoRA files against diffusers and PEFT: the same effect, and the same tensors to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.adapter_names import layers
from diffusion_jax.formats.adapters import (
  LoRAWeights,
  from_params,
  read_lora,
  to_params,
  write_lora,
)
from diffusion_jax.formats.single_file_names import unet_names
from diffusion_jax.models.lora import Rank, with_lora
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import CLIPTextModel
from diffusion_jax.models.unet import UNet
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
peft = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')

from diffusers.loaders import (  # noqa: E402
  StableDiffusionLoraLoaderMixin,
  StableDiffusionXLLoraLoaderMixin,
)
from diffusers.training_utils import _collate_lora_metadata  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402

UNET = dict(
  block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
  attention_head_dim=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
  up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
)
TARGETS = {
  'unet': ['to_q', 'to_out.0', 'ff.net.0.proj', 'proj_in', 'conv1', 'conv_shortcut',
           'time_emb_proj', 'downsamplers.0.conv', 'conv_in'],
  'text_encoder': ['q_proj', 'fc2'],
}


def text_encoder():
  return transformers.CLIPTextModel(transformers.CLIPTextConfig(
    hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=20,
    max_position_embeddings=6, eos_token_id=7, bos_token_id=6,
  ))


KINDS = {
  'unet': ('unet', UNet, lambda: diffusers.UNet2DConditionModel(sample_size=8, **UNET)),
  'text_encoder': ('clip_text', CLIPTextModel, text_encoder),
}
RNG = np.random.default_rng(0)
INPUTS = {
  'unet': (RNG.normal(size=(2, 8, 8, 4)).astype(np.float32), np.array([3, 700]),
           RNG.normal(size=(2, 5, 12)).astype(np.float32)),
  'text_encoder': (np.array([[6, 5, 3, 7]]),),
}


@pytest.fixture
def pair(randomized, tmp_path_factory):
  """(their network, ours, its parameters) with the same random weights."""

  def make(role):
    from diffusion_jax.formats.networks import load_params
    kind, module, reference = KINDS[role]
    theirs, path = randomized(reference()), tmp_path_factory.mktemp(role)
    theirs.save_pretrained(path)
    config, params = load_params(kind, path)
    return theirs, Network.of(module, config), params

  return make


def theirs_out(role, model):
  with torch.no_grad():
    if role == 'text_encoder':
      return model(torch.tensor(INPUTS[role][0])).last_hidden_state.numpy()
    x, t, text = map(torch.tensor, INPUTS[role])
    return model(x.permute(0, 3, 1, 2), t, text).sample.permute(0, 2, 3, 1).numpy()


def run(role, module):
  if role == 'text_encoder':
    return module.encode_text(jnp.asarray(INPUTS[role][0]))[0]
  x, t, text = map(jnp.asarray, INPUTS[role])
  return module(x, t, Condition(text))


def ours_out(role, network, params, weights, quick_jit):
  sizes, adapters = to_params(weights)
  bound = with_lora(network, sizes)
  return quick_jit(lambda params: run(role, bound.bind(params)))(params | adapters)


def adapted(role, model, seed=0, **options):
  """Their model with an adapter that does something, every rank and alpha its own."""
  torch.manual_seed(seed)
  config = peft.LoraConfig(
    r=4, lora_alpha=2, target_modules=TARGETS[role], init_lora_weights=False,
    rank_pattern={TARGETS[role][0]: 3}, alpha_pattern={TARGETS[role][1]: 5}, **options,
  )
  # Not by transformers' add_adapter, some of whose releases want a PEFT that is not yet out.
  peft.inject_adapter_in_model(config, model)
  model.peft_config, model._hf_peft_config_loaded = {'default': config}, True
  return model


def random_lora(network, alphas=(1.0, 2.5)):
  """Adapters of every second layer with ranks 1 to 3."""
  rng = np.random.default_rng(0)
  weights = {}
  for number, (name, kernel) in enumerate(layers(network.shapes).items()):
    if number % 2:
      rank, (*window, i, o) = 1 + number % 3, kernel
      draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
      alpha = alphas[number // 2 % len(alphas)]
      weights[name] = LoRAWeights(
        draw(*window, i, rank), draw(*(1 for _ in window), rank, o), alpha
      )
  return weights


@pytest.mark.parametrize('script', ['peft', 'diffusers'])
def test_what_diffusers_writes(script, pair, tmp_path, quick_jit):
  """With its metadata; or as its training scripts, which rename and know no alpha but the rank."""
  states, networks, models = {}, {}, {}
  for role in KINDS:
    theirs, network, params = pair(role)
    plain = theirs_out(role, theirs)
    adapted(role, theirs)
    models[role], networks[role] = (theirs, params, plain), network
    states[role] = peft.get_peft_model_state_dict(theirs)
  metadata = {}
  if script == 'peft':
    metadata = _collate_lora_metadata({role: m[0] for role, m in models.items()})
  else:
    states = {role: convert_state_dict_to_diffusers(s) for role, s in states.items()}
    for theirs, *_ in models.values():
      for module in theirs.modules():
        if hasattr(module, 'scaling'):
          module.scaling['default'] = 1.0
  StableDiffusionLoraLoaderMixin.save_lora_weights(
    tmp_path, unet_lora_layers=states['unet'], text_encoder_lora_layers=states['text_encoder'],
    **metadata,
  )
  lora = read_lora(tmp_path, {role: n.shapes for role, n in networks.items()})
  assert lora.keys() == KINDS.keys()
  for role, (theirs, params, plain) in models.items():
    wanted = theirs_out(role, theirs)
    found = ours_out(role, networks[role], params, lora[role], quick_jit)
    assert np.abs(wanted - plain).max() > 1e-2
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize('layout', ['kohya', 'peft'])
def test_what_we_write(layout, pair, tmp_path, quick_jit):
  parts = {role: pair(role) for role in KINDS}
  # Of kohya's files diffusers 0.42 takes one alpha for all attentions, whatever they hold.
  alphas = (2.5,) if layout == 'kohya' else (1.0, 2.5)
  lora = {role: random_lora(network, alphas) for role, (_, network, _) in parts.items()}
  path = tmp_path / 'pytorch_lora_weights.safetensors'
  write_lora(path, lora, layout)
  again = read_lora(path, {role: network.shapes for role, (_, network, _) in parts.items()})
  assert_same(again, lora)

  state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
    tmp_path, return_lora_metadata=True
  )
  load = {
    'unet': StableDiffusionLoraLoaderMixin.load_lora_into_unet,
    'text_encoder': StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder,
  }
  for role, (theirs, network, params) in parts.items():
    plain = theirs_out(role, theirs)
    load[role](dict(state), alphas, theirs, adapter_name='x', metadata=metadata)
    wanted = theirs_out(role, theirs)
    assert np.abs(wanted - plain).max() > 1e-2
    found = ours_out(role, network, params, lora[role], quick_jit)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    loaded = peft.get_peft_model_state_dict(theirs, adapter_name='x')
    assert_loaded(loaded, lora[role])


def assert_loaded(loaded, lora):
  assert len(loaded) == 2 * len(lora)
  for layer, one in lora.items():  # transformers 5 leaves the prefix of the tower out.
    name = layer if f'{layer}.lora_A.weight' in loaded else layer.removeprefix('text_model.')
    for part, wanted in (('A', one.a), ('B', one.b)):
      value = loaded[f'{name}.lora_{part}.weight'].numpy()
      np.testing.assert_array_equal(value.transpose(*range(2, value.ndim), 1, 0), wanted)


def assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for role, weights in wanted.items():
    assert found[role].keys() == weights.keys()
    for layer, one in weights.items():
      np.testing.assert_array_equal(found[role][layer].a, one.a)
      np.testing.assert_array_equal(found[role][layer].b, one.b)
      assert found[role][layer].alpha == one.alpha


def test_block_numbers_of_single_files(pair, tmp_path):
  """kohya's names for Stable Diffusion XL, as diffusers understands them."""
  theirs, network, _ = pair('unet')
  numbered = unet_names(layers(network.shapes))
  lora = random_lora(network)
  path = tmp_path / 'xl.safetensors'
  write_lora(path, {'unet': {numbered[layer]: one for layer, one in lora.items()}})
  assert_same(read_lora(path, {'unet': network.shapes}), {'unet': lora})
  state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(path, unet_config=theirs.config)
  StableDiffusionXLLoraLoaderMixin.load_lora_into_unet(state, alphas, theirs, adapter_name='x')
  loaded = peft.get_peft_model_state_dict(theirs, adapter_name='x')
  assert_loaded(loaded, lora)


def test_bare_adapters_of_peft(pair, tmp_path, quick_jit):
  """adapter_model.safetensors beside adapter_config.json, with rank-stabilised scaling."""
  theirs, network, params = pair('text_encoder')
  config = peft.LoraConfig(
    r=3, lora_alpha=2, target_modules=['v_proj'], init_lora_weights=False, use_rslora=True
  )
  model = peft.get_peft_model(theirs, config)
  model.save_pretrained(tmp_path)
  lora = read_lora(tmp_path, {'text_encoder': network.shapes})
  assert {one.size.rank for one in lora['text_encoder'].values()} == {3}
  np.testing.assert_allclose(
    ours_out('text_encoder', network, params, lora['text_encoder'], quick_jit),
    theirs_out('text_encoder', model), atol=1e-4,
  )


def test_parameters_and_weights_are_one_thing(pair):
  _, network, _ = pair('text_encoder')
  weights = random_lora(network)
  sizes, params = to_params(weights)
  assert all(isinstance(size, Rank) for size in sizes.values())
  assert set(with_lora(network, sizes).shapes) == set(network.shapes) | set(params)
  assert_same({'x': from_params(jax.tree.map(jnp.asarray, params), sizes)}, {'x': weights})
