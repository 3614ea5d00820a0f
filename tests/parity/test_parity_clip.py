"""CLIP against transformers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from diffusion_jax.io.pretrained import load_params, save_params
from diffusion_jax.models import functional
from diffusion_jax.models.text.clip import CLIPTextModel

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
    clip = functional.merge(graphdef, params)
    hidden, text = clip.encode_text(jnp.asarray(IDS))
    image = clip.encode_image(jnp.asarray(pixels))
    normal = lambda e: e / jnp.linalg.norm(e, axis=-1, keepdims=True)
    logits = jnp.exp(clip.logit_scale[...]) * normal(image) @ normal(text).T
    return jnp.square(logits).mean(), (hidden, text, image)

  gradients, (hidden, text, image) = quick_jit(jax.grad(loss, has_aux=True))(params)
  wanted = out.text_model_output.last_hidden_state.detach().numpy()
  np.testing.assert_allclose(hidden, wanted, atol=1e-4)
  for ours, theirs_unit, theirs_raw in (  # transformers 5 gives the projected ones as pooled.
    (text, out.text_embeds, out.text_model_output.pooler_output),
    (image, out.image_embeds, out.vision_model_output.pooler_output),
  ):
    np.testing.assert_allclose(unit(np.asarray(ours)), theirs_unit.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours, theirs_raw.detach().numpy(), atol=1e-4)
  assert_same_gradients(theirs, gradients)

  save_params(tmp_path / 'ours', config, params)
  assert_same_weights(theirs, transformers.CLIPModel.from_pretrained(tmp_path / 'ours'))
  assert load_params('clip', tmp_path / 'ours')[0] == config


def test_text_model_alone_with_and_without_its_prefix(tmp_path, randomized):
  from safetensors.numpy import load_file, save_file
  theirs = randomized(transformers.CLIPTextModel(transformers.CLIPTextConfig(
    **TOWER, vocab_size=50, max_position_embeddings=9, eos_token_id=7, bos_token_id=6
  )))
  theirs.save_pretrained(tmp_path)
  config, params = load_params('clip_text', tmp_path)
  tensors = load_file(tmp_path / 'model.safetensors')
  bare = {n.removeprefix('text_model.'): t for n, t in tensors.items()}
  for prefix in ('', 'text_model.'):
    named = {prefix + n: t for n, t in bare.items()}
    named[f'{prefix}embeddings.position_ids'] = np.arange(9)[None]
    save_file(named, tmp_path / 'model.safetensors')
    again = load_params('clip_text', tmp_path)[1]
    assert all(np.array_equal(again[n], params[n]) for n in params)
  graphdef, _ = functional.abstract(lambda rngs: CLIPTextModel(config, rngs=rngs))
  hidden, pooled = functional.merge(graphdef, params).encode_text(jnp.asarray(IDS))
  with torch.no_grad():
    out = theirs(torch.tensor(IDS))
  np.testing.assert_allclose(hidden, out.last_hidden_state.numpy(), atol=1e-4)
  np.testing.assert_allclose(pooled, out.pooler_output.numpy(), atol=1e-4)
  save_params(tmp_path / 'ours', config, params)
  back = transformers.CLIPTextModel.from_pretrained(tmp_path / 'ours')
  with torch.no_grad():
    assert torch.equal(back(torch.tensor(IDS)).pooler_output, out.pooler_output)
