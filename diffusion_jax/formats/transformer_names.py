"""Layers of Stable Diffusion 3, Flux.1, PixArt and DiT by the names of those who published them.

A row relates a layer of an original file to one or several of diffusers; a table is total in both
directions. It serves single files, whose tensors are renamed, and LoRA, whose layers are. In the
other direction shapes determine config.json.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.errors import UserError, require
from diffusion_jax.formats.single_file_names import Rule, Shapes


class Row(NamedTuple):
  """`stored`, a layer of an original file, and the `published` ones that it is.

  '*' stands for a block's number, '$' for that of the last. change: see `Rule`. parts: heights of
  what is stacked, relative to one another; () for equal ones. leaf: of the stored tensor where it
  is not that of the published one.
  """

  stored: str
  published: tuple[str, ...]
  change: str = 'same'
  parts: tuple[int, ...] = ()
  leaf: str | None = None


def _rows(table: Mapping[str, str], **more: Any) -> list[Row]:
  """Rows of layers with one layer each."""
  return [Row(stored, (published,), **more) for stored, published in table.items()]


def _qkv(stored: str, module: str, names: str = 'to_q to_k to_v') -> Row:
  """Queries, keys and values in one matrix."""
  return Row(stored, tuple(f'{module}.{name}' for name in names.split()), 'stacked')


def _block(stored: str, module: str, table: Mapping[str, str], **more: Any) -> list[Row]:
  """Rows of a block's layers."""
  return _rows({f'{stored}.{a}': f'{module}.{b}' for a, b in table.items()}, **more)


_ADDED = 'add_q_proj add_k_proj add_v_proj'
_JOINT, _X = 'transformer_blocks.*', 'joint_blocks.*.x_block'
_CONTEXT = 'joint_blocks.*.context_block'
# A final modulation is stored with the shift first, and published with the scale first.
_MMDIT = [
  Row('pos_embed', ('pos_embed',), leaf=''),
  *_rows({
    'x_embedder.proj': 'pos_embed.proj', 'context_embedder': 'context_embedder',
    't_embedder.mlp.0': 'time_text_embed.timestep_embedder.linear_1',
    't_embedder.mlp.2': 'time_text_embed.timestep_embedder.linear_2',
    'y_embedder.mlp.0': 'time_text_embed.text_embedder.linear_1',
    'y_embedder.mlp.2': 'time_text_embed.text_embedder.linear_2',
    'final_layer.linear': 'proj_out',
  }),
  *_block(_X, _JOINT, {
    'attn.proj': 'attn.to_out.0', 'attn2.proj': 'attn2.to_out.0',
    'attn.ln_q': 'attn.norm_q', 'attn.ln_k': 'attn.norm_k',
    'attn2.ln_q': 'attn2.norm_q', 'attn2.ln_k': 'attn2.norm_k',
    'adaLN_modulation.1': 'norm1.linear', 'mlp.fc1': 'ff.net.0.proj', 'mlp.fc2': 'ff.net.2',
  }),
  *_block(_CONTEXT, _JOINT, {
    'attn.proj': 'attn.to_add_out', 'attn.ln_q': 'attn.norm_added_q',
    'attn.ln_k': 'attn.norm_added_k', 'adaLN_modulation.1': 'norm1_context.linear',
    'mlp.fc1': 'ff_context.net.0.proj', 'mlp.fc2': 'ff_context.net.2',
  }),
  _qkv(f'{_X}.attn.qkv', f'{_JOINT}.attn'), _qkv(f'{_X}.attn2.qkv', f'{_JOINT}.attn2'),
  _qkv(f'{_CONTEXT}.attn.qkv', f'{_JOINT}.attn', _ADDED),
  *_rows({
    'joint_blocks.$.context_block.adaLN_modulation.1': 'transformer_blocks.$.norm1_context.linear',
    'final_layer.adaLN_modulation.1': 'norm_out.linear',
  }, change='swapped'),
]

