"""Tensors in single files of Stable Diffusion: names and shapes <-> those of diffusers.

A table of `Rule`s made of a network's own names is total in both directions: it renames, reshapes,
transposes and stacks. In the other direction shapes determine config.json.

U-Net: input_blocks.0 is the first convolution; each level has its layers and, but for the last, a
downsampling; output_blocks go upwards, one more a level, the last one with the upsampling.
Autoencoder: levels upwards by resolution, attention as convolutions. Text encoder: its own names or
OpenCLIP's.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import UserError, require
from diffusion_jax.formats.published import same_names
from diffusion_jax.formats.tensors import Tensor

Shapes = Mapping[str, tuple[int, ...]]


class Rule(NamedTuple):
  """The relation of a single file's tensor, `stored`, to one or more `published` ones.

  change: 'same'; 'pointwise': a matrix [o i] is stored as a convolution [o i 1 1]; 'transposed';
  'stacked': several along the first axis, `parts` their relative heights, () for equal ones;
  'swapped': with its halves along the first axis exchanged; 'shared': the published ones are equal
  copies of it; 'identity': not stored, since readers take it to be the identity.
  """

  published: tuple[str, ...]
  stored: str
  change: str = 'same'
  parts: tuple[int, ...] = ()


def to_stored(
  rules: Iterable[Rule], tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
  """Return published tensors as those of a single file. UserError where the names do not agree."""
  rules = list(rules)
  same_names(set(tensors), {name for rule in rules for name in rule.published}, where)
  for rule in rules:
    require(
      rule.change != 'identity' or _is_identity(tensors[rule.published[0]]),
      f'{where}: {rule.published[0]} is not the identity, as readers of a single file take it to '
      'be; convert to another layout.',
    )
    require(
      rule.change != 'shared' or _are_equal([tensors[name] for name in rule.published]),
      f'{where}: {rule.published[0]} and its copies in other blocks differ, but a single file has '
      f'one {rule.stored}; convert to another layout.',
    )
  return {
    rule.stored: _store(rule, [tensors[name] for name in rule.published])
    for rule in rules if rule.change != 'identity'
  }


def _is_identity(tensor: Tensor) -> bool:
  value = tensor.make()
  return value.shape[0] == value.shape[-1] and bool((value == np.eye(value.shape[0])).all())


def _are_equal(tensors: list[Tensor]) -> bool:
  first = tensors[0].make()
  return all(np.array_equal(first, tensor.make()) for tensor in tensors[1:])


def from_stored(
  rules: Iterable[Rule], tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
  """Return tensors of a single file as published ones. UserError where the names do not agree."""
  implied = {rule.published[0] for rule in rules if rule.change == 'identity'}
  rules = [rule for rule in rules if rule.change != 'identity']
  same_names(set(tensors), {rule.stored for rule in rules}, where)
  found = {
    name: tensor for rule in rules for name, tensor in _publish(rule, tensors[rule.stored]).items()
  }
  return found | {name: _identity(found) for name in implied}


def _identity(tensors: Mapping[str, Tensor]) -> Tensor:
  """The identity of a text encoder's width, in its type."""
  last = tensors['text_model.final_layer_norm.weight']
  return Tensor(last.dtype, last.shape * 2, lambda: np.eye(last.shape[0], dtype=last.dtype))


def _store(rule: Rule, tensors: list[Tensor]) -> Tensor:
  first = tensors[0]
  if rule.change == 'pointwise':
    return first.then(lambda value: value[..., None, None], (*first.shape, 1, 1))
  if rule.change == 'transposed':
    return first.then(np.transpose, first.shape[::-1])
  if rule.change == 'stacked':
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    return Tensor(first.dtype, shape, lambda: np.concatenate([t.make() for t in tensors]))
  return first.then(_swap) if rule.change == 'swapped' else first


