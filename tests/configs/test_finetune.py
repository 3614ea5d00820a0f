"""The recipes for fine-tuning at full size, without memory for it, and docs/finetuning.md."""

import re

import pytest

from diffusion_jax.config import parse
from diffusion_jax.models.network import count
from diffusion_jax.pipelines.architectures import ARCHITECTURES, architecture_model
from diffusion_jax.recipe import load_config
from diffusion_jax.train.tasks.finetune import TRAINED as KINDS
from diffusion_jax.train.tasks.finetune import with_image_input
from tests.tiny import ROOT

RECIPES = ROOT / 'configs' / 'finetune'
NAMES = sorted(path.stem for path in RECIPES.glob('*.py') if path.stem not in ('__init__', 'base'))
TEXT = (ROOT / 'docs' / 'finetuning.md').read_text()

AUTOENCODER, CLIP_L, OPENCLIP_H, BIGG = 83_653_863, 123_060_480, 340_387_840, 694_659_840
SD1 = {'denoiser': 859_520_964, 'autoencoder': AUTOENCODER, 'text_encoder': CLIP_L}
NETWORKS = {
  'sd15': SD1, 'sd15_inpaint': SD1 | {'denoiser': 859_535_364},
  'sd21_base': {'denoiser': 865_910_724, 'autoencoder': AUTOENCODER, 'text_encoder': OPENCLIP_H},
  'sd21': {'denoiser': 865_910_724, 'autoencoder': AUTOENCODER, 'text_encoder': OPENCLIP_H},
  'sdxl': {'denoiser': 2_567_463_684, 'autoencoder': AUTOENCODER, 'text_encoder': CLIP_L,
           'text_encoder_2': BIGG},
  'sdxl_refiner': {
    'denoiser': 2_259_526_660, 'autoencoder': AUTOENCODER, 'text_encoder_2': BIGG
  },
  'lcm_sd15': SD1 | {'denoiser': 859_602_884},
}
# Counted by diffusers and transformers on the meta device, with the tables of positions.
AUTOENCODER_16, T5 = 83_819_683, 4_762_310_656
SD3 = {'autoencoder': AUTOENCODER_16, 'text_encoder': 123_650_304, 'text_encoder_2': BIGG,
       'text_encoder_3': T5}
PIXART = {'autoencoder': AUTOENCODER, 'text_encoder': T5}
FLUX = {'autoencoder': AUTOENCODER_16, 'text_encoder': CLIP_L, 'text_encoder_2': T5}
NETWORKS |= {
  'sd3_medium': SD3 | {'denoiser': 2_084_951_104},
  'sd35_medium': SD3 | {'denoiser': 2_469_663_936},
  'sd35_large': SD3 | {'denoiser': 8_146_280_768},
  'flux_dev': FLUX | {'denoiser': 11_901_408_320},
  'flux_schnell': FLUX | {'denoiser': 11_891_178_560},
  'pixart_alpha': PIXART | {'denoiser': 611_349_152},
  'pixart_sigma': PIXART | {'denoiser': 610_856_096},
}
SIZES = {name: 512 if name.startswith('sd15') else 1024 for name in NETWORKS} | {
  'sd21': 768, 'sd21_base': 512, 'lcm_sd15': 768
}


def lora(rank: int, blocks: dict[int, int], text: int) -> int:
  """rank (i + o) for six square projections of each transformer block, and two from the text."""
  return sum(n * rank * (6 * (c + c) + 2 * (text + c)) for c, n in blocks.items())