_DOUBLE, _SINGLE, _STREAM = 'double_blocks.*', 'single_blocks.*', 'single_transformer_blocks.*'
_FLUX = [
  *_rows({
    f'{stored}_in.{layer}_layer': f'time_text_embed.{module}_embedder.linear_{number}'
    for stored, module in (('time', 'timestep'), ('vector', 'text'), ('guidance', 'guidance'))
    for layer, number in (('in', 1), ('out', 2))
  }),
  *_rows({
    'img_in': 'x_embedder', 'txt_in': 'context_embedder', 'final_layer.linear': 'proj_out'
  }),
  *_block(_DOUBLE, _JOINT, {
    'img_mod.lin': 'norm1.linear', 'txt_mod.lin': 'norm1_context.linear',
    'img_attn.proj': 'attn.to_out.0', 'txt_attn.proj': 'attn.to_add_out',
    'img_mlp.0': 'ff.net.0.proj', 'img_mlp.2': 'ff.net.2',
    'txt_mlp.0': 'ff_context.net.0.proj', 'txt_mlp.2': 'ff_context.net.2',
  }),
  *_block(_DOUBLE, _JOINT, {
    'img_attn.norm.query_norm': 'attn.norm_q', 'img_attn.norm.key_norm': 'attn.norm_k',
    'txt_attn.norm.query_norm': 'attn.norm_added_q', 'txt_attn.norm.key_norm': 'attn.norm_added_k',
  }, leaf='scale'),
  _qkv(f'{_DOUBLE}.img_attn.qkv', f'{_JOINT}.attn'),
  _qkv(f'{_DOUBLE}.txt_attn.qkv', f'{_JOINT}.attn', _ADDED),
  *_block(_SINGLE, _STREAM, {'modulation.lin': 'norm.linear', 'linear2': 'proj_out'}),
  *_block(_SINGLE, _STREAM, {
    'norm.query_norm': 'attn.norm_q', 'norm.key_norm': 'attn.norm_k'
  }, leaf='scale'),
  Row(
    f'{_SINGLE}.linear1',
    tuple(f'{_STREAM}.{name}' for name in ('attn.to_q', 'attn.to_k', 'attn.to_v', 'proj_mlp')),
    'stacked', (1, 1, 1, 4),
  ),
  Row('final_layer.adaLN_modulation.1', ('norm_out.linear',), 'swapped'),
]
_XLABS = [
  _qkv(f'{_DOUBLE}.processor.qkv_lora1', f'{_JOINT}.attn'),
  _qkv(f'{_DOUBLE}.processor.qkv_lora2', f'{_JOINT}.attn', _ADDED),
  _qkv(f'{_SINGLE}.processor.qkv', f'{_STREAM}.attn'),
  *_block(f'{_DOUBLE}.processor', _JOINT, {
    'proj_lora1': 'attn.to_out.0', 'proj_lora2': 'attn.to_add_out'
  }),
  *_block(f'{_SINGLE}.processor', _STREAM, {'proj': 'proj_out'}),
]
_BLOCK, _OF_BLOCK = 'blocks.*', {
  'attn.proj': 'attn1.to_out.0', 'mlp.fc1': 'ff.net.0.proj', 'mlp.fc2': 'ff.net.2'
}
_PIXART = [
  *_rows({
    'x_embedder.proj': 'pos_embed.proj', 't_block.1': 'adaln_single.linear',
    'y_embedder.y_proj.fc1': 'caption_projection.linear_1',
    'y_embedder.y_proj.fc2': 'caption_projection.linear_2', 'final_layer.linear': 'proj_out',
    'final_layer': '', _BLOCK: _JOINT,
  }),
  *_rows({
    f'{stored}_embedder.mlp.{2 * number - 2}': f'adaln_single.emb.{module}_embedder.linear_{number}'
    for stored, module in (('t', 'timestep'), ('csize', 'resolution'), ('ar', 'aspect_ratio'))
    for number in (1, 2)
  }),
  *_block(_BLOCK, _JOINT, _OF_BLOCK | {
    'cross_attn.q_linear': 'attn2.to_q', 'cross_attn.proj': 'attn2.to_out.0'
  }),
  _qkv(f'{_BLOCK}.attn.qkv', f'{_JOINT}.attn1'),
  _qkv(f'{_BLOCK}.cross_attn.kv_linear', f'{_JOINT}.attn2', 'to_k to_v'),
]
# One embedding of times and classes, of which diffusers has a copy in each block.
_DIT = [
  *_rows({
    'x_embedder.proj': 'pos_embed.proj', 'final_layer.adaLN_modulation.1': 'proj_out_1',
    'final_layer.linear': 'proj_out_2',
  }),
  *_rows({
    't_embedder.mlp.0': f'{_JOINT}.norm1.emb.timestep_embedder.linear_1',
    't_embedder.mlp.2': f'{_JOINT}.norm1.emb.timestep_embedder.linear_2',
    'y_embedder.embedding_table': f'{_JOINT}.norm1.emb.class_embedder.embedding_table',
  }, change='shared'),
  *_block(_BLOCK, _JOINT, _OF_BLOCK | {'adaLN_modulation.1': 'norm1.linear'}),
  _qkv(f'{_BLOCK}.attn.qkv', f'{_JOINT}.attn1'),
]
TABLES = {'mmdit': _MMDIT, 'flux': _FLUX, 'pixart': _PIXART, 'dit': _DIT}
"""Rows by kind of network."""
_LORA_KINDS = ('mmdit', 'flux')
"""Those whose LoRA people exchange in the original names, too."""
LORA_TABLES = {'flux': _XLABS}
"""Other names of the attentions' layers in LoRA, those of XLabs."""
STARTS = {
  kind: frozenset(row.stored.partition('.')[0] for row in table) for kind, table in TABLES.items()
}
"""The first words of the names in an original file."""


