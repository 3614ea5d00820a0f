"""What is fuzzed: how a sound file or folder is made, how its files are damaged, what loads it."""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults import mutants

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Target:
  """files: path below the folder -> functions of `mutants` that damage it."""

  name: str
  make: Callable[[Path], None]
  load: Callable[[Path], None]
  files: dict[str, list[Callable]]
  count: int


def picture(kind, mode='RGB', **options):
  buffer = io.BytesIO()
  Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
  return buffer.getvalue()


def every(sequence):
  """All items; one that is refused does not keep the others from being read."""
  from diffusion_jax.errors import UserError

  for i in range(min(len(sequence), 100)):
    try:
      sequence[i]
    except UserError as error:
      assert len(str(error).splitlines()) == 1, str(error)


def safetensors():
  from diffusion_jax.formats.tensors import metadata, open_tensors, write_tensors

  def make(folder):
    tensors = {f't{i}': np.arange(6 * i, dtype=np.float32).reshape(2, -1) for i in range(1, 6)}
    write_tensors(folder / 'x.safetensors', tensors, {'note': 'x'})

  def load(folder):
    for tensor in open_tensors(folder / 'x.safetensors').values():
      assert tensor.nbytes <= 10**6
      np.array(tensor)
    metadata(folder / 'x.safetensors')

  return Target('safetensors', make, load, {'x.safetensors': [mutants.safetensors]}, 400)


def shards():
  from diffusion_jax.formats.tensors import open_tensors, write_json, write_tensors

  def make(folder):
    table = {}
    for i in range(3):
      write_tensors(folder / f'{i}.safetensors', {f't{i}': np.ones(4, np.float32)})
      table[f't{i}'] = f'{i}.safetensors'
    write_json(folder / 'm.safetensors.index.json', {'metadata': {}, 'weight_map': table})

  def load(folder):
    for tensor in open_tensors(folder / 'm.safetensors.index.json').values():
      np.array(tensor)

  return Target(
    'shards', make, load,
    {'m.safetensors.index.json': [mutants.any_json], '1.safetensors': [mutants.safetensors]}, 150,
  )


def statistics():
  from diffusion_jax.evaluation.statistics import described, load_statistics

  def make(folder):
    np.savez(folder / 'x.npz', mu=np.arange(3.0), sigma=np.eye(3), n=9, features='clip')

  def load(folder):
    described(folder / 'x.npz')
    load_statistics(folder / 'x.npz')

  return Target('statistics', make, load, {'x.npz': [mutants.zip_file]}, 300)


def image_batch():
  from diffusion_jax.data.image_sets import ImageBatch, holds_batch

  def make(folder):
    np.savez_compressed(folder / 'a.npz', np.stack([PIXELS] * 3))
    np.savez(folder / 'b.npz', np.stack([PIXELS] * 3))

  def load(folder):
    for name in ('a.npz', 'b.npz'):
      holds_batch(folder / name)
      every(ImageBatch(folder / name))

  zips = [mutants.zip_file]
  return Target('image_batch', make, load, {'a.npz': zips, 'b.npz': zips}, 200)


def tar():
  from diffusion_jax.data.image_sets import TarPictures

  def make(folder):
    with tarfile.open(folder / 'x.tar', 'w', format=tarfile.GNU_FORMAT) as archive:
      for name in ('a.png', 'x' * 150 + '.png', 'b/c.txt', 'd.png'):
        info, data = tarfile.TarInfo(name), picture('png')
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

  return Target('tar', make, lambda folder: every(TarPictures([folder / 'x.tar'])),
                {'x.tar': [mutants.tar_file]}, 400)


def png():
  from diffusion_jax.data.images import read_pixels

  def make(folder):
    (folder / 'a.png').write_bytes(picture('png'))
    (folder / 'b.png').write_bytes(picture('png', 'P'))

  def load(folder):
    for name in ('a.png', 'b.png'):
      assert read_pixels(folder / name).ndim == 3

  return Target('png', make, load, {'a.png': [mutants.png], 'b.png': [mutants.png]}, 400)


def jpeg():
  from diffusion_jax.data.images import read_pixels, read_square

  def make(folder):
    (folder / 'a.jpg').write_bytes(picture('jpeg'))
    (folder / 'b.jpg').write_bytes(picture('jpeg', progressive=True))

  def load(folder):
    for name in ('a.jpg', 'b.jpg'):
      assert read_pixels(folder / name).ndim == 3
      assert read_square(folder / name, 8)[0].shape == (8, 8, 3)

  return Target('jpeg', make, load, {'a.jpg': [mutants.jpeg], 'b.jpg': [mutants.jpeg]}, 300)


