"""Configs of networks that are as small as they can be, and the commands that use them."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models.autoencoder import AutoencoderKLConfig
from diffusion_jax.models.network import Network
from diffusion_jax.models.perceptual import DiscriminatorConfig
from diffusion_jax.models.text.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from diffusion_jax.models.text.t5 import T5Config
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig
from diffusion_jax.pipelines import assembly
from diffusion_jax.pipelines.guides import of_space
from diffusion_jax.pipelines.spaces import LatentConfig
from tests import forked

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZE = 32
LENGTH = 12
AUTOENCODER = AutoencoderKLConfig(
  block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
  scaling_factor=0.8, shift_factor=0.1,
)
ONE_LEVEL = {
  'block_out_channels': [4], 'layers_per_block': 1, 'norm_num_groups': 2,
  'mid_block_add_attention': False,
}
"""An autoencoder of one level, without attention, as a config has it."""
DISCRIMINATOR = DiscriminatorConfig(base_channels=4, n_layers=1, norm_num_groups=2)
# One level, the text only in the middle: each of the other blocks would add to every compilation.
UNET = UNetConfig(
  sample_size=16, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
  cross_attention_dim=16, attention_head_dim=2, down_block_types=('DownBlock2D',),
  up_block_types=('UpBlock2D',),
)
TOWER = {
  'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2,
}
CLIP = CLIPConfig(
  CLIPTextConfig(**TOWER, vocab_size=300, max_position_embeddings=LENGTH, bos_token_id=0,
                 eos_token_id=1, pad_token_id=1),
  CLIPVisionConfig(**TOWER, image_size=SIZE, patch_size=16), projection_dim=8,
)
T5 = T5Config(
  d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj='gated-gelu',
)

NORMALIZE = [['normalize', {}]]
WITH_TEXT = [['choose_caption', {}], ['tokenize', {}], *NORMALIZE]


def _config(task: str, transforms: list, settings: dict, **sections: dict) -> dict:
  """A whole config of four steps; `sections` change keys of data, optimizer, loop or mesh."""
  values = {
    'task': task, 'dtype': 'float32', 'attention': 'auto', 'products': 'plain',
    'settings': settings,
    'data': {'dataset': 'openmoji', 'size': SIZE, 'data_dir': '', 'prepare': False,
             'transforms': transforms},
    'optimizer': {'learning_rate': 1e-3, 'schedule': 'constant', 'warmup_steps': 2},
    'loop': {'total_steps': 4, 'batch_size': 8, 'seed': 0, 'ema_halflife_images': 20.0,
             'log_every_steps': 1, 'checkpoint_every_steps': 2, 'keep_checkpoints': 2,
             'sample_every_steps': 0, 'evaluate_every_steps': 0, 'evaluate_samples': 16},
    'safety': {}, 'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},
  }
  for section, changes in sections.items():
    values[section] |= changes
  return values


def prepare_emoji(folder: pathlib.Path, size: int, every: int = 12) -> None:
  """Write a data set of OpenMoji, of which one drawing of `every` is taken."""
  from diffusion_jax.data.sources.openmoji import builder
  from diffusion_jax.data.sources.tfds import prepare_dataset

  drawings = builder.drawings
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(builder, 'drawings', lambda: itertools.islice(drawings(), 0, None, every))
    prepare_dataset('openmoji', size, str(folder))


def folder_sources(folder, size: int = 4, caption: str = '', **options) -> tuple:
  """(train, test) of a folder of pictures with captions."""
  return open_data(DataConfig(f'folder:{folder}', size, caption=caption, **options))


def labelled_sources(folder, size: int = 4, **options) -> tuple:
  """(train, test) of a folder of pictures by class."""
  return open_data(DataConfig(f'folder:{folder}', size, **options), labels_for='a test')


def autoencoder_config(settings: dict | None = None, **sections: dict) -> dict:
  """Trains the autoencoder, with the discriminator from step 2 on."""
  return _config('autoencoder', NORMALIZE, {
    'autoencoder': {'block_out_channels': [4, 8], 'layers_per_block': 1, 'norm_num_groups': 2},
    'discriminator': {'base_channels': 4, 'n_layers': 1, 'norm_num_groups': 2},
    'adversarial_start_step': 2, 'export_dtype': 'float32', **(settings or {}),
  }, **sections)


def clip_config(settings: dict | None = None, **sections: dict) -> dict:
  """Trains CLIP."""
  return _config('clip', WITH_TEXT, {
    'clip': {
      'text_config': {**TOWER, 'vocab_size': 300, 'max_position_embeddings': LENGTH},
      'vision_config': {**TOWER, 'image_size': SIZE, 'patch_size': 16}, 'projection_dim': 8,
    },
    'export_dtype': 'float32', **(settings or {}),
  }, **sections)


def diffusion_config(parts: dict[str, str], settings: dict | None = None, **sections) -> dict:
  """Trains the U-Net between the frozen `parts`, on cached latents."""
  unet = {
    'sample_size': 8, 'in_channels': 16, 'out_channels': 16, 'block_out_channels': [8],
    'layers_per_block': 1, 'norm_num_groups': 4, 'cross_attention_dim': 16, 'attention_head_dim': 2,
    'down_block_types': ['DownBlock2D'], 'up_block_types': ['UpBlock2D'],
  }
  return _config('diffusion', [], {
    **parts, 'unet': unet, 'latent_patch_size': 2, 'cache': True,
    'objective': {'prediction': 'v_prediction'},
    'schedule': {'rescale_betas_zero_snr': True}, 'export_dtype': 'float32',
    'sample': {'sampler': 'ddim', 'steps': 2, 'guidance': 2.0},
    'preview_captions': ['red apple', 'cat face'], **(settings or {}),
  }, **sections)


def toy_config(settings: dict | None = None, **sections: dict) -> dict:
  """Trains an EDM on points: it starts fastest, so tests of many processes use it."""
  values = _config('toy', [], {
    'process': 'karras', 'process_options': {'sigma_min': 0.002, 'sigma_max': 80.0},
    'objective': {'prediction': 'edm', 'weighting': 'edm',
                  'weighting_options': {'data_std': 1.0}, 'times': 'log_normal'},
    'sample': {'sampler': 'heun', 'steps': 2, 'spacing': 'karras'},
    'width': 16, 'depth': 1, 'likelihood_points': 0, **(settings or {}),
  }, **sections)
  values['data'] = {'dataset': 'moons', 'size': 16} | sections.get('data', {})
  return values


def assemble(unet, autoencoder, clip, schedule, parameterization, latent_patch_size=1):
  """(model, host weights of its frozen parts) of a U-Net on latents, conditioned on text."""
  space = LatentConfig(autoencoder, latent_patch_size)
  model, parts = assembly.assemble(
    unet, space, {'text': {'path': clip}}, schedule, parameterization
  )
  return model, {role: part.load() for role, part in parts.items()}


def noisy_classifier(space, folder, **changes) -> str:
  """A directory with a random classifier, into a and b, of a space's noised z."""
  config = ClassifierConfig(
    (8,), 1, 4, image_size=8, patch_size=1, class_names=('a', 'b'), **of_space(space) | changes
  )
  params = jax.jit(Network.of(Classifier, config).initialize)(jax.random.key(7))
  head = np.random.default_rng(0).normal(0, 3, params['head.kernel'].shape).astype(np.float32)
  save_params(folder, config, params | {'head.kernel': head})
  return str(folder)


