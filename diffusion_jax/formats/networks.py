"""Every kind of network that can be read and written, and how its files look.

Reads and writes networks in the layout of diffusers and transformers, or in our own.

A directory holds config.json and weights in safetensors, in one file or in shards with an index;
both libraries' `from_pretrained` open what `save` writes, and `load` opens what they write. Our own
layout, params.safetensors, has our names and axes, so that every shard of a device is read as it
lies. Weights go tensor by tensor from the file onto the devices. Nothing here unpickles or
downloads.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from diffusion_jax.errors import UserError
from diffusion_jax.files import inside
from diffusion_jax.formats import autoencoder, classifier, dinov2, dit, mlp, text, unet
from diffusion_jax.formats.published import (
  from_published,
  from_published_layout,
  match,
  published_shape,
  same_names,
  to_published_layout,
  to_published_names,
)
from diffusion_jax.formats.tensors import (
  INDEX,
  PICKLES,
  NewTensor,
  open_tensors,
  read_json,
  write_json,
  write_tensors,
)
from diffusion_jax.models import network
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.autoencoder_tiny import AutoencoderTiny
from diffusion_jax.models.checks import require, shown
from diffusion_jax.models.controlnet import ControlNet
from diffusion_jax.models.dit import DiT
from diffusion_jax.models.mlp import MLP
from diffusion_jax.models.mmdit import MMDiT
from diffusion_jax.models.perceptual import lpips_shapes
from diffusion_jax.models.text.clip import (
  CLIP,
  CLIPTextModel,
  CLIPTextModelWithProjection,
  CLIPVisionModel,
  CLIPVisionModelWithProjection,
)
from diffusion_jax.models.text.t5 import T5EncoderModel
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.vision.classifier import Classifier
from diffusion_jax.models.vision.dinov2 import DINOv2
from diffusion_jax.models.vq import VQModel
from diffusion_jax.parallel.mesh import shard_params
from diffusion_jax.types import Params

DIFFUSERS, TRANSFORMERS = 'diffusion_pytorch_model.safetensors', 'model.safetensors'


def same_name(name: str) -> str | None:
  """A published tensor that is called as its network is built."""
  return name


@dataclasses.dataclass(frozen=True)
class Kind:
  """How one kind of network is built, described and stored.

  named: the key of config.json that identifies the kind, and the values that it may have.
  rename: a tensor's name in a file -> its name by the modules of our network, `.weight` for every
  kernel, scale and embedding; None for a tensor that holds no parameter, such as a position table.
  """

  module: type
  config: type
  weights: str
  named: tuple[str, tuple[Any, ...]]
  read: Callable[[dict[str, Any], str], Any]
  write: Callable[[Any], dict[str, Any]]
  rename: Callable[[str], str | None] = same_name

  def describes(self, values: dict[str, Any]) -> bool:
    """Whether a config.json is of this kind."""
    key, known = self.named
    return values.get(key) in known


# Autoencoders saved before diffusers 0.18 name the parts of their attention so.
_OLD_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def _new_attention(name: str) -> str:
  parts = name.split('.')
  if len(parts) >= 4 and parts[-4] == 'attentions':
    parts[-2] = _OLD_ATTENTION.get(parts[-2], parts[-2])
  return '.'.join(parts)


def _without_positions(name: str) -> str | None:
  return None if name.endswith('position_ids') else name


def _in_tower(prefix: str, name: str) -> str | None:
  """transformers 5 leaves the prefix out of a tower alone, and writes it beside a projection."""
  if name.endswith('position_ids'):
    return None
  return name if name.startswith((prefix, 'text_projection.', 'visual_projection.')) else (
    prefix + name
  )


_text_tower = functools.partial(_in_tower, 'text_model.')
_vision_tower = functools.partial(_in_tower, 'vision_model.')


def _dinov2(name: str) -> str | None:
  """A network with a head for classes has the body under a prefix; the head is left out."""
  if name.startswith('classifier.'):
    return None
  return name.removeprefix('dinov2.').removeprefix('dinov2_with_registers.')


def _t5_encoder(name: str) -> str | None:
  """The table of tokens has two names, and a whole T5 also has a decoder, which we leave out."""
  if name.startswith(('decoder.', 'lm_head.')):
    return None
  return 'shared.weight' if name == 'encoder.embed_tokens.weight' else name


KINDS = {
  'autoencoder': Kind(
    AutoencoderKL, autoencoder.AutoencoderKLConfig, DIFFUSERS,
    ('_class_name', ('AutoencoderKL',)),
    autoencoder.read_autoencoder, autoencoder.write_autoencoder, _new_attention,
  ),
  'unet': Kind(
    UNet, unet.UNetConfig, DIFFUSERS, ('_class_name', ('UNet2DConditionModel',)),
    unet.read_unet, unet.write_unet,
  ),
  'controlnet': Kind(
    ControlNet, unet.ControlNetConfig, DIFFUSERS, ('_class_name', ('ControlNetModel',)),
    unet.read_controlnet, unet.write_controlnet,
  ),
  'clip': Kind(
    CLIP, text.CLIPConfig, TRANSFORMERS, ('model_type', ('clip',)),
    text.read_clip, text.write_clip, _without_positions,
  ),
  'clip_text': Kind(
    CLIPTextModel, text.CLIPTextConfig, TRANSFORMERS,
    ('architectures', (['CLIPTextModel'],)),
    text.read_clip_text, text.write_clip_text, _text_tower,
  ),
  'clip_text_projection': Kind(
    CLIPTextModelWithProjection, text.CLIPTextProjectionConfig, TRANSFORMERS,
    ('architectures', (['CLIPTextModelWithProjection'],)),
    text.read_clip_text_projection, text.write_clip_text_projection, _text_tower,
  ),
  'clip_vision': Kind(
    CLIPVisionModel, text.CLIPVisionConfig, TRANSFORMERS,
    ('architectures', (['CLIPVisionModel'],)),
    text.read_clip_vision, text.write_clip_vision, _vision_tower,
  ),
  'clip_vision_projection': Kind(
    CLIPVisionModelWithProjection, text.CLIPVisionProjectionConfig, TRANSFORMERS,
    ('architectures', (['CLIPVisionModelWithProjection'],)),
    text.read_clip_vision_projection, text.write_clip_vision_projection, _vision_tower,
  ),
  'dinov2': Kind(
    DINOv2, dinov2.DINOv2Config, TRANSFORMERS, ('model_type', dinov2.MODEL_TYPES),
    dinov2.read_dinov2, dinov2.write_dinov2, _dinov2,
  ),
  't5': Kind(
    T5EncoderModel, text.T5Config, TRANSFORMERS, ('model_type', ('t5',)),
    text.read_t5, text.write_t5, _t5_encoder,
  ),
  'vq': Kind(
    VQModel, autoencoder.VQConfig, DIFFUSERS, ('_class_name', ('VQModel',)),
    autoencoder.read_vq, autoencoder.write_vq, _new_attention,
  ),
  'autoencoder_tiny': Kind(
    AutoencoderTiny, autoencoder.AutoencoderTinyConfig, DIFFUSERS,
    ('_class_name', ('AutoencoderTiny',)),
    autoencoder.read_autoencoder_tiny, autoencoder.write_autoencoder_tiny,
  ),
  'dit': Kind(
    DiT, dit.DiTConfig, DIFFUSERS, ('_class_name', dit.DIT_CLASSES), dit.read_dit, dit.write_dit
  ),
  'mmdit': Kind(
    MMDiT, dit.MMDiTConfig, DIFFUSERS, ('_class_name', ('SD3Transformer2DModel',)),
    dit.read_mmdit, dit.write_mmdit,
  ),
  'classifier': Kind(
    Classifier, classifier.ClassifierConfig, DIFFUSERS, ('_class_name', ('Classifier',)),
    classifier.read_classifier, classifier.write_classifier,
  ),
  'mlp': Kind(
    MLP, mlp.MLPConfig, DIFFUSERS, ('_class_name', ('MLP',)), mlp.read_mlp, mlp.write_mlp
  ),
}


def find_kind(name: str) -> Kind:
  """The kind of that name. UserError, listing them, where there is none."""
  if name not in KINDS:
    raise UserError(f'There is no kind of model {name!r}; use one of {", ".join(KINDS)}.')
  return KINDS[name]


def kind_of(module: Any) -> str:
  """The name of a module's kind. UserError where it has none."""
  for name, spec in KINDS.items():
    if type(module) is spec.module:
      return name
  raise UserError(f'A {type(module).__name__} is no kind of model that can be saved.')