def kind_of_layers(layers: Iterable[str]) -> str | None:
  """Return the kind of the table that has all these layers of one network with LoRA; None for no
  table."""
  layers = set(layers)
  fits = (kind for kind in _LORA_KINDS if layers <= _known(TABLES[kind], layers))
  return next(fits, None) if layers else None


def _known(table: list[Row], layers: Iterable[str]) -> set[str]:
  return {layer for row in rows_of(table, layers) for layer in row.published}


def rows_of(table: list[Row], layers: Iterable[str]) -> list[Row]:
  """Return the rows, with the numbers of blocks, of which a network has a layer."""
  by_layer = {layer: row for row in table for layer in row.published}
  split = {layer: re.match(r'((?:single_)?transformer_blocks)\.(\d+)', layer) for layer in layers}
  last = max((int(found[2]) for found in split.values() if found and found[1][0] == 't'),
             default=-1)
  out: dict[str, Row] = {}
  for layer, found in split.items():
    if found is None:
      row = by_layer.get(layer)
    else:
      of = lambda mark, layer=layer, found=found: found[1] + f'.{mark}' + layer[found.end() :]
      ending = by_layer.get(of('$')) if int(found[2]) == last else None
      row = ending or by_layer.get(of('*'))
    if row is not None:
      number = found[2] if found else ''
      fill = lambda text, number=number: text.replace('*', number).replace('$', number)
      row = row._replace(stored=fill(row.stored), published=tuple(map(fill, row.published)))
      before = out.setdefault(row.stored, row)
      if row.change == 'shared' and row.published[0] not in before.published:
        out[row.stored] = before._replace(published=before.published + row.published)
  return list(out.values())