def other_pictures():
  from diffusion_jax.data.images import read_pixels

  kinds = ('webp', 'gif', 'bmp', 'tiff')

  def make(folder):
    for kind in kinds:
      (folder / f'x.{kind}').write_bytes(picture(kind))

  def load(folder):
    for kind in kinds:
      read_pixels(folder / f'x.{kind}')

  return Target('other_pictures', make, load,
                {f'x.{kind}': [mutants.any_bytes] for kind in kinds}, 250)


def _captioned(name, file, text):
  from tests.tiny import folder_sources

  def make(folder):
    for letter in 'abcd':
      Image.fromarray(PIXELS).save(folder / f'{letter}.png')
    (folder / file).write_text(text)

  def load(folder):
    for source in folder_sources(folder, 16, 'a picture'):
      every(source)

  return Target(name, make, load, {file: [mutants.text_lines, mutants.any_bytes]}, 150)


def captions_jsonl():
  rows = [{'file_name': f'{letter}.png', 'text': f'picture {letter}'} for letter in 'abcd']
  return _captioned('captions_jsonl', 'metadata.jsonl', '\n'.join(map(json.dumps, rows)))


def captions_csv():
  return _captioned('captions_csv', 'metadata.csv', 'file_name,text\n' + '\n'.join(
    f'{letter}.png,"picture, {letter}"' for letter in 'abcd'))


def captions_txt():
  return _captioned('captions_txt', 'a.txt', 'a fox\na red fox\n')


def table():
  from diffusion_jax.evaluation.report import add_rows

  return Target(
    'table', lambda f: (f / 'x.csv').write_text('step,fid,note\n10,1.5,"a, b"\n20,1.25,x\n'),
    lambda folder: add_rows(folder / 'x.csv', [{'step': 30, 'fid': 1.0, 'more': 'y'}]),
    {'x.csv': [mutants.text_lines, mutants.any_bytes]}, 120,
  )


def prepared():
  from diffusion_jax.data.sources.tfds import PreparedImages
  from tests.data.foreign_set import write_foreign_set

  def make(folder):
    shutil.copytree(write_foreign_set(folder / 'made'), folder, dirs_exist_ok=True)
    shutil.rmtree(folder / 'made')

  shard = 'foreign_set-train.array_record-00000-of-00001'
  return Target(
    'prepared', make, lambda folder: every(PreparedImages(folder, 'train')),
    {'dataset_info.json': [mutants.any_json], 'features.json': [mutants.any_json],
     'label.labels.txt': [mutants.any_bytes], shard: [mutants.any_bytes]}, 250,
  )


SCORES = {'generated': {'fid': 1.5}, 'real': {'fid': 0.5}, 'settings': {'samples': 5}}
STATUS = {'state': 'training', 'retry': True, 'step': 20, 'pid': 5, 'host': 'a', 'updated': 1.5,
          'message': 'x', 'goodput': {'training': 5.0}}


