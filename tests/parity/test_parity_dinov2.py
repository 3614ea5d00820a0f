"""DINOv2 against transformers, with random weights; full sizes without weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.formats.dinov2 import DINOV2 as FORMAT
from diffusion_jax.formats.dinov2 import SIZES
from diffusion_jax.formats.networks import load, load_params, save, save_params
from diffusion_jax.formats.published import published_shape, to_published_names
from diffusion_jax.models import network
from diffusion_jax.models.vision.dinov2 import DINOv2

torch = pytest.importorskip('torch')

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=20, patch_size=4)
CASES = {
  'mlp': dict(),
  'swiglu': dict(use_swiglu_ffn=True, mlp_ratio=3),
  'no mask token, no bias': dict(use_mask_token=False, qkv_bias=False, layerscale_value=0.1),
  'registers': dict(num_register_tokens=3),
}
SHAPES = ((20, 20), (32, 12), (8, 44))  # As trained; other numbers of patches, up and down.


def reference(**changes):
  if 'num_register_tokens' in changes:
    make, config = transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig
  else:
    make, config = transformers.Dinov2Model, transformers.Dinov2Config
  return make(config(**{**TINY, **changes}))


def compare(theirs, graphdef, params, shapes, quick_jit):
  rng = np.random.default_rng(0)
  pixels = [rng.normal(size=(2, *shape, 3)).astype(np.float32) for shape in shapes]
  found = quick_jit(lambda params: [network.merge(graphdef, params)(jnp.asarray(x))
                                    for x in pixels])(params)
  for x, ours in zip(pixels, found, strict=True):
    with torch.no_grad():
      wanted = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    assert ours.shape == wanted.last_hidden_state.shape
    np.testing.assert_allclose(ours, wanted.last_hidden_state.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours[:, 0], wanted.pooler_output.numpy(), atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_outputs_and_files(case, tmp_path, randomized, ported, quick_jit, assert_same_weights):
  theirs = randomized(reference(**CASES[case]))
  config, graphdef, params = ported('dinov2', theirs)
  compare(theirs, graphdef, params, SHAPES, quick_jit)
  save_params(tmp_path / 'ours', config, params)
  assert_same_weights(theirs, type(theirs).from_pretrained(tmp_path / 'ours'))
  assert load_params('dinov2', tmp_path / 'ours')[0] == config


@pytest.mark.parametrize('seed', range(3))
def test_random_configs(seed, randomized, ported, quick_jit):
  rng = np.random.default_rng(seed)
  heads, patch = int(rng.integers(1, 4)), int(rng.integers(2, 6))
  theirs = randomized(reference(
    hidden_size=heads * int(rng.integers(2, 6)), num_attention_heads=heads, patch_size=patch,
    num_hidden_layers=int(rng.integers(1, 3)), mlp_ratio=int(rng.integers(1, 5)),
    image_size=patch * int(rng.integers(1, 6)) + 1, use_swiglu_ffn=bool(seed % 2),
    hidden_act=str(rng.choice(['gelu', 'quick_gelu', 'gelu_new'])),
    layer_norm_eps=float(rng.choice([1e-6, 1e-3])),
  ))
  config, graphdef, params = ported('dinov2', theirs)
  sizes = tuple(int(n) * patch for n in rng.integers(1, 8, 2))
  assert config.patch_size == patch and config.num_attention_heads == heads
  compare(theirs, graphdef, params, (sizes,), quick_jit)


@pytest.mark.parametrize('size', SIZES)
def test_full_sizes_without_weights(size):
  """Names, shapes and counts of transformers' own network, of which nothing is in memory."""
  config = SIZES[size]
  values = FORMAT.describe(config)
  with torch.device('meta'):
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(**values))
  shapes = network.abstract(lambda rngs: DINOv2(config, rngs=rngs))[1]
  assert network.count(shapes) == sum(p.numel() for p in theirs.parameters())
  published = {
    name: published_shape(own, shapes[own].shape)
    for own, name in to_published_names(shapes).items()
  }
  # In memory the reference has names of its own; where they are those of its files, they agree.
  known = {n: tuple(p.shape) for n, p in theirs.named_parameters() if n in published}
  assert len(known) > 6 * config.num_hidden_layers
  assert known == {name: published[name] for name in known}
  if size == 'small':
    assert network.count(shapes) == 22_056_576


def test_a_body_under_a_head_is_found(tmp_path, randomized):
  theirs = randomized(transformers.Dinov2ForImageClassification(
    transformers.Dinov2Config(**TINY, num_labels=3)))
  theirs.save_pretrained(tmp_path / 'head')
  theirs.dinov2.save_pretrained(tmp_path / 'body')
  head, body = (load_params('dinov2', tmp_path / name)[1] for name in ('head', 'body'))
  assert head.keys() == body.keys()
  assert all(np.array_equal(head[name], value) for name, value in body.items())


def test_what_does_not_fit_is_named(tmp_path, randomized):
  randomized(reference()).save_pretrained(tmp_path)
  network = load('dinov2', tmp_path)
  with pytest.raises(UserError, match=r'multiples of 4, not \[1, 20, 18, 3\]'):
    network(jnp.zeros((1, 20, 18, 3)))
  save(network, tmp_path)
  file = tmp_path / 'model.safetensors'
  tensors = load_file(file)
  name = 'encoder.layer.1.layer_scale2.lambda1'
  save_file({n: t for n, t in tensors.items() if n != name}, file)
  with pytest.raises(UserError, match=f'lacks {name}'):
    load('dinov2', tmp_path)
  save_file(tensors | {'extra': tensors[name]}, file)
  with pytest.raises(UserError, match='holds extra'):
    load('dinov2', tmp_path)