def transformer_rules(names: Iterable[str], kind: str) -> list[Rule]:
  """Return the rules for the published names of a transformer's tensors, without a prefix."""
  leaves: dict[str, set[str]] = {}
  for name in names:
    layer, _, leaf = name.rpartition('.')
    leaves.setdefault(layer, set()).add(leaf)
  rules = []
  for row in rows_of(TABLES[kind], leaves):
    for leaf in sorted(set().union(*(leaves.get(layer, ()) for layer in row.published))):
      stored = '.'.join(filter(None, (row.stored, leaf if row.leaf is None else row.leaf)))
      published = tuple('.'.join(filter(None, (layer, leaf))) for layer in row.published)
      rules.append(Rule(published, stored, row.change, row.parts))
  return rules


_HEAD, _HEAD_OF_XL = 64, {1152: 72}
"""Width of a head, where nothing tells it; of DiT and PixArt that of the largest is another."""


def _shape(shapes: Shapes, name: str, where: str) -> tuple[int, ...]:
  if name not in shapes:
    raise UserError(f'{where} lacks {name}; fetch it again.')
  return tuple(shapes[name])


def _count(shapes: Shapes, block: str) -> int:
  found = (re.match(rf'{block}\.(\d{{1,4}})\.', name) for name in shapes)
  return max((int(one[1]) + 1 for one in found if one), default=0)


def _heads(width: int, head: int, where: str) -> int:
  require(
    head > 0 and width % head == 0,
    f'{where}: the width {width} of its transformer is not a multiple of that of a head, {head}.',
  )
  return width // head


def mmdit_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """Return config.json of diffusers' SD3Transformer2DModel, by the tensors without a prefix."""
  get = lambda name: _shape(shapes, name, where)
  width, channels, patch, _ = get('x_embedder.proj.weight')
  places, normed = get('pos_embed')[1], 'joint_blocks.0.x_block.attn.ln_q.weight'
  head = get(normed)[0] if normed in shapes else _HEAD
  side, layers = math.isqrt(places), _count(shapes, 'joint_blocks')
  require(side**2 == places, f'{where}: pos_embed has {places} rows, which make no square.')
  dual = [n for n in range(layers) if f'joint_blocks.{n}.x_block.attn2.proj.weight' in shapes]
  return {
    '_class_name': 'SD3Transformer2DModel', 'sample_size': 128, 'in_channels': channels,
    'patch_size': patch,
    'out_channels': get('final_layer.linear.weight')[0] // max(1, patch**2), 'num_layers': layers,
    'attention_head_dim': head, 'num_attention_heads': _heads(width, head, where),
    'joint_attention_dim': get('context_embedder.weight')[1], 'caption_projection_dim': width,
    'pooled_projection_dim': get('y_embedder.mlp.0.weight')[1], 'pos_embed_max_size': side,
    'dual_attention_layers': dual, 'qk_norm': 'rms_norm' if normed in shapes else None,
  }