@contextlib.contextmanager
def few_devices(count: int = 1):
  """Within, meshes are made of so few devices; for one, XLA compiles in half the time of eight."""
  every = jax.devices()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *_: every[:count])
    yield


def write_config(path: pathlib.Path, values: dict) -> str:
  """A config file, as a person would pass it to train, with these values."""
  path.write_text(
    'import json\n\nfrom ml_collections import ConfigDict\n\n'
    f'VALUES = {json.dumps(values)!r}\n\n\n'
    'def get_config():\n  return ConfigDict(json.loads(VALUES))\n'
  )
  return str(path)


def environment(data: str, devices: int = 8, **more: str) -> dict[str, str]:
  """What a subprocess sees: the same compile cache, the small data set, `devices` devices."""
  flags = re.sub(r'device_count=\d+', f'device_count={devices}', os.environ['XLA_FLAGS'])
  return {**os.environ, 'XLA_FLAGS': flags, 'DIFFUSION_JAX_DATA': data, **more}


def start(
  arguments: list[str], env: dict[str, str], module: str = 'diffusion_jax'
) -> subprocess.Popen:
  """`python -m MODULE ...` in the background, with its output in pipes."""
  return forked.start(module, arguments, env) or subprocess.Popen(
    [sys.executable, '-u', '-m', module, *arguments], env=env, cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )


def beside_each_other(count: int, data: str, arguments: tuple) -> list[subprocess.Popen]:
  """The same command in `count` processes with one device each, which share its work."""
  address = f'127.0.0.1:{free_port()}'
  return [
    start([str(argument) for argument in arguments], environment(
      data, 1, COORDINATOR_ADDRESS=address, PROCESS_COUNT=str(count), PROCESS_INDEX=str(i)
    )) for i in range(count)
  ]


def together(count: int, data: str, arguments: tuple, seconds: float = 300) -> list[str]:
  """What each of them prints once all have succeeded."""
  processes = beside_each_other(count, data, arguments)
  try:
    results = [process.communicate(timeout=seconds) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0] * count, results
  return [out for out, _ in results]


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def metrics(workdir: pathlib.Path, kind: str = 'train') -> dict[int, dict]:
  """Step -> line of metrics.jsonl; the line written last for a step counts."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {line['step']: line for line in lines if line['kind'] == kind}


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file below the folder with its content; empty when there is no folder."""
  files = (path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check_going_on(command, recipe, run: pathlib.Path, folder: pathlib.Path) -> None:
  """A copy of a finished run, cut off after its first checkpoint, goes on to the same, to the bit.

  The steps that it makes again have the same losses, and its export the same tensors.
  """
  resumed = pathlib.Path(shutil.copytree(run, folder / 'resumed'))
  first, *later = sorted(int(path.name) for path in (resumed / 'checkpoints').glob('[0-9]*'))
  for step in later:
    shutil.rmtree(resumed / 'checkpoints' / str(step))
  shutil.rmtree(resumed / 'model')
  (resumed / 'metrics.jsonl').unlink()
  overrides = [f'--config.loop.{name}=0' for name in ('evaluate_samples', 'sample_every_steps')]
  assert command('train', '--config', recipe, '--workdir', resumed, '--quiet', *overrides) == 0
  found, wanted = metrics(resumed), metrics(run)
  assert max(found) == later[-1] and sorted(found) == [step for step in wanted if step > first]
  assert all(line['loss'] == wanted[step]['loss'] for step, line in found.items())
  tensors = lambda path: {
    name: data for name, data in snapshot(path / 'model').items() if name.endswith('.safetensors')
  }
  assert tensors(resumed) and tensors(resumed) == tensors(run)
