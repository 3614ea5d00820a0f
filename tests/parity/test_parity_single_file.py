"""Single files against diffusers' own reader, and there and back between all layouts, to the bit.

The pipelines are tiny (`tiny_pipelines`); their tensors random and all different.
"""

import json

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from tests.parity import tiny_pipelines
from tests.parity.tiny_pipelines import networks

FAMILIES = tuple(tiny_pipelines.VAE_FACTORS)
PREDICTIONS = {'sd2': 'v_prediction', 'x4_upscaler': 'v_prediction'}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """made(family): (pipeline, its directory, the single file that convert made of it)."""
  done = {}

  def make(family):
    if family not in done:
      folder = tmp_path_factory.mktemp(family)
      torch.manual_seed(0)
      pipe = tiny_pipelines.pipeline(family, folder, PREDICTIONS.get(family, 'epsilon'))
      pipe.save_pretrained(folder / 'diffusers')
      notes = convert(folder / 'diffusers', folder / 'single.safetensors', 'single-file')
      assert notes == []
      done[family] = pipe, folder / 'diffusers', folder / 'single.safetensors'
    return done[family]

  return make


def assert_same_networks(pipe, other):
  assert networks(pipe).keys() == networks(other).keys()
  for name, module in networks(pipe).items():
    wanted, found = module.state_dict(), networks(other)[name].state_dict()
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
      assert torch.equal(value, found[key]), (name, key)


def tensors(folder):
  """All published tensors of a directory; transformers writes some towers without their prefix."""
  found = {}
  for file in sorted(folder.glob('*/*.safetensors')):
    for name, value in load_file(file).items():
      tower = file.parent.name.startswith('text') and not name.startswith(('text_',))
      found[file.parent.name, 'text_model.' * tower + name] = value
  return found


def assert_same_tensors(one, other):
  wanted, found = tensors(one), tensors(other)
  assert wanted.keys() == found.keys() and len(wanted) > 100
  for name, value in wanted.items():
    assert value.dtype == found[name].dtype
    np.testing.assert_array_equal(value, found[name], err_msg=str(name))


@pytest.mark.parametrize('family', FAMILIES)
def test_diffusers_reads_our_single_files(made, family):
  pipe, folder, file = made(family)
  other = type(pipe).from_single_file(str(file), config=str(folder), local_files_only=True)
  assert_same_networks(pipe, other)


@pytest.mark.parametrize('family', FAMILIES)
def test_back_from_a_single_file(made, tmp_path, family):
  pipe, folder, file = made(family)
  convert(file, tmp_path / 'back', 'diffusers', tokenizers=folder)
  assert_same_tensors(folder, tmp_path / 'back')
  other = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'back')
  assert type(other) is type(pipe)
  assert other.scheduler.config.prediction_type == PREDICTIONS.get(family, 'epsilon')
  for name in networks(pipe):
    has, found = (
      dict(p.config if 'text' not in name else p.config.to_dict())
      for p in (pipe.components[name], other.components[name])
    )
    # What has no effect on the network: training's size, the precision of attention, names.
    for key in set(has) - {'sample_size', 'upcast_attention', 'force_upcast', 'dtype'}:
      if not key.startswith('_'):
        plain = lambda value: list(value) if isinstance(value, tuple) else value
        assert plain(has[key]) == plain(found[key]), (name, key)
  ids = lambda pipe: (pipe.tokenizer or pipe.tokenizer_2)('a cat').input_ids
  assert ids(other) == ids(pipe)
  for key in ('requires_aesthetics_score', 'force_zeros_for_empty_prompt'):
    assert other.config.get(key) == pipe.config.get(key)


@pytest.mark.parametrize('family', ['sd1', 'sdxl', 'sdxl_refiner'])
def test_there_and_back_by_our_own_layout(made, tmp_path, family):
  _, folder, file = made(family)
  convert(folder, tmp_path / 'native', 'native')
  assert {p.name for p in tmp_path.glob('native/unet/*')} == {'config.json', 'params.safetensors'}
  ours = load_file(tmp_path / 'native' / 'unet' / 'params.safetensors')
  theirs = load_file(folder / 'unet' / 'diffusion_pytorch_model.safetensors')
  np.testing.assert_array_equal(
    ours['conv_in.kernel'], theirs['conv_in.weight'].transpose(2, 3, 1, 0)
  )
  convert(tmp_path / 'native', tmp_path / 'back', 'diffusers')
  assert_same_tensors(folder, tmp_path / 'back')
  convert(tmp_path / 'native', tmp_path / 'single.safetensors', 'single-file')
  assert (tmp_path / 'single.safetensors').read_bytes() == file.read_bytes()


def edited(file, path, change, metadata=None):
  """A copy of a single file whose tensors `change` has edited."""
  values = load_file(file)
  change(values)
  save_file(values, path, metadata)
  return path


