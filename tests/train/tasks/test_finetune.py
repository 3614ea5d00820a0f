"""The recipes for fine-tuning, at a tiny size: what they begin with, change and write.

sd15, sd21 and sdxl_lora are dreambooth, sdxl and lora with other numbers, so they only train here.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion_jax import build
from diffusion_jax.checkpoint.checkpoints import Checkpoints
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, shard_params, to_host
from diffusion_jax.pipelines.adapters import add_controlnet, add_lora, add_textual_inversion
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.recipe import load_config
from diffusion_jax.train.tasks import finetune
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from diffusion_jax.types import Condition
from tests import tiny
from tests.train.conftest import OF, RECIPES

FULL = ('sdxl', 'inpainting', 'dreambooth')
ADAPTERS = ('lora', 'controlnet', 'textual_inversion')
LIKE = ('sd15', 'sd21', 'sdxl_lora')
ELSEWHERE = (
  'sd35_medium', 'sd35_medium_lora', 'flux_lora', 'pixart', 'pixart_lora', 'sd15_v', 'sd15_flow',
)
"""In tests/parity/test_parity_finetune.py and test_prediction.py."""
WEIGHTS = 'diffusion_pytorch_model.safetensors'
each = pytest.mark.parametrize('recipe', (*FULL, *ADAPTERS))


def test_every_recipe_is_tested():
  found = {path.stem for path in RECIPES.glob('*.py')} - {'__init__', 'base'}
  assert found == {*FULL, *ADAPTERS, *LIKE, *ELSEWHERE}


@pytest.mark.parametrize('recipe', LIKE)
def test_recipes_like_the_others_train(recipe, tuned, pipelines):
  workdir = tuned(recipe)
  losses = [row['loss'] for row in tiny.metrics(workdir).values() if 'loss' in row]
  assert len(losses) == 4 and np.isfinite(losses).all() and len(set(losses)) == 4
  if recipe == 'sdxl_lora':
    lora = load_file(workdir / 'model' / 'pytorch_lora_weights.safetensors')
    assert all(np.abs(value).max() > 0 for value in lora.values())
  else:
    source = pipelines / OF.get(recipe, 'sd') / 'unet' / WEIGHTS
    before, after = load_file(source), load_file(workdir / 'model' / 'unet' / WEIGHTS)
    assert not [name for name in before if np.array_equal(before[name], after[name])]


def test_attention_and_products_are_computed_as_the_config_says(arguments, tmp_path, monkeypatch):
  monkeypatch.setattr(build, 'check_matmul_precision', lambda *_: None)  # CPUs have no float8.
  file, more = arguments('controlnet', tmp_path, attention='xla', products='float8')
  with tiny.few_devices():
    task = build.build(load_config(file, more), str(tmp_path)).task
  for model in (task.model, task.loss_model):
    said = {role: n.compute.attention for role, n in model.networks.items()}
    assert said.pop('denoiser') == said.pop('controlnet') == 'xla'
    assert set(said.values()) == {'auto'}
  kinds = {role: n.compute.matmul_precision for role, n in task.loss_model.networks.items()}
  assert kinds.pop('denoiser') == kinds.pop('controlnet') == 'float8'
  assert set(kinds.values()) == {'plain'}
  assert {n.compute.matmul_precision for n in task.model.networks.values()} == {'plain'}


@pytest.fixture(scope='module')
def opened(tuned, arguments):
  """opened(recipe): (Training of the run, parameters of its last checkpoint)."""
  known = {}

  def make(recipe):
    if recipe not in known:
      file, more = arguments(recipe, tuned(recipe))
      with tiny.few_devices():
        training = build.build(load_config(file, more), str(tuned(recipe)))
      shapes = jax.eval_shape(training.task.initialize, jax.random.key(0))
      put = shard_params(shapes, training.mesh)
      abstract = {
        n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=put[n]) for n, s in shapes.items()
      }
      checkpoints = Checkpoints(training.directory.checkpoints, read_only=True)
      known[recipe] = training, to_host(
        checkpoints.restore({'params': abstract}, 4, everything=False)[1]['params']
      )
    return known[recipe]

  return make


@pytest.fixture(scope='module')
def original(pipelines):
  """original(recipe): the pipeline that it begins with, (model, weights)."""
  return lambda recipe: load_model(str(pipelines / OF.get(recipe, 'sd')))[:2]


def start_of(training):
  """The parameters that a run begins with."""
  key = jax.random.split(jax.random.key(training.loop.seed))[0]
  params = training.task.start(training.mesh)
  return to_host(jax.jit(training.task.initialize)(key) if params is None else params)


def first_batch(training):
  """What step 0 saw: (batch, key)."""
  batch = next(training.loader)
  key = jax.random.split(jax.random.key(training.loop.seed))[1]
  return {n: batch[n] for n in training.task.batch_fields}, jax.random.fold_in(key, 0)


@each
def test_training_begins_with_the_pretrained_model(recipe, opened, original, tuned):
  """The first loss is that of the plain task: what is added begins without effect."""
  training, _ = opened(recipe)
  model, weights = original(recipe)
  batch, key = first_batch(training)
  if recipe == 'textual_inversion':  # The new word begins as a copy of 'cat'.
    cat, = model.text.tokenizers[0]('cat', add_special_tokens=False)['input_ids']
    new = model.text.networks['text_encoder'].config.vocab_size
    assert (batch['tokens'] == new).any(axis=(1, 2)).all()
    batch['tokens'] = np.where(batch['tokens'] == new, cat, batch['tokens'])
  unet = weights.pop('denoiser')
  plain = DiffusionTask(training.task.config, model, weights, training.task.train, None)
  loss, _ = jax.jit(plain.loss)(unet, plain.frozen, {}, batch, key, 0)
  np.testing.assert_allclose(tiny.metrics(tuned(recipe))[1]['loss'], loss, rtol=1e-5)


@each
def test_what_is_trained_changes_and_nothing_else(recipe, opened, pipelines, tuned):
  training, params = opened(recipe)
  start = start_of(training)
  shapes = training.task.trainable.shapes
  assert {n: (p.shape, p.dtype) for n, p in start.items()} == {
    n: (p.shape, p.dtype) for n, p in shapes.items()
  }
  assert start.keys() == params.keys()
  assert not [name for name in start if np.array_equal(start[name], params[name])]
  source, folder = pipelines / OF.get(recipe, 'sd'), tuned(recipe) / 'model'
  if recipe in FULL:
    before, after = tiny.snapshot(source), tiny.snapshot(folder)
    assert set(after) - set(before) == {'README.md', 'trained_on.json'}
    changed = {name for name in before if before[name] != after[name]}
    configs = {'unet/config.json'} if recipe == 'inpainting' else set()
    assert changed == {f'unet/{WEIGHTS}', *configs}
  read = load_model(str(source))[1]
  assert {'autoencoder', 'text_encoder'} <= training.task.frozen.keys()
  for role, values in training.task.frozen.items():
    if role != 'null':
      assert all(np.array_equal(value, values[name]) for name, value in read[role].items())


def exported(recipe, folder, original):
  """(model, weights) from what a run has written, as a user would load it."""
  if recipe in FULL:
    return load_model(str(folder))[:2]
  model, weights = original(recipe)
  if recipe == 'controlnet':
    return add_controlnet(model, weights, str(folder))
  if recipe == 'textual_inversion':
    return model, add_textual_inversion(model, weights, str(folder))
  return model, add_lora(model, weights, str(folder))


@pytest.mark.parametrize('recipe', [*FULL, 'controlnet', 'textual_inversion'])
def test_what_is_written_is_the_whole_trained_model(recipe, opened, original, tuned):
  training, params = opened(recipe)
  model, weights = exported(recipe, tuned(recipe) / 'model', original)
  task = training.task
  wanted = task.weights(params, {r: p for r, p in task.frozen.items() if r != 'null'})
  assert weights.keys() == wanted.keys()
  for role, values in wanted.items():
    assert weights[role].keys() == values.keys()
    assert all(np.array_equal(weights[role][name], value) for name, value in values.items()), role
    assert model.networks[role].config == task.model.networks[role].config
  prompt = ['a <concept>' if recipe == 'textual_inversion' else 'a cat']
  np.testing.assert_array_equal(model.text.tokens(prompt), task.model.text.tokens(prompt))


def output(model, weights, told):
  shape = (2, *model.space.shape(*model.trained_size))
  x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
  t = np.array([100, 700], np.int32)
  return jax.jit(lambda weights, x, told: model.network(weights)(x, t, told))(weights, x, told)


def random_text(model):
  shape = (2, model.text.length, model.text.width)
  return Condition(np.random.default_rng(4).normal(size=shape).astype(np.float32))


def test_merged_adapters_compute_as_those_that_were_trained(opened, original, tuned):
  training, params = opened('lora')
  model, before = original('lora')
  folder, task = tuned('lora') / 'model', training.task
  found = output(model, add_lora(model, before, str(folder)), random_text(model))
  wanted = output(task.model, task.weights(params, task.frozen), random_text(model))
  np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))
  merged, kohya = (
    add_lora(model, before, str(folder / f'{name}.safetensors'))['denoiser']
    for name in ('pytorch_lora_weights', 'kohya')
  )
  assert all(np.array_equal(value, kohya[name]) for name, value in merged.items())
  old = before['denoiser']
  changed = {name for name, value in merged.items() if np.abs(value - old[name]).max()}
  assert changed == {f'{name}.kernel' for name in task.trainable.sizes} and len(changed) == 8


def test_going_on_after_a_stop_is_exact(tuned, resumed):
  recipe = 'textual_inversion'
  wanted = tiny.snapshot(tuned(recipe) / 'model')
  found = tiny.snapshot(resumed(recipe) / 'model')
  assert found.keys() == wanted.keys()
  assert not [n for n in wanted if n != 'README.md' and found[n] != wanted[n]]


def test_the_loss_falls(opened):
  training, params = opened('dreambooth')
  batch, key = first_batch(training)
  task = training.task
  again = jax.random.clone  # The same draws for each.
  loss = jax.jit(lambda params: task.loss(params, task.frozen, {}, batch, again(key), 0)[0])
  assert float(loss(params)) < 0.95 * float(loss(start_of(training)))


def test_a_run_can_be_sampled(tuned, command, tmp_path):
  run = tuned('textual_inversion')
  assert command('sample', '--workdir', run, '--out', tmp_path, '--prompt', 'a <concept>') == 0
  assert (tmp_path / 'grid.png').is_file()


def test_new_input_channels_begin_without_effect(opened, original):
  training, _ = opened('inpainting')
  plain, before = original('inpainting')
  whole = training.task.weights(start_of(training), training.task.frozen)
  image = np.random.default_rng(5).uniform(size=(2, 8, 8, 5)).astype(np.float32)
  wanted = output(plain, before, random_text(plain))
  found = output(training.task.model, whole, random_text(plain)._replace(image=image))
  assert whole['denoiser']['conv_in.kernel'].shape[2] == 9
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_mask_and_the_rest_of_the_picture_are_shown(opened):
  """Channels: the mask, then the latents of the picture, grey where the mask is."""
  training, params = opened('inpainting')
  task = training.task
  batch, key = first_batch(training)
  weights = task.weights(params, task.frozen)
  encode = jax.jit(lambda weights, batch: task.encode(weights, batch, key))
  image = np.asarray(encode(weights, batch).conditions['inpaint']['image'])
  mask = image[..., 0]
  assert image.shape == (8, 8, 8, 5) and set(np.unique(mask)) <= {0.0, 1.0}
  whole = mask.all(axis=(1, 2))
  assert (whole < 1).any() and mask.any(axis=(1, 2)).all()
  blank = jax.jit(task.model.space.encode)(weights, jnp.zeros((1, 16, 16, 3)))
  for i in np.flatnonzero(whole):
    np.testing.assert_allclose(image[i, ..., 1:], blank[0], atol=1e-5)


def test_xl_is_told_sizes_and_drops_the_pooled_text_too(opened, monkeypatch):
  training, params = opened('sdxl')
  task = training.task
  batch, key = first_batch(training)
  weights = task.weights(params, task.frozen)
  monkeypatch.setattr(task, 'config', dataclasses.replace(task.config, caption_dropout=1.0))
  told = jax.jit(lambda batch: task.condition(
    task.encode(weights, batch, key).conditions, task.frozen['null'], key, (8, 8, 8, 4)
  ))(batch)
  for name in ('text', 'pooled'):
    null = task.frozen['null'][f'{name}.bias']
    np.testing.assert_array_equal(getattr(told, name), np.broadcast_to(null, (8, *null.shape)))
    assert not null.any()  # As XL was trained: the empty text is zeros.
  np.testing.assert_array_equal(told.sizes, batch['sizes'])
  assert len(np.unique(batch['sizes'][:, 0])) > 4 and (batch['sizes'][:, 4:] == 16).all()
  told = jax.tree.map(lambda x: x[:2], told)
  out = [np.asarray(output(task.model, weights, told._replace(sizes=told.sizes + change)))
         for change in (0, 5)]
  assert np.abs(out[0] - out[1]).max() > 1e-4


def test_the_prior_s_loss_is_added_with_its_weight(opened):
  """An even batch: the mean of the weighted losses is mean(subject) + 0.5 mean(class)."""
  training, params = opened('dreambooth')
  task, source = training.task, training.loader
  batch, key = first_batch(training)
  batch['weight'] = np.array([2, 1] * 4, np.float32)
  again = jax.random.clone  # The same draws for each.
  losses = jax.jit(lambda b: task.losses(params, task.frozen, {}, b, again(key)).loss)
  weighted = np.asarray(losses(batch))
  plain = np.asarray(losses(batch | {'weight': np.ones(8, np.float32)}))
  np.testing.assert_allclose(
    weighted.mean(), plain[::2].mean() + 0.5 * plain[1::2].mean(), rtol=1e-5
  )
  seen = [w for _ in range(4) for w in next(source)['weight']]
  assert set(seen) == {2.0, 1.0}


def test_only_the_new_row_of_the_table_is_trained(opened, tuned, original):
  training, params = opened('textual_inversion')
  assert {n: p.shape for n, p in params.items()} == {'text_encoder.embedding': (1, 8)}
  rows = load_file(tuned('textual_inversion') / 'model' / 'learned_embeds.safetensors')
  np.testing.assert_array_equal(rows['<concept>'], params['text_encoder.embedding'])
  table = 'text_model.embeddings.token_embedding.embedding'
  before = original('textual_inversion')[1]['text_encoder'][table]
  task = training.task
  whole = task.weights(params, task.frozen)['text_encoder']
  np.testing.assert_array_equal(whole[table], before)


def test_what_is_missing_of_the_prior_is_drawn(opened, pipelines, tuned, tmp_path, monkeypatch):
  task = opened('dreambooth')[0].task
  drawn = tuned('dreambooth').parent / 'class'
  names = [f'{i:05d}.png' for i in range(8)]
  assert sorted(path.name for path in drawn.iterdir()) == names
  for i in (0, 1, 2):  # Drawing that stopped after three goes on to the same pictures.
    (tmp_path / names[i]).write_bytes((drawn / names[i]).read_bytes())
  config = task.config.prior
  changed = type(config)(str(tmp_path), config.prompt, 8, config.weight)
  monkeypatch.setattr(task, 'config', dataclasses.replace(task.config, prior=changed))
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  assert len(finetune.sample_prior(task, mesh)) == 8
  assert tiny.snapshot(tmp_path) == tiny.snapshot(drawn)
  monkeypatch.setattr(task.model.__class__, 'generate', None)  # Nothing is left to draw.
  assert len(finetune.sample_prior(task, mesh)) == 8


@pytest.mark.parametrize('recipe', ['controlnet', 'inpainting'])
def test_training_starts_on_shards(recipe, opened):
  task, mesh = opened(recipe)[0].task, make_mesh(MeshConfig(data=1, fsdp=8))
  params = task.start(mesh)
  assert {n: p.sharding for n, p in params.items()} == shard_params(params, mesh)
  wanted = start_of(opened(recipe)[0])
  assert all(np.array_equal(value, wanted[name]) for name, value in to_host(params).items())


def test_previews_are_drawn_from_pictures(opened):
  for recipe, names in (('controlnet', {'control'}), ('inpainting', {'images', 'masks'})):
    task = opened(recipe)[0].task
    inputs = task.preview_inputs()
    assert isinstance(inputs, Inputs) and set(inputs.rows(task.model, 1, 16, 16)) == names


@pytest.mark.parametrize('recipe', ['sdxl', 'inpainting'])
def test_diffusers_opens_what_was_exported(recipe, tuned):
  diffusers = pytest.importorskip('diffusers')
  name = {'sdxl': 'StableDiffusionXLPipeline', 'inpainting': 'StableDiffusionInpaintPipeline'}
  kind = getattr(diffusers, name[recipe])
  pipe = kind.from_pretrained(str(tuned(recipe) / 'model'), local_files_only=True)
  stored = load_file(tuned(recipe) / 'model' / 'unet' / WEIGHTS)
  theirs = pipe.unet.state_dict()
  assert stored.keys() == theirs.keys()
  assert all(np.array_equal(value, theirs[n].numpy()) for n, value in stored.items())


@pytest.mark.parametrize(('recipe', 'changes', 'message'), [
  ('sd15', {'settings.model': ''}, 'settings.model is empty'),
  ('sd15', {'settings.model': 'nowhere'}, 'nowhere is no text-to-image model'),
  ('sd15', {'settings.conversion': 'raw'}, 'settings.conversion is raw, but'),
  ('lora', {'settings.conversion': 'raw', 'settings.objective.prediction': 'v_prediction'},
   'settings.conversion raw changes what the denoiser means'),
  ('sd15', {'settings.schedule.rescale_betas_zero_snr': True}, 'nothing at zero terminal SNR'),
  ('sd15', {'settings.schedule.process': 'learned'}, 'learned is of no pretrained model'),
  ('sd15', {'settings.architecture': 'sd99'}, "architecture is 'sd99'; choose one of '', sd15"),
  ('sd15', {'settings.train': 'all'}, "settings.train is 'all'; choose one of denoiser, lora"),
  ('sd15', {'settings.inputs': 'depth'}, "inputs is 'depth'; choose one of none, inpaint"),
  ('lora', {'settings.train': 'denoiser'}, 'lora has no effect on settings.train denoiser'),
  ('lora', {'settings.inputs': 'inpaint'}, "settings.inputs is 'inpaint', but"),
  ('lora', {'settings.lora.rank': 0}, 'lora.rank is 0'),
  ('controlnet', {'settings.cache': True}, 'settings.cache keeps latents and texts alone'),
  ('controlnet', {'loop.evaluate_samples': 16}, 'set evaluate_samples 0'),
  ('lora', {'loop.evaluate_samples': 16}, 'the test split has 8 captions, fewer than the 16'),
  ('dreambooth', {'settings.cache': True}, 'settings.cache does not know whose picture'),
  ('dreambooth', {'settings.prior.prompt': ''}, 'settings.prior needs a prompt'),
  *((recipe, {'settings.text_training': how},
     f'settings.text_training must be frozen with settings.train {train};')
    for recipe, train, how in (
      ('controlnet', 'controlnet', 'lora'), ('textual_inversion', 'embeddings', 'trained')
    )),
  ('lora', {'settings.text_training': 'trained', 'settings.cache': True},
   'settings.cache keeps what text encoders give before training'),
  ('lora', {'settings.text_training': 'lora', 'settings.text_encoders': "('text_encoder_2',)"},
   'names text_encoder_2, but the model has text_encoder; leave it out'),
  ('textual_inversion', {'settings.placeholder.token': 'cat</w>'}, 'without /'),
  ('textual_inversion', {'settings.placeholder.token': 'a'}, 'already has the token a'),
  ('textual_inversion', {'settings.placeholder.initializer': ''}, 'initializer is empty'),
  ('sd15', {'settings.architecture': 'sd15'}, 'is not that of sd15; set settings.architecture'),
  ('sd15', {'data.size': 32}, 'set data.size to 16.'),
  ('sd15', {'data.dataset': 'folder:nowhere'}, 'there is no folder nowhere'),
])
def test_settings_that_cannot_work_are_refused(
  recipe, changes, message, arguments, fails, tmp_path
):
  file, more = arguments(recipe, tmp_path / 'run', **changes)
  line = fails('train', '--config', file, '--workdir', tmp_path / 'run', '--quiet', *more)
  assert message in line
  assert not (tmp_path / 'run').exists()


def test_a_run_s_card_names_it(tuned):
  card = (tuned('lora') / 'model' / 'README.md').read_text()
  assert card.startswith('# Fine-tuned text-to-image model (folder:')
  status = json.loads((tuned('lora') / 'status.json').read_text())
  assert status['state'] == 'finished'