def flux_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """Return config.json of diffusers' FluxTransformer2DModel, by the tensors without a prefix."""
  get = lambda name: _shape(shapes, name, where)
  width, channels = get('img_in.weight')
  [head] = get('double_blocks.0.img_attn.norm.query_norm.scale')
  out = get('final_layer.linear.weight')[0]
  # As published: an eighth of a head turns with the image, the rest with row and column.
  first, rest = head // 8, head - head // 8
  return {
    '_class_name': 'FluxTransformer2DModel', 'patch_size': 1, 'in_channels': channels,
    'out_channels': None if out == channels else out,
    'num_layers': _count(shapes, 'double_blocks'),
    'num_single_layers': _count(shapes, 'single_blocks'), 'attention_head_dim': head,
    'num_attention_heads': _heads(width, head, where),
    'joint_attention_dim': get('txt_in.weight')[1],
    'pooled_projection_dim': get('vector_in.in_layer.weight')[1],
    'guidance_embeds': 'guidance_in.in_layer.weight' in shapes,
    'axes_dims_rope': [first, rest // 2, rest - rest // 2],
  }


def _patches(shapes: Shapes, where: str) -> dict[str, Any]:
  """What DiT and PixArt have in common; without a table of positions it is as for 256 pixels."""
  get = lambda name: _shape(shapes, name, where)
  width, channels, patch, _ = get('x_embedder.proj.weight')
  head = _HEAD_OF_XL.get(width, _HEAD)
  side = 32
  if 'pos_embed' in shapes:
    one, places, features = get('pos_embed')
    side = math.isqrt(places)
    require(
      (one, features) == (1, width) and side**2 == places > 0,
      f'{where}: pos_embed has the shape {[one, places, features]}, which is no square of '
      f'positions of {width} channels.',
    )
    side *= patch
  return {
    'sample_size': side, 'patch_size': patch, 'in_channels': channels,
    'out_channels': get('final_layer.linear.weight')[0] // max(1, patch**2),
    'num_layers': _count(shapes, 'blocks'), 'attention_head_dim': head,
    'num_attention_heads': _heads(width, head, where), 'activation_fn': 'gelu-approximate',
    'attention_bias': 'blocks.0.attn.qkv.bias' in shapes, 'norm_elementwise_affine': False,
  }


def pixart_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """Return config.json of diffusers' PixArtTransformer2DModel, by the tensors without a prefix."""
  sized = 'csize_embedder.mlp.0.weight' in shapes
  values = _patches(shapes, where)
  if 'pos_embed' not in shapes:
    values['sample_size'] = 128
  return values | {
    '_class_name': 'PixArtTransformer2DModel', 'norm_type': 'ada_norm_single', 'norm_eps': 1e-6,
    'num_embeds_ada_norm': 1000, 'use_additional_conditions': sized,
    'cross_attention_dim': _shape(shapes, 'blocks.0.cross_attn.q_linear.weight', where)[1],
    'caption_channels': _shape(shapes, 'y_embedder.y_proj.fc1.weight', where)[1],
  }


def dit_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """Return config.json of diffusers' DiTTransformer2DModel, by the tensors without a prefix."""
  classes = _shape(shapes, 'y_embedder.embedding_table.weight', where)[0] - 1
  return _patches(shapes, where) | {
    '_class_name': 'DiTTransformer2DModel', 'norm_type': 'ada_norm_zero',
    'num_embeds_ada_norm': classes, 'norm_eps': 1e-5,
  }


TRANSFORMER_CONFIGS = {
  'mmdit': mmdit_config, 'flux': flux_config, 'pixart': pixart_config, 'dit': dit_config
}
"""config.json by shapes in an original file, for the kinds of TABLES."""


def t5_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """Return config.json of transformers' T5EncoderModel, by its tensors."""
  get = lambda name: _shape(shapes, name, where)
  attention = 'encoder.block.0.layer.0.SelfAttention'
  buckets, heads = get(f'{attention}.relative_attention_bias.weight')
  tokens, width = get('shared.weight')
  gated = 'encoder.block.0.layer.1.DenseReluDense.wi_0.weight' in shapes
  inner = 'wi_0' if gated else 'wi'
  return {
    'architectures': ['T5EncoderModel'], 'model_type': 't5', 'is_encoder_decoder': False,
    'vocab_size': tokens, 'd_model': width, 'num_heads': heads,
    'd_kv': get(f'{attention}.q.weight')[0] // max(1, heads),
    'd_ff': get(f'encoder.block.0.layer.1.DenseReluDense.{inner}.weight')[0],
    'num_layers': _count(shapes, r'encoder\.block'), 'relative_attention_num_buckets': buckets,
    'relative_attention_max_distance': 128, 'layer_norm_epsilon': 1e-6,
    'feed_forward_proj': 'gated-gelu' if gated else 'relu', 'is_gated_act': gated,
    'dense_act_fn': 'gelu_new' if gated else 'relu', 'pad_token_id': 0, 'eos_token_id': 1,
  }