def test_what_real_files_hold_besides_is_ignored(made, tmp_path):
  _, folder, file = made('sd2')
  more = {
    'alphas_cumprod': 10, 'betas': 10, 'model_ema.decay': 1, 'model_ema.diffusion_modelout0': 3,
    'cond_stage_model.model.logit_scale': 1, 'cond_stage_model.model.text_projection': 4,
    'cond_stage_model.model.transformer.resblocks.23.ln_1.weight': 4, 'depth_model.model.x': 2,
  }
  add = lambda values: values.update({k: np.ones(n, np.float32) for k, n in more.items()})
  both = edited(file, tmp_path / 'more.safetensors', add)
  options = dict(prediction='epsilon', tokenizers=folder)
  [note] = convert(both, tmp_path / 'back', 'diffusers', **options)
  assert 'the depth estimator (depth_model., 1 tensors)' in note
  assert 'averages of the weights (model_ema., 2 tensors)' in note
  assert_same_tensors(folder, tmp_path / 'back')


XL = 'conditioner.embedders.0.transformer'


@pytest.mark.parametrize('more', [
  {f'{XL}.text_projection.weight': 4}, {'conditioner.embedders.0.logit_scale': 1},
  {f'{XL}.logit_scale': 1}, {f'{XL}.vision_model.encoder.layers.0.mlp.fc1.weight': 4},
  {'denoiser.log_sigmas': 1000}, {'__index_level_0__': 1}, {'optimizer.state.0.exp_avg': 4},
  {'first_stage_model.discriminator.main.0.weight': 4}, {'model_ema.num_updates': 1},
  {'conditioner.embedders.1.model.visual.conv1.weight': 4}, {'safety_checker.concept_embeds': 4},
  {f'{n}': 1 for n in range(1000)},
], ids=lambda more: next(iter(more)))
def test_what_is_over_is_named_and_left(made, tmp_path, more):
  _, folder, file = made('sdxl')
  add = lambda values: values.update({k: np.ones(n, np.float32) for k, n in more.items()})
  both = edited(file, tmp_path / 'more.safetensors', add)
  [note] = convert(both, tmp_path / 'back', 'diffusers', tokenizers=folder)
  group = next(iter(more)).partition('.')[0]
  assert next(iter(more)) in note or (group in ('model_ema', 'safety_checker') and group in note)
  assert f'{len(more)} tensors' in note and len(note) < 500
  assert_same_tensors(folder, tmp_path / 'back')


@pytest.mark.parametrize(('more', 'words'), [
  ('lora_unet_conv_in.lora_down.weight', 'holds a LoRA'),
  ('unet.conv_in.lora_A.weight', 'holds a LoRA'), ('lora_unet_conv_in.lokr_w1', 'another adapter'),
  ('control_model.input_blocks.0.0.weight', 'holds a ControlNet'),
  ('noise_augmentor.data_mean', 'the parts of unCLIP'),
  ('text_encoders.t5xxl.transformer.shared.weight', 'the parts of a later model'),
  ('unet.conv_in.weight', 'a model in the names of diffusers'),
  ('conditioner.embedders.2.model.ln_final.weight', 'another text encoder'),
  ('cond_stage_model.mapper.weight', 'another text encoder'),
  ('model.diffusion_model.joint_blocks.0.x.weight', r'holds joint_blocks\.0\.x'),
  ('model.diffusion_model.input_blocks.1.1.motion_modules.0.weight', 'holds input_blocks'),
  ('first_stage_model.quantize.embedding.weight', 'holds quantize'),
  ('first_stage_model.decoder.time_mix_conv.weight', 'holds decoder'),
  (f'{XL}.text_model.encoder.layers.0.mlp.fc3.weight', 'holds text_model'),
  (f'{XL}.embeddings.token_embedding.weight', r'with and without text_model\.'),
])
def test_what_makes_a_file_another_model_is_refused(made, tmp_path, more, words):
  _, folder, file = made('sdxl')
  other = edited(
    file, tmp_path / 'more.safetensors', lambda v: v.update({more: np.ones((2, 2), np.float32)})
  )
  with pytest.raises(UserError, match=words):
    convert(other, tmp_path / 'back', 'diffusers', tokenizers=folder)
  assert not (tmp_path / 'back').exists()


@pytest.mark.parametrize(('table', 'said'), [
  (Schedule(ScheduleConfig()), False),
  (Schedule(ScheduleConfig(rescale_betas_zero_snr=True)), False),
  (Schedule(ScheduleConfig('linear', 1e-4, 0.02)), True),
])
def test_another_noise_schedule_in_the_file_is_said(made, tmp_path, table, said):
  _, folder, file = made('sd1')
  add = lambda values: values.update(alphas_cumprod=table.alpha_bar.astype(np.float16))
  other = edited(file, tmp_path / 'more.safetensors', add)
  notes = convert(other, tmp_path / 'back', 'diffusers', tokenizers=folder)
  assert len(notes) == said and all('another noise schedule' in note for note in notes)


