"""The recipes of the field's notes and of the papers: parts that fit, counts of the papers."""

import jax
import numpy as np
import pytest

from diffusion_jax.config import parse
from diffusion_jax.data.sources import open_data
from diffusion_jax.diffusion.objective import Objective
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import format_of
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.cascade import Cascade, Stage
from diffusion_jax.recipe import load_config, recipes

PIXELS = [
  'ddpm', 'ddpm_classes', 'ddpm_unconditional', 'iddpm', 'ncsn', 'score_subvp', 'score_ve',
  'score_vp',
]
# Millions of parameters by the papers; CelebA's and ImageNet's to the digit by diffusers' count.
PAPERS = {
  'ddpm_cifar10': (35.7, 35_746_307), 'ddpm_celebahq': (114, 113_673_219),
  'ddim_celeba64': (78.7, 78_700_803), 'iddpm_imagenet64': (120, 121_063_942),
  'score_sde_cifar10': (35.7, 35_746_307),
}


def built(name):
  """(settings, model) of a recipe, without data."""
  config = parse(load_config(name))
  settings = config.settings
  model, _ = assemble(
    settings.denoiser, settings.space, settings.conditioned, settings.schedule,
    settings.objective.parameterization, size=config.data.shape,
  )
  return config, model


@pytest.mark.parametrize('name', PIXELS)
def test_a_recipe_on_pixels_fits_together_and_can_be_drawn_from(name):
  config, model = built(f'notes/{name}')
  settings = config.settings
  assert model.space.name == 'pixels' and model.trained_size == (32, 32) == config.data.shape
  assert settings.objective.learned_variance == model.learned_variance == (name == 'iddpm')
  model.check_sampling(settings.sample)
  Objective(settings.objective, model.noise, model.parameterization)
  model.rows(settings.preview_captions)
  assert (settings.sample.guidance == 1) == (name == 'ddpm_unconditional')
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(
    format_of(settings.denoiser).shapes(settings.denoiser)
  ))
  assert 2e6 < count < 6e6, count


def test_the_models_of_imagen_make_one_cascade():
  """From 16 pixels to 64: each is trained at twice the size of the one before, and takes it."""
  (base, first), *stages = (built(f'notes/{name}') for name in ('imagen_base', 'imagen_32',
                                                                'imagen_64'))
  whole = Cascade.of(first, [Stage(model, config.settings.sample) for config, model in stages])
  assert [model.trained_size[0] for model in (first, *(model for _, model in stages))] == [
    16, 32, 64
  ]
  assert whole.trained_size == (64, 64) and base.settings.sample.threshold == 'dynamic'
  whole.check_sampling(base.settings.sample)
  enlarger, model = built('notes/enlarger')
  assert model.trained_size == (32, 32) and enlarger.settings.sample.steps == 1
  assert model.inputs(32, 32).keys() == stages[0][1].inputs(32, 32).keys() != set()


@pytest.mark.parametrize('name', PAPERS)
def test_a_paper_at_full_size_has_its_parameters(name):
  diffusers, torch = pytest.importorskip('diffusers'), pytest.importorskip('torch')
  config, model = built(f'papers/{name}')
  spec, denoiser = format_of(config.settings.denoiser), config.settings.denoiser
  count = sum(int(np.prod(leaf.shape)) for leaf in spec.shapes(denoiser).values())
  millions, exact = PAPERS[name]
  assert count == exact and abs(count / 1e6 - millions) < 0.01 * millions, count
  # A number of heads for each level changes no parameter, and diffusers has but one.
  values = spec.describe(denoiser) | {'attention_head_dim': None}
  with torch.device('meta'):
    theirs = diffusers.UNet2DModel.from_config(values)
  assert sum(p.numel() for p in theirs.parameters()) == count
  model.check_sampling(config.settings.sample)
  Objective(config.settings.objective, model.noise, model.parameterization)
  assert config.loop.ema_halflife_images == pytest.approx(
    np.log(0.5) / np.log(0.9999) * config.loop.batch_size, rel=1e-4
  )


def test_the_data_of_a_paper_are_the_users():
  config = parse(load_config('papers/ddpm_cifar10'))
  with pytest.raises(UserError, match='data/cifar10'):
    open_data(config.data)


def test_every_paper_and_note_on_pixels_is_here():
  """So that a recipe that is added is tested, too."""
  names = recipes()
  assert {f'papers/{name}' for name in PAPERS} == {n for n in names if n.startswith('papers/')}
  assert {f'notes/{name}' for name in PIXELS} <= set(names)