TRAINED = {
  'sd15': 859_520_964, 'sd15_v': 859_520_964, 'sd15_flow': 859_520_964,
  'sd21': 865_910_724, 'sdxl': 2_567_463_684, 'dreambooth': 859_520_964,
  'inpainting': 859_535_364, 'controlnet': 361_279_120, 'textual_inversion': 1 * 768,
  # Blocks by width: two going down and three going up at a level, each of its depth, and the mid.
  'lora': lora(4, {320: 5, 640: 5, 1280: 5 + 1}, 768),
  'sdxl_lora': lora(4, {640: 5 * 2, 1280: 5 * 10 + 10}, 2048),
  # Square layers: eight of each joint block, but for the last one's text, and four of each dual
  # one; of Flux, three of each block of one stream.
  'sd35_medium': 2_469_663_936, 'sd35_medium_lora': (8 * 24 - 1 + 4 * 13) * 4 * 2 * 1536,
  'flux_lora': (8 * 19 + 3 * 38) * 4 * 2 * 3072, 'pixart': 610_856_096,
  'pixart_lora': 8 * 28 * 4 * 2 * 1152,  # Four layers of each of two attentions.
}


CHANGED = ('sd15_v', 'sd15_flow')
"""Those that change the prediction."""


def abstract_parameters(settings):
  """Shapes of what a recipe trains, at the size of its architecture; nothing is read or made."""
  model = with_image_input(architecture_model(settings.architecture), settings.inputs)
  trainable = KINDS[settings.train](settings)
  trainable.adapted(model)
  return trainable.shapes


@pytest.fixture(scope='module')
def configs():
  return {name: parse(load_config(str(RECIPES / f'{name}.py'))) for name in NAMES}


@pytest.fixture(scope='module')
def trained(configs):
  """Recipe -> number of parameters that it trains."""
  return {name: count(abstract_parameters(config.settings)) for name, config in configs.items()}


def test_trained_parameters_are_the_published_ones(trained):
  assert trained == TRAINED
  assert TRAINED['lora'] == 797_184  # As diffusers' example prints.


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_network_of_an_architecture_is_the_published_one(name):
  model = architecture_model(name)
  assert {role: count(network.shapes) for role, network in model.networks.items()} == NETWORKS[name]
  assert max(model.trained_size) == SIZES[name]


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_fits_its_architecture(name, configs):
  config = configs[name]
  model = architecture_model(config.settings.architecture)
  assert config.data.size == max(model.trained_size)
  prediction, schedule = config.settings.objective.prediction, config.settings.schedule
  assert (prediction != model.parameterization.name) == (schedule is not None) == (name in CHANGED)
  model = model.in_terms(prediction, schedule or model.noise.config)
  config.settings.sample.check(model.noise, model.parameterization)
  assert config.settings.model == '' and config.data.dataset.startswith('folder:')


def gigabytes(config, trained: int) -> float:
  """Parameters, gradients, two moments of Adam, and the average, in float32; and what is frozen."""
  networks = dict(NETWORKS[config.settings.architecture])
  if config.settings.train == 'denoiser':
    del networks['denoiser']
  copies = 4 + (config.loop.ema_halflife_images > 0)
  frozen = sum(networks.values()) * (2 if config.dtype == 'bfloat16' else 4)
  return (4 * copies * trained + frozen) / 1e9


def test_the_table_in_the_docs_is_true(configs, trained):
  rows = dict(re.findall(r'^\| `configs/finetune/(\w+)\.py` \|.*?\| ([^|]+\|[^|]+) \|$', TEXT,
                         flags=re.MULTILINE))
  wanted = {
    name: f'{trained[name]:,} | {gigabytes(configs[name], trained[name]):.1f} GB' for name in NAMES
  }
  assert rows == wanted


def test_every_command_in_the_docs_names_files_and_keys_that_exist(configs):
  commands = re.findall(r'diffusion_jax train --config configs/finetune/(\w+)\.py(.*?)\n(?!  )',
                        TEXT, flags=re.DOTALL)
  assert {name for name, _ in commands} == set(NAMES)
  for name, rest in commands:
    changes = re.findall(r"--config\.[\w.]+=(?:'[^']*'|\S+)", rest)
    assert changes
    load_config(str(RECIPES / f'{name}.py'), [change.replace("'", '') for change in changes])
