"""CLIP against transformers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from diffusion_jax.formats.networks import load_params, save_params
from diffusion_jax.models import network
from diffusion_jax.train.contrastive import sigmoid_loss

torch = pytest.importorskip('torch')

TOWER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
CASES = {  # (activation, eos_token_id)
  'OpenAI, pooled at the largest id': ('quick_gelu', 2),
  'gelu, pooled at the first end': ('gelu', 7),
}


def reference(case):
  act, eos = CASES[case]
  return transformers.CLIPModel(transformers.CLIPConfig(
    text_config=TOWER | dict(
      vocab_size=50, max_position_embeddings=9, hidden_act=act, eos_token_id=eos, bos_token_id=6
    ),
    vision_config=TOWER | dict(image_size=12, patch_size=4, hidden_act=act),
    projection_dim=10,
  ))


# The end (7) comes twice; 49 is the largest id; the two pooling rules choose different places.
IDS = np.array([[6, 5, 49, 3, 7, 7, 1, 1], [6, 7, 8, 49, 7, 3, 2, 7]])


@pytest.mark.parametrize('case', CASES)
def test_outputs_gradients_and_files(
  case, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(reference(case))
  config, graphdef, params = ported('clip', theirs)
  pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
  out = theirs(torch.tensor(IDS), torch.tensor(pixels.transpose(0, 3, 1, 2)))
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  out.logits_per_image.square().mean().backward()

  def loss(params):
    clip = network.merge(graphdef, params)
    hidden, text = clip.encode_text(jnp.asarray(IDS))
    image = clip.encode_image(jnp.asarray(pixels))
    normal = lambda e: e / jnp.linalg.norm(e, axis=-1, keepdims=True)
    logits = jnp.exp(clip.logit_scale[...]) * normal(image) @ normal(text).T
    return jnp.square(logits).mean(), (hidden, text, image)

  first = case == next(iter(CASES))  # Gradients take long to compile.
  program = quick_jit(jax.grad(loss, has_aux=True) if first else loss)
  gradients, (hidden, text, image) = program(params)
  wanted = out.text_model_output.last_hidden_state.detach().numpy()
  np.testing.assert_allclose(hidden, wanted, atol=1e-4)
  for ours, theirs_unit, theirs_raw in (  # transformers 5 gives the projected ones as pooled.
    (text, out.text_embeds, out.text_model_output.pooler_output),
    (image, out.image_embeds, out.vision_model_output.pooler_output),
  ):
    np.testing.assert_allclose(unit(np.asarray(ours)), theirs_unit.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours, theirs_raw.detach().numpy(), atol=1e-4)
  if first:
    assert_same_gradients(theirs, gradients)

  save_params(tmp_path / 'ours', config, params)
  assert_same_weights(theirs, transformers.CLIPModel.from_pretrained(tmp_path / 'ours'))
  assert load_params('clip', tmp_path / 'ours')[0] == config


TEXT = dict(vocab_size=50, max_position_embeddings=9, bos_token_id=6)
TOWERS = {  # Name: (kind, reference, prefix in files of transformers 5)
  'text': ('clip_text', lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(
    **TOWER | {'num_hidden_layers': 3}, **TEXT, eos_token_id=7)), 'text_model.'),
  'text with projection': (
    'clip_text_projection', lambda: transformers.CLIPTextModelWithProjection(
      transformers.CLIPTextConfig(
        **TOWER | {'num_hidden_layers': 3}, **TEXT, eos_token_id=2, hidden_act='gelu_new',
        projection_dim=5)), ''),
  'vision': ('clip_vision', lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
    **TOWER, image_size=12, patch_size=4)), 'vision_model.'),
  'vision with projection': (
    'clip_vision_projection', lambda: transformers.CLIPVisionModelWithProjection(
      transformers.CLIPVisionConfig(
        **TOWER, image_size=8, patch_size=2, hidden_act='gelu', projection_dim=5)), ''),
}


@pytest.mark.parametrize('name', TOWERS)
def test_towers_alone(name, tmp_path, randomized, ported, quick_jit, assert_same_weights):
  kind, make, prefix = TOWERS[name]
  theirs = randomized(make())
  config, graphdef, params = ported(kind, theirs)
  compare = compare_texts if 'text' in kind else compare_images
  compare(theirs, config, lambda run: quick_jit(
    lambda params: run(network.merge(graphdef, params)))(params))

  save_params(tmp_path / 'ours', config, params)
  assert_same_weights(theirs, type(theirs).from_pretrained(tmp_path / 'ours'))
  assert load_params(kind, tmp_path / 'ours')[0] == config
  if prefix:  # As older versions wrote it, with a table of positions that holds no weights.
    file = tmp_path / 'reference' / 'model.safetensors'
    tensors = {prefix + n: t for n, t in load_file(file).items()}
    save_file(tensors | {f'{prefix}embeddings.position_ids': np.arange(9)[None]}, file)
    again = load_params(kind, tmp_path / 'reference')[1]
    assert again.keys() == params.keys()
    assert all(np.array_equal(again[n], params[n]) for n in params)


def compare_texts(theirs, config, run):
  with torch.no_grad():
    out = theirs(torch.tensor(IDS), output_hidden_states=True)
    norm = dict(theirs.named_modules())[
      'text_model.final_layer_norm' if hasattr(theirs, 'text_model') else 'final_layer_norm'
    ]
    states = [norm(state).numpy() for state in out.hidden_states]
  pooled = out.text_embeds if 'text_embeds' in out else out.pooler_output
  last = config.num_hidden_layers - 1
  options = [dict(skip=last), dict(skip=min(1, last), normalize=False)]
  ids = jnp.asarray(IDS)
  plain, *found = run(lambda net: [net.encode_text(ids, **o) for o in ({}, *options)])
  np.testing.assert_allclose(plain[0], out.last_hidden_state.numpy(), atol=1e-4)
  for option, (hidden, ours) in zip(options, found, strict=True):
    raw = out.hidden_states[-1 - option['skip']].numpy()
    wanted = states[-1 - option['skip']] if option.get('normalize', True) else raw
    np.testing.assert_allclose(hidden, wanted, atol=1e-4)
    np.testing.assert_allclose(ours, pooled.numpy(), atol=1e-4)


def compare_images(theirs, config, run):
  shape = (2, config.image_size, config.image_size, 3)
  pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  with torch.no_grad():
    out = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2)))
  wanted = out.image_embeds if 'image_embeds' in out else out.pooler_output
  np.testing.assert_allclose(
    run(lambda net: net.encode_image(jnp.asarray(pixels))), wanted.numpy(), atol=1e-4
  )


@pytest.mark.parametrize('seed', range(2))
def test_random_configs(seed, randomized, ported, quick_jit):
  rng = np.random.default_rng(seed)
  heads = int(rng.integers(1, 5))
  config = transformers.CLIPTextConfig(
    hidden_size=heads * int(rng.integers(2, 6)), num_attention_heads=heads,
    num_hidden_layers=int(rng.integers(1, 4)), intermediate_size=int(rng.integers(3, 20)),
    hidden_act=str(rng.choice(['quick_gelu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh'])),
    vocab_size=50, max_position_embeddings=int(rng.integers(8, 12)), bos_token_id=6,
    eos_token_id=int(rng.choice([2, 7])), layer_norm_eps=float(rng.choice([1e-5, 1e-3])),
    projection_dim=int(rng.integers(1, 9)),
  )
  theirs = randomized(transformers.CLIPTextModelWithProjection(config))
  ours, graphdef, params = ported('clip_text_projection', theirs)
  shared = [name for name in vars(ours) if hasattr(config, name)]
  assert len(shared) > 8 and all(getattr(ours, n) == getattr(config, n) for n in shared)
  compare_texts(theirs, ours, lambda run: quick_jit(
    lambda params: run(network.merge(graphdef, params)))(params))


def test_extra_embeddings_are_rows_after_the_vocabulary(randomized, ported, quick_jit):
  """Against the reference with a longer table, as textual inversion makes it; gradients too."""
  theirs = randomized(transformers.CLIPTextModel(transformers.CLIPTextConfig(
    **TOWER, **TEXT, eos_token_id=7)))
  _, graphdef, params = ported('clip_text', theirs)
  extra = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
  ids = np.array([[6, 50, 51, 3, 7], [6, 49, 51, 7, 7]])
  theirs.resize_token_embeddings(52, mean_resizing=False)
  table = theirs.get_input_embeddings().weight
  with torch.no_grad():
    table[50:] = torch.tensor(extra)
  out = theirs(torch.tensor(ids))
  (out.last_hidden_state.square().sum() + out.pooler_output.sum()).backward()

  def loss(extra):
    text = network.merge(graphdef, params)
    hidden, pooled = text.encode_text(jnp.asarray(ids), extra_embeddings=extra)
    return jnp.square(hidden).sum() + pooled.sum(), (hidden, pooled)

  gradient, (hidden, pooled) = quick_jit(jax.grad(loss, has_aux=True))(jnp.asarray(extra))
  np.testing.assert_allclose(hidden, out.last_hidden_state.detach().numpy(), atol=1e-4)
  np.testing.assert_allclose(pooled, out.pooler_output.detach().numpy(), atol=1e-4)
  wanted = table.grad[50:].numpy()
  np.testing.assert_allclose(gradient, wanted, atol=1e-3 * np.abs(wanted).max())


def test_the_sigmoid_loss_is_that_of_siglip():
  """Of its own embeddings, with the gradients of its temperature and bias."""
  theirs = transformers.SiglipModel(transformers.SiglipConfig(
    text_config=TOWER | dict(vocab_size=50, max_position_embeddings=9),
    vision_config=TOWER | dict(image_size=12, patch_size=4),
  )).eval()
  with torch.no_grad():
    theirs.logit_scale.fill_(1.2)
    theirs.logit_bias.fill_(-3.0)
  rng = np.random.default_rng(0)
  ids, pixels = rng.integers(0, 50, (5, 8)), rng.normal(size=(5, 3, 12, 12)).astype(np.float32)
  out = theirs(torch.tensor(ids), torch.tensor(pixels), return_loss=True)
  out.loss.backward()
  images, texts = (e.detach().numpy() for e in (out.image_embeds, out.text_embeds))
  loss = lambda scale, bias: sigmoid_loss(images, texts, scale, bias, chunk=2)[0].mean()
  found, gradients = jax.value_and_grad(loss, argnums=(0, 1))(jnp.float32(1.2), jnp.float32(-3))
  assert float(found) == pytest.approx(out.loss.item(), rel=1e-5)
  for mine, parameter in zip(gradients, (theirs.logit_scale, theirs.logit_bias), strict=True):
    assert float(mine) == pytest.approx(float(parameter.grad), rel=1e-4, abs=1e-6)
