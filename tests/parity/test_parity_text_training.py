"""Text encoders of diffusers' pipelines, trained at a tiny size and opened there again."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from diffusion_jax.formats.adapters import LoRAWeights, read_lora, to_params, write_lora
from diffusion_jax.formats.networks import load_params, network_format
from diffusion_jax.models.lora import ending, layers_of, merge_lora
from diffusion_jax.pipelines.adapters import add_lora
from diffusion_jax.pipelines.directory import load_model
from tests import tiny_pipeline
from tests.parity import small_pipelines as small
from tests.parity import test_parity_pipelines as unets
from tests.parity import test_parity_transformer_pipelines as transformers_
from tests.train.conftest import RECIPES, SMALL
from tests.train.tasks.test_finetune import WEIGHTS

peft = pytest.importorskip('peft')
SIZE = small.SIZE, small.SIZE
BOTH = "('text_encoder','text_encoder_2')"
TEXT_WEIGHTS = 'model.safetensors'


@pytest.fixture(scope='module')
def trained(tmp_path_factory, command):
  """trained(recipe, name, settings): (their pipeline, its folder, the model of a run of two steps).
  """
  def run(recipe, name, **changes):
    folder = tmp_path_factory.mktemp(recipe)
    theirs = small.make(name)
    theirs.save_pretrained(folder / name)
    tiny_pipeline.write_pictures(folder / 'pictures')
    values = SMALL | {
      'settings.model': folder / name, 'data.dataset': f'folder:{folder / "pictures"}',
      'data.size': SIZE, 'settings.preview_captions': "('cab',)", 'mesh.data': 1, 'mesh.fsdp': 1,
      'loop.total_steps': 2, 'settings.caption_dropout': 0.2, 'optimizer.learning_rate': 0.02,
      'optimizer.groups': "(('^text_encoder', 0.5),)", **changes,
    }
    more = [f'--config.{key}={value}' for key, value in values.items()]
    config = str(RECIPES / f'{recipe}.py')
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet', *more) == 0
    return theirs, folder / name, folder / 'run' / 'model'

  return run


def drawings(name):
  """(draw, draw_theirs, assert_same) with the arguments of the kind of pipeline."""
  if name in ('sd1', 'sdxl'):
    return unets.draw, unets.draw_theirs, unets.assert_same
  draw = lambda *ours: transformers_.draw(*ours, SIZE)
  more = {} if name.startswith('flux') else dict(negative_prompt=[''] * 2, guidance_scale=7.0)
  theirs = lambda pipeline: transformers_.draw_theirs(pipeline, SIZE, **more)
  return draw, theirs, lambda found, wanted: transformers_.assert_same(found, wanted, name)


@pytest.mark.parametrize(('recipe', 'name', 'encoders'), [
  ('lora', 'sd1', '()'), ('sdxl_lora', 'sdxl', '()'), ('sd35_medium_lora', 'sd35', BOTH),
  ('flux_lora', 'flux_dev', "('text_encoder',)"),
])
def test_adapters_of_text_encoders(recipe, name, encoders, trained):
  """Denoiser's and encoders' in one file draw what diffusers draws with it, in both layouts."""
  sampler = {} if name in ('sd1', 'sdxl') else {'settings.sample.sampler': 'flow_euler'}
  theirs, source, made = trained(recipe, name, **sampler, **{
    'settings.text_training': 'lora', 'settings.text_encoders': encoders,
  })
  draw, draw_theirs, assert_same = drawings(name)
  plain = draw_theirs(theirs)
  theirs.load_lora_weights(made)
  wanted = draw_theirs(theirs)
  assert np.abs(wanted - plain).max() > 1e-2
  model, weights, sample = load_model(str(source))
  files = [made / f'{file}.safetensors' for file in ('pytorch_lora_weights', 'kohya')]
  merged = [add_lora(model, weights, str(file)) for file in files]
  jax.tree.map(np.testing.assert_array_equal, *merged)
  assert_same(draw(model, merged[0], sample), wanted)
  # The encoders' part alone changes the picture, too.
  texts = {role: merged[0][role] for role in weights if role.startswith('text_encoder')}
  assert np.abs(draw(model, {**weights, **texts}, sample) - plain).max() > 1e-3
  starts = {key.split('text_model')[0] for key in load_file(files[1]) if key.startswith('lora_te')}
  assert starts == {'lora_te_'} if name == 'sd1' else starts <= {'lora_te1_', 'lora_te2_'}
  # Skipped and unread layers have none: the last of an encoder whose penultimate states are read.
  stems = {key.split('.lora_')[0] for key in load_file(files[0]) if key.startswith('text_encoder.')}
  assert any('layers.1.' in stem for stem in stems) == (name != 'sdxl') and stems


def plain_names(tensors):
  """Some writers leave out the tower's name."""
  return {name.removeprefix('text_model.'): value for name, value in tensors.items()}