def _swap(value: np.ndarray) -> np.ndarray:
  return np.concatenate(np.split(value, [len(value) // 2])[::-1])


def _publish(rule: Rule, tensor: Tensor) -> dict[str, Tensor]:
  if rule.change == 'stacked':
    return _unstack(rule, tensor)
  if rule.change == 'shared':
    return dict.fromkeys(rule.published, tensor)
  if rule.change == 'pointwise':
    shape = tensor.shape[:2]
    tensor = tensor.then(lambda value: value.reshape(shape), shape)
  elif rule.change == 'transposed':
    tensor = tensor.then(np.transpose, tensor.shape[::-1])
  elif rule.change == 'swapped':
    tensor = tensor.then(_swap)
  return {rule.published[0]: tensor}


def _unstack(rule: Rule, tensor: Tensor) -> dict[str, Tensor]:
  parts, total = rule.parts or (1,) * len(rule.published), tensor.shape[0] if tensor.shape else 0
  ends = [0, *(total * sum(parts[: n + 1]) // sum(parts) for n in range(len(parts)))]
  part = lambda a, b: lambda value: value[a:b]
  return {
    name: tensor.then(part(a, b), (b - a, *tensor.shape[1:]))
    for name, a, b in zip(rule.published, ends, ends[1:], strict=False)
  }


UNET, AUTOENCODER = 'model.diffusion_model.', 'first_stage_model.'
"""Before the names of these networks in a single file."""
_RESNET = {
  'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1',
  'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection',
}
_ENDS = {
  'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
  'conv_in': 'input_blocks.0.0', 'conv_norm_out': 'out.0', 'conv_out': 'out.2',
  'mid_block.resnets.0': 'middle_block.0', 'mid_block.attentions.0': 'middle_block.1',
  'mid_block.resnets.1': 'middle_block.2',
}


def unet_names(names: Iterable[str]) -> dict[str, str]:
  """Return names of a U-Net's layers or tensors with those in a single file; {} for no U-Net."""
  split = [name.split('.') for name in names]
  starts = {'.'.join(parts[:length]) for parts in split for length in range(1, len(parts) + 1)}
  ways = dict(_blocks(starts, 'down_blocks', 'input_blocks', 1))
  ways |= _blocks(starts, 'up_blocks', 'output_blocks', 0)
  if not ways:
    return {}
  labels = 'add_embedding' if 'add_embedding' in starts else 'class_embedding'
  blocks = ways | _ENDS | {
    labels: 'label_emb', f'{labels}.linear_1': 'label_emb.0.0',
    f'{labels}.linear_2': 'label_emb.0.2',
  }
  found = {}
  for parts in split:
    lengths = range(min(len(parts), 5), 0, -1)  # As of down_blocks.0.downsamplers.0.conv.
    for block, inner in (('.'.join(parts[:n]), parts[n:]) for n in lengths):
      if block in blocks:
        inner = [_RESNET.get(inner[0], inner[0]), *inner[1:]] if inner else []
        found['.'.join(parts)] = '.'.join([blocks[block], *inner])
        break
  return found


def _blocks(starts: set[str], way: str, stored: str, number: int) -> Iterator[tuple[str, str]]:
  """Each resnet, attention and resampling on the way down or up, with its name in the file."""
  level = 0
  while (block := f'{way}.{level}') in starts:
    layer = 0
    while f'{block}.resnets.{layer}' in starts:
      yield f'{block}.resnets.{layer}', f'{stored}.{number}.0'
      yield f'{block}.attentions.{layer}', f'{stored}.{number}.1'
      number, layer = number + 1, layer + 1
    if f'{block}.downsamplers' in starts:
      yield f'{block}.downsamplers.0.conv', f'{stored}.{number}.0.op'
      number += 1
    place = 2 if f'{block}.attentions' in starts else 1
    yield f'{block}.upsamplers.0.conv', f'{stored}.{number - 1}.{place}.conv'
    level += 1


def unet_rules(names: Iterable[str]) -> list[Rule]:
  """Return the rules for the published names of a U-Net's tensors, without the prefix."""
  return [Rule((name,), stored) for name, stored in unet_names(names).items()]


_IN_AUTOENCODER = {
  'mid_block.attentions.0': 'mid.attn_1', 'mid_block.resnets.0': 'mid.block_1',
  'mid_block.resnets.1': 'mid.block_2', 'down_blocks': 'down', 'resnets': 'block',
  'downsamplers.0': 'downsample', 'upsamplers.0': 'upsample', 'conv_norm_out': 'norm_out',
  'conv_shortcut': 'nin_shortcut', 'group_norm': 'norm', 'to_q': 'q', 'to_k': 'k', 'to_v': 'v',
  'to_out.0': 'proj_out',
}


def autoencoder_rules(names: Iterable[str]) -> list[Rule]:
  """Return the rules for the published names of an autoencoder's tensors, without the prefix."""
  names = [name for name in names if not re.search(r'(down|up)_blocks\.\d+\.attentions', name)]
  levels = {found[1] for name in names if (found := re.match(r'decoder\.up_blocks\.(\d+)', name))}
  upwards = lambda found: f'up.{len(levels) - 1 - int(found[1])}'
  rules = []
  for name in names:
    stored = re.sub(r'up_blocks\.(\d+)', upwards, name)
    for ours, theirs in _IN_AUTOENCODER.items():
      stored = stored.replace(f'.{ours}.', f'.{theirs}.')
    matrix = re.search(r'\.to_(q|k|v|out\.0)\.weight$', name)
    rules.append(Rule((name,), stored, 'pointwise' if matrix else 'same'))
  return rules


PROJECTION = 'text_projection.weight'
TEXT_STYLES = {
  'clip': 'quick_gelu', 'clip_identity': 'quick_gelu', 'clip_projection': 'gelu',
  'open_clip': 'gelu',
}
"""How a tower of CLIP is stored -> its activation. 'clip': by the names of transformers, without a
projection; 'clip_identity': with one that is the identity and not stored; 'clip_projection': with
its own; 'open_clip': by OpenCLIP's names, with queries, keys and values in one matrix."""
_IN_LAYER = {
  'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj',
  'self_attn.out_proj': 'attn.out_proj',
}
_OF_TEXT = {
  'text_model.embeddings.token_embedding.weight': ('token_embedding.weight', 'same'),
  'text_model.embeddings.position_embedding.weight': ('positional_embedding', 'same'),
  'text_model.final_layer_norm.weight': ('ln_final.weight', 'same'),
  'text_model.final_layer_norm.bias': ('ln_final.bias', 'same'),
  'text_projection.weight': ('text_projection', 'transposed'),
}


def text_rules(names: Iterable[str], style: str) -> list[Rule]:
  """Rules for the published names of a text encoder's tensors.

  style: a row of TEXT_STYLES.
  """
  if style != 'open_clip':
    rules = [Rule((name,), name) for name in names if name.startswith('text_')]
    implied = style == 'clip_identity'
    return [
      rule._replace(change='identity') if implied and rule.stored == PROJECTION else rule
      for rule in rules
    ]
  rules = []
  for name in names:
    found = re.fullmatch(r'text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)', name)
    if found is None:
      rules += [Rule((name,), *_OF_TEXT[name])] if name in _OF_TEXT else []
      continue
    number, module, leaf = found.groups()
    layer = f'transformer.resblocks.{number}'
    if module in _IN_LAYER:
      rules.append(Rule((name,), f'{layer}.{_IN_LAYER[module]}.{leaf}'))
    elif module == 'self_attn.q_proj':
      every = tuple(name.replace('q_proj', f'{part}_proj') for part in 'qkv')
      rules.append(Rule(every, f'{layer}.attn.in_proj_{leaf}', 'stacked'))
  return rules


def unet_config(
  shapes: Shapes, where: str, *, heads: int | None, pooled: int | None, sizes: int = 6
) -> dict[str, Any]:
  """config.json of diffusers' UNet2DConditionModel, by the tensors without the prefix.

  heads: at every level; None: one per 64 channels. pooled: width of Stable Diffusion XL's pooled
  text; None for other families, where an MLP over labels is of noise levels. sizes: how many
  numbers it is given beside that.
  """
  get = lambda module: _shape(shapes, module, where)
  depth_of = _depths(shapes)
  channels, layers, depths, only = [], [0], [0], [False]
  block = 1
  while any(name.startswith(f'input_blocks.{block}.') for name in shapes):
    ours = f'input_blocks.{block}'
    if f'{ours}.0.op.weight' in shapes:
      layers, depths, only = [*layers, 0], [*depths, 0], [*only, False]
    else:
      layers[-1] += 1
      channels[len(layers) - 1 :] = [get(f'{ours}.0.out_layers.3')[0]]
      depths[-1] = depth_of.get(ours, 0)
      key = f'{ours}.1.transformer_blocks.0.attn1.to_k'
      only[-1] = bool(depths[-1]) and get(key)[1] != channels[-1]
    block += 1
  require(
    len(channels) == len(layers),
    f'{where} holds no U-Net of Stable Diffusion; check that it is a whole model.',
  )
  # The middle has the depth of the last level, whether that has attention or not.
  middle = depth_of.get('middle_block', 0)
  require(
    middle > 0 and depths[-1] in (0, middle),
    f'{where}: the attention in the middle of its U-Net is not of the depth of its last level.',
  )
  inner = [depth or 1 for depth in depths[:-1]] + [middle]
  if {*depths, 0, middle} == {0, middle}:  # Published so, whichever levels have attention.
    inner = middle
  return {
    '_class_name': 'UNet2DConditionModel', 'act_fn': 'silu', 'norm_num_groups': 32,
    'norm_eps': 1e-5, 'flip_sin_to_cos': True, 'freq_shift': 0, 'center_input_sample': False,
    'downsample_padding': 1, 'mid_block_scale_factor': 1,
    'in_channels': get('input_blocks.0.0')[1], 'out_channels': get('out.2')[0],
    'block_out_channels': channels,
    'down_block_types': ['CrossAttnDownBlock2D' if d else 'DownBlock2D' for d in depths],
    'up_block_types': ['CrossAttnUpBlock2D' if d else 'UpBlock2D' for d in depths[::-1]],
    'layers_per_block': layers[0] if len(set(layers)) == 1 else layers,
    'transformer_layers_per_block': inner,
    'attention_head_dim': heads or [max(1, width // 64) for width in channels],
    'cross_attention_dim': get('middle_block.1.transformer_blocks.0.attn2.to_k')[1],
    'use_linear_projection': len(get('middle_block.1.proj_in')) == 2,
    'only_cross_attention': only if any(only) else False,
  } | _label_config(shapes, where, pooled, sizes)


def _depths(shapes: Shapes) -> dict[str, int]:
  """Transformer blocks of each block that has attention."""
  depths: dict[str, int] = {}
  for name in shapes:
    if found := re.match(r'(.+)\.1\.transformer_blocks\.(\d{1,4})\.norm1\.weight$', name):
      depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
  return depths


def _shape(shapes: Shapes, module: str, where: str) -> tuple[int, ...]:
  name = f'{module}.weight'
  if name not in shapes:
    raise UserError(f'{where} lacks {UNET}{name}; fetch it again.')
  return tuple(shapes[name])


def _label_config(
  shapes: Shapes, where: str, pooled: int | None, sizes: int
) -> dict[str, Any]:
  if 'label_emb.weight' in shapes:
    return {'num_class_embeds': _shape(shapes, 'label_emb', where)[0]}
  if 'label_emb.0.0.weight' not in shapes:
    return {}
  width = _shape(shapes, 'label_emb.0.0', where)[1]
  values: dict[str, Any] = {'projection_class_embeddings_input_dim': width}
  if pooled is None:
    return values | {'class_embed_type': 'projection'}
  # Six numbers: the original size, the crop's corner, the target's size, or a score instead of it.
  return values | {
    'addition_embed_type': 'text_time', 'addition_time_embed_dim': (width - pooled) // sizes
  }


def autoencoder_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """config.json of diffusers' AutoencoderKL by the tensors; shapes lack its scaling factor."""
  require(
    'encoder.conv_in.weight' in shapes and 'decoder.conv_in.weight' in shapes,
    f'{where} holds no autoencoder; give a whole model.',
  )
  channels, layers = [], 0
  while (name := f'encoder.down.{len(channels)}.block.0.conv2.weight') in shapes:
    channels.append(shapes[name][0])
  while f'encoder.down.0.block.{layers}.conv2.weight' in shapes:
    layers += 1
  levels = len(channels)
  return {
    '_class_name': 'AutoencoderKL', 'act_fn': 'silu', 'norm_num_groups': 32,
    'in_channels': shapes['encoder.conv_in.weight'][1],
    'out_channels': shapes.get('decoder.conv_out.weight', (3,))[0],
    'latent_channels': shapes['decoder.conv_in.weight'][1],
    'block_out_channels': channels, 'layers_per_block': layers,
    'down_block_types': ['DownEncoderBlock2D'] * levels,
    'up_block_types': ['UpDecoderBlock2D'] * levels,
  }


def text_config(shapes: Shapes, style: str, where: str) -> dict[str, Any]:
  """Return config.json of a text encoder of one of TEXT_STYLES."""
  get = lambda name: shapes.get(text_rules([name], style)[0].stored)
  tokens, positions, wide = (get(f'text_model.{name}.weight') for name in (
    'embeddings.token_embedding', 'embeddings.position_embedding', 'encoder.layers.0.mlp.fc1'
  ))
  require(
    tokens is not None and positions is not None and wide is not None,
    f'{where} holds no whole text encoder; give a whole model.',
  )
  layer = r'(?:text_model\.encoder\.layers|transformer\.resblocks)\.(\d{1,4})\.'
  layers = max(int(found[1]) for name in shapes if (found := re.match(layer, name))) + 1
  width = tokens[1]
  stored = get(PROJECTION)
  projection = {
    'clip': None, 'clip_identity': width, 'clip_projection': stored and stored[0],
    'open_clip': stored and stored[-1],
  }[style]
  return {
    'architectures': ['CLIPTextModelWithProjection' if projection else 'CLIPTextModel'],
    'model_type': 'clip_text_model', 'hidden_act': TEXT_STYLES[style],
    'vocab_size': tokens[0], 'hidden_size': width, 'intermediate_size': wide[0],
    'num_hidden_layers': layers, 'num_attention_heads': max(1, width // 64),
    'max_position_embeddings': positions[0], 'layer_norm_eps': 1e-5,
    'projection_dim': projection or width,
    # As published: 2 means pooling at the largest id, which is the end of the text.
    'bos_token_id': 0, 'eos_token_id': 2, 'pad_token_id': 1,
  }
