"""Every recipe loads, is fully used, and builds its networks without memory for them."""

import copy
import difflib

import jax
import pytest

from benchmarks.notes import SYSTEMS
from diffusion_jax.config import parse, untyped
from diffusion_jax.data.sources.arrays import open_points
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import format_of
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.t5_decoder import T5ForConditionalGeneration
from diffusion_jax.models.token_transformer import TokenTransformer
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.directory import read_model
from diffusion_jax.recipe import load_config
from diffusion_jax.registry import OPTIMIZERS, TASKS, load
from diffusion_jax.train.optimizer import make_optimizer
from diffusion_jax.train.tasks.autoencoder import AutoencoderTask
from diffusion_jax.train.tasks.classifier import ClassifierTask, with_classes
from diffusion_jax.train.tasks.clip import CLIPTask
from diffusion_jax.train.tasks.toy import ToyTask
from tests.configs.test_finetune import abstract_parameters
from tests.tiny import ROOT

BASE = ROOT / 'configs' / 'base.py'
RECIPES = sorted(
  path for path in (ROOT / 'configs').rglob('*.py') if path.name not in ('__init__.py', 'base.py')
)
recipes = pytest.mark.parametrize(
  'path', RECIPES, ids=lambda path: str(path.relative_to(ROOT / 'configs'))
)


def _shapes(config):
  """Of the recipe's trainable parameters."""
  if config.task == 'finetune':
    return abstract_parameters(config.settings)
  return jax.eval_shape(_initialize(config), jax.random.key(0))


def _teacher(model):
  """Of a pipeline in the package, or of the run that a recipe makes before."""
  if model.startswith('asset:'):
    return read_model(model)[0].denoiser.initialize
  recipe = SYSTEMS[model.split('/')[2]].recipe
  return _initialize(parse(load_config(str(ROOT / 'configs' / recipe))))


def _initialize(config):
  settings = config.settings
  if config.task in ('autoencoder', 'vae'):
    return AutoencoderTask(settings, None).initialize
  if config.task == 'classifier':
    return ClassifierTask(with_classes(settings, ['flag', 'body'], []), None).initialize
  if config.task == 'clip':
    return CLIPTask(settings, None, None).initialize
  if config.task == 'toy':
    return ToyTask(settings, open_points(config.data.dataset, 'test', config.data.size)).initialize
  if config.task == 'distillation':
    return _teacher(settings.model)
  if config.task in ('image_tokens', 'token_prior'):
    return Network.of(TokenTransformer, settings.transformer).initialize
  network = settings.t5 if config.task == 't5' else settings.denoiser
  made = T5ForConditionalGeneration if config.task == 't5' else format_of(network).module
  return Network.of(made, network).initialize


@recipes
def test_networks_and_optimizer_build_without_memory(path):
  config = parse(load_config(str(path)))
  shapes = _shapes(config)
  optimizer = make_optimizer(config.optimizer, shapes, config.loop.total_steps, 'cpu')
  state = jax.eval_shape(optimizer.init, shapes)
  size, parameters = (sum(x.size for x in jax.tree.leaves(t)) for t in (state, shapes))
  if config.optimizer.name == 'adafactor':  # Its second moments are factored.
    assert 0 < size < parameters
  else:
    assert size >= 2 * parameters


@recipes
def test_what_is_written_is_read_back(path):
  written = untyped(parse(load_config(str(path))))
  assert untyped(parse(written)) == written


@recipes
def test_a_key_without_effect_is_named_wherever_it_is(path):
  values = load_config(str(path)).to_dict()

  def sections(tree, where=()):
    yield where
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from sections(value, (*where, key))

  places = list(sections(values))
  assert ('loop',) in places and ('settings',) in places
  for place in places:
    if 'conditioners' in place[:-1]:
      continue  # Each reads its own options when it is built.
    changed = copy.deepcopy(values)
    section = changed
    for key in place:
      section = section[key]
    section['no_such_key'] = 1
    path = r'\.'.join(('config', *place, 'no_such_key'))
    path = path.replace('unet', 'denoiser')  # Its name since.
    by_name = place[-1:] and (
      place[-1].endswith(('options', 'places')) or 'conditioners' in place
    )
    named = 'no_such_key' if by_name else path
    with pytest.raises(UserError, match=named):
      parse(changed)


@recipes
def test_a_recipe_is_a_short_diff_of_the_base(path):
  lines = [file.read_text().splitlines() for file in (BASE, path)]
  start = next(i for i, line in enumerate(lines[1]) if line.startswith('def get_config'))
  body = lines[1][start:]
  assert 'base(' in path.read_text() or '.get_config()' in path.read_text()  # Or of a recipe.
  added = [d for d in difflib.ndiff(lines[0], body) if d.startswith('+ ') and d[2:].strip()]
  assert len(added) <= 45


@pytest.mark.parametrize(
  'path', [path for path in RECIPES if load_config(str(path)).task == 'diffusion'],
  ids=lambda path: path.stem,
)
def test_frozen_parts_fit(path):
  """A part that the recipe names fits its network, or is named as not there yet."""
  config = parse(load_config(str(path)))
  settings = config.settings
  try:
    model, _ = assemble(
      settings.denoiser, settings.space, settings.conditioned, settings.schedule,
      settings.objective.parameterization,
    )
  except UserError as error:
    assert 'There is no asset:' in str(error) or 'There is no file runs/' in str(error)
    return
  assert (config.data.size, config.data.size) == model.trained_size
  settings.sample.check(model.noise, settings.objective.parameterization)


def test_an_override_may_set_any_key_that_there_is():
  load = lambda *more: parse(load_config('openmoji/quickstart', [f'--config.{o}' for o in more]))
  found = load(
    'optimizer.name=sgd', 'optimizer.options.momentum=0.5', 'optimizer.options.nesterov=True',
    'settings.sample.options.eta=0.5', 'settings.export_dtype=float32', 'data.data_dir=3',
  )
  assert found.optimizer.options == {'momentum': 0.5, 'nesterov': True}
  assert found.settings.sample.options == {'eta': 0.5}
  assert found.settings.export_dtype == 'float32' and found.data.data_dir == '3'
  with pytest.raises(UserError, match=r'did you mean config\.loop\.total_steps\?'):
    load('loop.totl_steps=3')
  with pytest.raises(UserError, match=r'did you mean config\.loop\?'):
    load('lop.total_steps=3')


def test_a_config_file_may_hold_a_part_itself(tmp_path, monkeypatch):
  monkeypatch.setitem(OPTIMIZERS, 'own', '')
  del OPTIMIZERS['own']
  (tmp_path / 'own.py').write_text(
    'from diffusion_jax.configs.toy import edm\n'
    'from diffusion_jax.registry import OPTIMIZERS, register\n'
    "register(OPTIMIZERS, 'own', f'{__name__}:own')\n"
    'def own(config, schedule, mask):\n'
    '  return (config.name, config.options)\n'
    'def get_config():\n'
    '  config = edm.get_config()\n'
    "  config.optimizer.update({'name': 'own', 'options': {'a': 1}})\n"
    '  return config\n'
  )
  config = parse(load_config(str(tmp_path / 'own.py'))).optimizer
  assert load(OPTIMIZERS, 'own')(config, None, None) == ('own', {'a': 1})


def test_the_base_has_every_section():
  from diffusion_jax.configs.base import base

  assert all(base(task).task == task for task in TASKS)
  assert set(base('clip').keys()) == {
    'data', 'optimizer', 'loop', 'safety', 'mesh', 'dtype', 'remat', 'attention',
    'products', 'weights_from', 'deterministic', 'task',
  }