def kind_of_config(config: Any) -> Kind:
  """The kind whose config has this type."""
  for spec in KINDS.values():
    if type(config) is spec.config:
      return spec
  raise UserError(f'No kind of model has a config of type {type(config).__name__}.')


ASSETS = Path(__file__).resolve().parents[1] / 'assets'
PREFIX = 'asset:'
DTYPES = {
  'float32': np.dtype(np.float32), 'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
NATIVE = 'params.safetensors'
LAYOUTS = ('diffusers', 'native')


def resolve(path: str | os.PathLike) -> Path:
  """'asset:NAME' -> the file or directory NAME that the package ships; another path as it is.

  UserError, listing what exists, where there is no such asset.
  """
  text = os.fspath(path)
  if not text.startswith(PREFIX):
    return Path(text)
  name = text.removeprefix(PREFIX)
  found = (ASSETS / name).resolve()
  inside = found.is_relative_to(ASSETS) and found != ASSETS
  if not inside or not found.exists():
    entries = ASSETS.iterdir() if ASSETS.is_dir() else ()
    names = sorted(PREFIX + entry.name for entry in entries)
    raise UserError(f'There is no {text}; there is {", ".join(names) or "no asset at all"}.')
  return found


def load(
  kind: str, path: str | os.PathLike, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> nnx.Module:
  """The network in a directory, such as 'unet', ready to be called.

  Args:
    kind: one of KINDS in `formats.networks`.
    path: the directory; may be 'asset:NAME'.
    dtype: of the parameters and of the computation.
    mesh: devices that share the parameters; None leaves them on the host.

  Raises:
    UserError: something is missing, broken, of another kind, or not implemented.
  """
  config, params = load_params(kind, path, dtype=dtype, mesh=mesh)
  make = lambda rngs: find_kind(kind).module(config, dtype=dtype, param_dtype=dtype, rngs=rngs)
  return network.merge(network.abstract(make)[0], params)


def save(
  module: nnx.Module, path: str | os.PathLike, *, dtype: str = 'float32', layout: str = 'diffusers'
) -> None:
  """Writes a network as a directory that `load` and, but for 'native', its own library open.

  Args:
    dtype: 'float32', 'float16' or 'bfloat16'.

  Raises:
    UserError: a weight that dtype cannot hold, or a module of no known kind.
  """
  kind_of(module)
  save_params(path, module.config, network.split(module)[1], dtype=dtype, layout=layout)


def read_config(kind: str, path: str | os.PathLike) -> Any:
  """The config of the network in a directory. UserError where it is of another kind."""
  spec, file = find_kind(kind), resolve(path) / 'config.json'
  values = read_json(inside(file, file.parent))
  require(
    spec.describes(values),
    f'{file} describes no {kind}: its {spec.named[0]} is {shown(values.get(spec.named[0]))} and '
    f'must be {" or ".join(map(repr, spec.named[1]))}.',
  )
  return spec.read(values, str(file))


def load_params(
  kind: str, path: str | os.PathLike, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> tuple[Any, Params]:
  """(config, parameters by dotted name), as `load`; without a mesh numpy arrays on the host."""
  config, spec, directory = read_config(kind, path), find_kind(kind), resolve(path)
  native = directory / NATIVE
  file = inside(native if native.is_file() else find_weights(directory, spec.weights), directory)
  shapes = network.abstract(lambda rngs: spec.module(config, rngs=rngs))[1]
  return config, read_params(file, spec, shapes, dtype=dtype, mesh=mesh)


def read_params(
  file: Path, spec: Kind, shapes: Params, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> Params:
  """The parameters of `shapes` from one file or index, onto the mesh; published names or ours."""
  tensors, ours = open_tensors(file), file.name == NATIVE
  if ours:
    matched = match_native(tensors, shapes, str(file))
  else:
    matched = match(tensors, shapes, str(file), spec.rename)
  shardings = None if mesh is None else shard_params(shapes, mesh)
  params = {}
  for name, tensor in matched.items():
    view = np.asarray(tensor) if ours else from_published_layout(name, tensor)
    # A copy, so that nothing holds on to the file.
    read = lambda index, view=view: np.array(view[index], dtype, order='C')
    if shardings is None:
      params[name] = read(...)
    else:
      params[name] = jax.make_array_from_callback(view.shape, shardings[name], read)
      params[name].block_until_ready()  # Or the maps of many tensors would stay open at once.
  return params


def match_native(tensors: Mapping[str, Any], shapes: Params, where: str) -> dict[str, Any]:
  """Tensors by our own names, checked against the network's as `convert.match` does."""
  same_names(set(tensors), set(shapes), where)
  for name, leaf in shapes.items():
    require(
      tuple(tensors[name].shape) == tuple(leaf.shape),
      f'{where}: {name} has shape {list(tensors[name].shape)}, which does not fit the config; it '
      f'must be {list(leaf.shape)}.',
    )
  return {name: tensors[name] for name in shapes}


def save_params(
  path: str | os.PathLike, config: Any, params: Mapping[str, Any], *, dtype: str = 'float32',
  layout: str = 'diffusers',
) -> None:
  """Writes a network given by its config and parameters, as `save`."""
  require(dtype in DTYPES, f'dtype must be one of {", ".join(DTYPES)}, not {dtype!r}.')
  require(layout in LAYOUTS, f'layout must be one of {", ".join(LAYOUTS)}, not {layout!r}.')
  spec, path = kind_of_config(config), Path(path)
  native = layout == 'native'
  names = {name: name for name in params} if native else to_published_names(params)

  def tensor(name: str, value: Any) -> NewTensor:
    shape = tuple(value.shape) if native else published_shape(name, tuple(value.shape))
    change = (lambda name, value: np.asarray(value)) if native else to_published_layout
    return NewTensor(DTYPES[dtype], shape, lambda: cast(name, change(name, value), dtype))

  values = spec.write(config)
  if spec.weights == TRANSFORMERS:
    values['dtype'] = dtype
  tensors = {names[name]: tensor(name, value) for name, value in params.items()}
  write_tensors(path / (NATIVE if native else spec.weights), tensors)
  write_json(path / 'config.json', values)


def load_lpips(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Parameters for models.lpips from a safetensors file of the `lpips` package's state (VGG)."""
  path = resolve(path)
  unused = ('scaling_layer.', 'lins.')  # Constants, and a second name of lin0 to lin4.
  rename = lambda name: None if name.startswith(unused) else name
  return from_published(open_tensors(path), lpips_shapes(), str(path), rename)


def find_weights(directory: Path, name: str) -> Path:
  """The weights' file or index, in full precision or, failing that, the published fp16 variant."""
  stem = name.removesuffix('.safetensors')
  for variant in (stem, f'{stem}.fp16'):
    for path in (directory / f'{variant}.safetensors', directory / f'{variant}.safetensors{INDEX}'):
      if path.is_file():
        return path
  # The published names of sharded variants put the variant last.
  if (path := directory / f'{stem}.safetensors.index.fp16.json').is_file():
    return path
  pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
  why = f' ({pickles[0]} is a pickle, which is never opened)' if pickles else ''
  raise UserError(
    f'There is no {directory / name}{why}; give a directory with safetensors weights.'
  )


def cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
  """`value` as one of DTYPES. UserError, naming it, where that cannot hold its values."""
  with np.errstate(over='ignore'):
    cast = value.astype(DTYPES[dtype])
  require(
    bool(np.isfinite(cast).all()),
    f'{name} has values that {dtype} cannot hold; save as float32, or look for divergence.',
  )
  return cast