def _make_run(folder):
  lines = [
    {'kind': 'train', 'step': i, 'loss': 1 / i, 'time': float(i), 'learning_rate': 1e-3,
     'images_per_second': 5.0, 'loss_by_timestep': [1.0, None]} for i in range(1, 20)
  ] + [{'kind': 'evaluation', 'step': 19, 'fid': 2.0}]
  (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  schedule = {'beta_schedule': 'linear', 'num_train_timesteps': 50}
  for name, values in {
    'config': {'task': 'diffusion', 'loop': {'seed': 0}, 'settings': {'schedule': schedule}},
    'scores': SCORES, 'versions': {'jax': '0.10'}, 'status': STATUS,
    'evaluation': {'samples': 5, 'of': 9, 'seconds': 1.0},
  }.items():
    (folder / f'{name}.json').write_text(json.dumps(values))


RUN_FILES = {f'{name}.json': [mutants.any_json]
             for name in ('config', 'scores', 'versions', 'status', 'evaluation')}


def run_directory():
  from diffusion_jax.checkpoint.checkpoints import Scores
  from diffusion_jax.errors import UserError
  from diffusion_jax.runs.directory import RunDirectory
  from diffusion_jax.runs.status import is_stalled
  from diffusion_jax.viz.run_files import read_run

  def load(folder):
    directory = RunDirectory(folder)
    Scores(folder, lambda text: None).of('fid')
    is_stalled(directory, 60)
    for read in (
      lambda: directory.check_config({'task': 'diffusion', 'loop': {'seed': 0}}, lambda c: c),
      lambda: read_run(folder),
    ):
      try:
        read()
      except UserError as error:
        assert len(str(error).splitlines()) == 1

  return Target('run_directory', _make_run, load,
                {**RUN_FILES, 'metrics.jsonl': [mutants.text_lines, mutants.any_bytes]}, 300)


def report():
  from diffusion_jax.viz.report import write_report

  return Target('report', _make_run, write_report,
                {**RUN_FILES, 'metrics.jsonl': [mutants.text_lines]}, 16)


def words():
  from diffusion_jax.formats.tensors import write_tensors
  from diffusion_jax.formats.textual_inversion import read_textual_inversion

  return Target(
    'words', lambda f: write_tensors(f / 'x.safetensors', {'<fox>': np.ones((1, 8), np.float32)}),
    lambda folder: read_textual_inversion(folder / 'x.safetensors', {'text_encoder': 8}),
    {'x.safetensors': [mutants.safetensors]}, 120,
  )


def scheduler():
  from diffusion_jax.files import read_object
  from diffusion_jax.formats.scheduler import read_scheduler
  from diffusion_jax.pipelines.directory import sample_config

  configs = {
    'a': {'_class_name': 'DDIMScheduler', 'beta_start': 0.00085, 'beta_end': 0.012,
          'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000, 'clip_sample': False,
          'set_alpha_to_one': False, 'steps_offset': 1, 'prediction_type': 'epsilon'},
    'b': {'_class_name': 'DPMSolverMultistepScheduler', 'use_karras_sigmas': True,
          'solver_order': 2, 'algorithm_type': 'dpmsolver++', 'beta_schedule': 'linear',
          'lambda_min_clipped': float('-inf'), 'thresholding': True, 'sample_max_value': 2.0,
          'timestep_spacing': 'linspace', 'trained_betas': None, 'final_sigmas_type': 'zero'},
    'c': {'_class_name': 'FlowMatchEulerDiscreteScheduler', 'num_train_timesteps': 1000,
          'shift': 3.0},
  }

  def make(folder):
    for name, values in configs.items():
      (folder / f'{name}.json').write_text(json.dumps(values))

  def load(folder):
    from diffusion_jax.diffusion.noise import Schedule

    for name in configs:
      found = read_scheduler(read_object(folder / f'{name}.json'), name)
      Schedule(found.schedule)
      sample_config(found)

  return Target('scheduler', make, load,
                {f'{name}.json': [mutants.json_value] for name in configs}, 250)


def pipeline():
  from diffusion_jax.pipelines.directory import read_model
  from tests.tiny_pipeline import SD, write_tiny_pipeline

  files = ('model_index.json', 'unet/config.json', 'vae/config.json', 'text_encoder/config.json',
           'scheduler/scheduler_config.json', 'tokenizer/tokenizer_config.json',
           'tokenizer/tokenizer.json')
  return Target(
    'pipeline', lambda folder: write_tiny_pipeline(folder, SD),
    lambda folder: read_model(str(folder)), {name: [mutants.any_json] for name in files}, 120,
  )


def _network(kind, config, count):
  from diffusion_jax.formats.networks import load_params, save_params
  from tests.tiny_pipeline import random_params

  return Target(
    f'network_{kind}', lambda folder: save_params(folder, config, random_params(config)),
    lambda folder: load_params(kind, folder), {'config.json': [mutants.any_json]}, count,
  )


def unet():
  from tests.tiny_pipeline import SD

  return _network('unet', SD['unet'], 40)


def autoencoder():
  from tests.tiny_pipeline import AUTOENCODER

  return _network('autoencoder', AUTOENCODER, 40)


def clip_text():
  from tests.tiny_pipeline import SD

  return _network('clip_text', SD['text_encoder'], 40)


def single_file():
  from diffusion_jax.formats.pipeline import read_pipeline
  from diffusion_jax.formats.single_file import read_single_file, write_single_file
  from diffusion_jax.models.autoencoder import AutoencoderKLConfig
  from diffusion_jax.models.text.clip import CLIPTextConfig
  from diffusion_jax.models.unet import UNetConfig
  from tests.tiny_pipeline import TEXT, write_tiny_pipeline

  # Of the widths that a reader of a single file has to assume.
  text = TEXT | {'hidden_size': 64, 'intermediate_size': 64, 'num_attention_heads': 1}
  parts = {
    'vae': AutoencoderKLConfig(block_out_channels=(32, 32, 64), layers_per_block=2,
                               sample_size=16, scaling_factor=0.18215),
    'text_encoder': CLIPTextConfig(**text, num_hidden_layers=1),
    'unet': UNetConfig(
      sample_size=8, block_out_channels=(32, 64), layers_per_block=2, attention_head_dim=8,
      cross_attention_dim=64, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
      up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    ),
  }

  def make(folder):
    write_tiny_pipeline(folder / 'parts', parts)
    write_single_file(read_pipeline(folder / 'parts'), folder / 'x.safetensors', None)

  def load(folder):
    read_single_file(folder / 'x.safetensors', 'epsilon', folder / 'parts')

  return Target('single_file', make, load, {'x.safetensors': [mutants.safetensors]}, 40)


def transformers():
  from diffusion_jax.formats.networks import Part, network_format
  from diffusion_jax.formats.original import read_original, write_original
  from diffusion_jax.formats.tensors import Tensor
  from diffusion_jax.models.dit import DiTConfig
  from diffusion_jax.models.flux import FluxConfig
  from diffusion_jax.models.mmdit import MMDiTConfig
  from diffusion_jax.models.pixart import PixArtConfig
  from tests.tiny_pipeline import published, random_params

  small = dict(num_layers=1, num_attention_heads=1, attention_head_dim=64, sample_size=4)
  texts = dict(joint_attention_dim=8, pooled_projection_dim=8)
  configs = {
    'dit': DiTConfig(**small, num_embeds_ada_norm=3),
    'pixart': PixArtConfig(**small, cross_attention_dim=64, caption_channels=8,
                           use_additional_conditions=False),
    'mmdit': MMDiTConfig(**small, **texts, caption_projection_dim=64, pos_embed_max_size=4),
    'flux': FluxConfig(num_layers=1, num_single_layers=1, num_attention_heads=1, **texts,
                       attention_head_dim=32, axes_dims_rope=(4, 14, 14)),
  }
  names = {kind: f'{kind}.safetensors' for kind in configs}

  def make(folder):
    for kind, config in configs.items():
      stored = {
        name: Tensor(value.dtype, value.shape, lambda value=value: value)
        for name, value in published(random_params(config)).items()
      }
      values = network_format(kind).describe(config)
      write_original(Part(kind=kind, values=values, stored=stored), folder / names[kind], None)

  sound = {}

  def load(folder):
    """Those that differ from what was read before."""
    for kind, name in names.items():
      data = (folder / name).read_bytes()
      if sound.get(name) != data:
        read_original(folder / name, kind)
        sound.setdefault(name, data)

  files = {name: [mutants.safetensors] for name in names.values()}
  return Target('transformers', make, load, files, 80)


def torch_state():
  import torch

  from diffusion_jax.formats.torch_files import read_state

  def make(folder):
    torch.save({'a': torch.ones(3, 4), 'b': torch.arange(5)}, folder / 'x.pt')

    class Net(torch.nn.Module):
      def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 4)

      def forward(self, x):
        return self.inner(x)

    torch.jit.script(Net()).save(str(folder / 'y.pt'))

  def load(folder):
    read_state(folder / 'x.pt')
    read_state(folder / 'y.pt')

  zips = [mutants.zip_file]
  return Target('torch_state', make, load, {'x.pt': zips, 'y.pt': zips}, 200)


def torch_statistics():
  from diffusion_jax.evaluation.statistics import Statistics, load_statistics, save_statistics

  found = Statistics.from_features(np.random.default_rng(0).normal(size=(9, 3)))
  return Target('torch_statistics', lambda folder: save_statistics(folder / 'x.pt', found),
                lambda folder: load_statistics(folder / 'x.pt'), {'x.pt': [mutants.zip_file]}, 100)


GROUPS = {
  'arrays': [safetensors, shards, statistics, image_batch, tar],
  'pictures': [png, jpeg, other_pictures, captions_jsonl, captions_csv, captions_txt, table],
  'runs': [prepared, run_directory, report],
  'weights': [words, torch_state, torch_statistics],
  'configs': [scheduler, pipeline, unet, autoencoder, clip_text, single_file, transformers],
}