@pytest.mark.parametrize(('change', 'words'), [
  (lambda v: v.update({'model.diffusion_model.out.3.weight': np.ones(1)}), r'holds out\.3\.weight'),
  (lambda v: v.pop('model.diffusion_model.middle_block.1.norm.bias'),
   r'lacks middle_block\.1\.norm\.bias'),
  (lambda v: v.pop('first_stage_model.quant_conv.weight'), r'lacks quant_conv\.weight'),
  (lambda v: v.pop('cond_stage_model.model.ln_final.bias'), r'lacks ln_final\.bias'),
  (lambda v: [v.pop(k) for k in list(v) if k.startswith('cond_')], 'no text encoder'),
  (lambda v: [v.pop(k) for k in list(v) if k.startswith('first_')], 'no whole Stable Diffusion'),
  (lambda v: v.update({'model.diffusion_model.out.0.weight': np.ones(7)}),
   r'conv_norm_out\.weight has shape \[7\]'),
  (lambda v: v.update({k: np.ones(7) for k in v if k.endswith('attn2.to_k.weight')}),
   'too few axes'),
  (lambda v: v.update(edm_mean=np.ones(1)), 'EDM'),
])
def test_missing_and_unused_tensors_are_named(made, tmp_path, change, words):
  _, folder, file = made('sd2')
  broken = edited(file, tmp_path / 'broken.safetensors', change)
  with pytest.raises(UserError, match=words):
    convert(broken, tmp_path / 'back', 'diffusers', prediction='epsilon', tokenizers=folder)
  assert {p.name for p in tmp_path.iterdir()} == {'broken.safetensors'}


def test_the_prediction_is_said_by_the_file_or_has_to_be_given(made, tmp_path):
  _, folder, file = made('sd2')
  with safe_open(file, 'numpy') as opened:
    assert opened.metadata()['modelspec.prediction_type'] == 'v'
  silent = edited(file, tmp_path / 'silent.safetensors', lambda values: None)
  with pytest.raises(UserError, match=r'--prediction epsilon .* or --prediction v_prediction'):
    convert(silent, tmp_path / 'back', 'diffusers', tokenizers=folder)
  convert(silent, tmp_path / 'back', 'diffusers', tokenizers=folder, prediction='epsilon')
  config = json.loads((tmp_path / 'back/scheduler/scheduler_config.json').read_text())
  assert config['_class_name'] == 'PNDMScheduler' and config['prediction_type'] == 'epsilon'
  with pytest.raises(UserError, match="--prediction is 'x'"):
    convert(silent, tmp_path / 'x', 'diffusers', tokenizers=folder, prediction='x')


def test_comfyui_s_marks_of_v_prediction_and_zero_terminal_snr(made, tmp_path):
  _, folder, file = made('sdxl')
  mark = lambda values: values.update(v_pred=np.zeros(0), ztsnr=np.zeros(0))
  marked = edited(file, tmp_path / 'marked.safetensors', mark)
  convert(marked, tmp_path / 'back', 'diffusers', tokenizers=folder)
  config = json.loads((tmp_path / 'back/scheduler/scheduler_config.json').read_text())
  assert config['prediction_type'] == 'v_prediction' and config['rescale_betas_zero_snr']
  convert(tmp_path / 'back', tmp_path / 'again.safetensors', 'single-file')
  assert {'v_pred', 'ztsnr'} <= load_file(tmp_path / 'again.safetensors').keys()
  assert not {'v_pred', 'ztsnr'} & load_file(file).keys()


def test_what_a_single_file_does_not_tell_is_said(made, tmp_path):
  _, folder, _ = made('sd1')
  convert(folder, tmp_path / 'copy', 'diffusers')
  for part, change in (('unet', {'attention_head_dim': 4}), ('vae', {'scaling_factor': 0.5})):
    path = tmp_path / 'copy' / part / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
  notes = convert(tmp_path / 'copy', tmp_path / 'one.safetensors', 'single-file')
  assert len(notes) == 2 and 'attention_head_dim 4' in notes[0] and 'be 8' in notes[0]
  assert 'scaling_factor 0.5' in notes[1]


@pytest.mark.parametrize('inputs', [5, 8, 9])
def test_more_input_channels_name_another_pipeline(made, tmp_path, inputs):
  family = {5: 'sd2', 8: 'sd1', 9: 'sdxl'}[inputs]
  _, folder, file = made(family)
  name = 'model.diffusion_model.input_blocks.0.0.weight'
  wide = lambda v: v.update({name: np.ones((v[name].shape[0], inputs, 3, 3), np.float32)})
  other = edited(file, tmp_path / 'wide.safetensors', wide)
  convert(other, tmp_path / 'back', 'diffusers', tokenizers=folder)
  index = json.loads((tmp_path / 'back' / 'model_index.json').read_text())
  assert index['_class_name'] == {
    5: 'StableDiffusionDepth2ImgPipeline', 8: 'StableDiffusionInstructPix2PixPipeline',
    9: 'StableDiffusionXLInpaintPipeline',
  }[inputs]
  config = json.loads((tmp_path / 'back' / 'unet' / 'config.json').read_text())
  assert config['in_channels'] == inputs
  wider = lambda v: v.update({name: np.ones((v[name].shape[0], 6, 3, 3), np.float32)})
  edited(file, tmp_path / 'wide.safetensors', wider)
  with pytest.raises(UserError, match='6 input channels'):
    convert(tmp_path / 'wide.safetensors', tmp_path / 'x', 'diffusers', tokenizers=folder)