@pytest.mark.parametrize(('recipe', 'name', 'changes'), [
  ('sd15', 'sd1', {}), ('lora', 'sd1', {}), ('sdxl', 'sdxl', {'settings.text_training': 'lora'}),
])
def test_a_whole_pipeline_has_the_trained_encoders(recipe, name, changes, trained):
  """Whatever is trained whole: a denoiser, an encoder, both; adapters are merged into it."""
  theirs, source, made = trained(recipe, name, **{'settings.text_training': 'trained'} | changes)
  opened = type(theirs).from_pretrained(made)
  opened.set_progress_bar_config(disable=True)
  found, (draw, draw_theirs, assert_same) = load_model(str(made)), drawings(name)
  wanted = draw_theirs(opened)
  assert_same(draw(*found), wanted)
  assert np.abs(wanted - draw_theirs(theirs)).max() > 1e-2
  roles = [role for role in found[1] if role.startswith('text_encoder')]
  for role in (*roles, 'unet'):
    file = WEIGHTS if role == 'unet' else TEXT_WEIGHTS
    before, after = (plain_names(load_file(path / role / file)) for path in (source, made))
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert before.keys() == after.keys() and changed
    state = plain_names(getattr(opened, role).state_dict())
    for key, value in after.items():
      np.testing.assert_array_equal(state[key].numpy(), value)
  assert not list(made.glob('*.safetensors'))


def test_adapters_of_t5(tmp_path):
  """As PEFT applies them; kohya's names are those that ComfyUI reads."""
  torch.manual_seed(0)
  theirs = small.t5().eval()
  theirs.save_pretrained(tmp_path / 't5')
  config, params = load_params('t5', tmp_path / 't5')
  network = network_format('t5').network(config)
  rng, layers = np.random.default_rng(0), layers_of(network.shapes)
  lora = {}
  for number, layer in enumerate(ending(layers, ('SelfAttention.q', 'SelfAttention.o', 'wo'))):
    i, o = network.shapes[f'{layer}.kernel'].shape
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    lora[layer] = LoRAWeights(draw(i, 2), draw(2, o), 1.0 + number % 2)
  ids = np.array([[5, 6, 7, 1], [9, 8, 1, 0]])
  for role, roles, start in (
    ('text_encoder', (), 'lora_te1_'), ('text_encoder_2', ('text_encoder',), 'lora_te3_'),
    ('text_encoder_3', ('text_encoder', 'text_encoder_2'), 'lora_te3_'),
  ):
    whole = {**{r: {} for r in roles}, role: lora}
    for layout in ('kohya', 'peft'):
      write_lora(tmp_path / f'{role}.{layout}.safetensors', whole, layout)
      found = read_lora(tmp_path / f'{role}.{layout}.safetensors', {role: network.shapes})
      assert {n: one.alpha for n, one in found[role].items()} == {
        n: one.alpha for n, one in lora.items()
      }
      for name, one in found[role].items():
        np.testing.assert_array_equal(one.a, lora[name].a)
    assert all(key.startswith(start) for key in load_file(tmp_path / f'{role}.kohya.safetensors'))
  sizes = {name: one.size for name, one in lora.items()}
  peft.inject_adapter_in_model(peft.LoraConfig(
    r=2, lora_alpha=1, target_modules=sorted(sizes),
    alpha_pattern={name: size.alpha for name, size in sizes.items()},
  ), theirs)
  state = load_file(tmp_path / 'text_encoder_3.peft.safetensors')
  state = {k.removeprefix('text_encoder_3.'): torch.tensor(v) for k, v in state.items()}
  result = peft.set_peft_model_state_dict(theirs, state)
  assert not result.unexpected_keys
  with torch.no_grad():
    wanted = theirs(torch.tensor(ids)).last_hidden_state.numpy()
  sizes, adapters = to_params(lora)
  bound = network.bind(merge_lora({**params, **adapters}, sizes))
  np.testing.assert_allclose(bound.encode_text(ids)[0], wanted, atol=1e-3)
  plain = network.bind(params).encode_text(ids)[0]
  assert np.abs(plain - wanted).max() > 1e-2
