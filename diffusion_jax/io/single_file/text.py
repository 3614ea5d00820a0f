"""Text encoders: transformers' CLIP names, which CompVis keeps, <-> those of OpenCLIP."""

import re
from collections.abc import Mapping
from typing import Any

from diffusion_jax.io.single_file.rules import Rule, same
from diffusion_jax.models.checks import require

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = {
  'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj',
  'self_attn.out_proj': 'attn.out_proj',
}
_LEAVES = ('weight', 'bias')


def clip_rules(layers: int, projection: bool = False) -> list[Rule]:
  """transformers' names, as they are."""
  tower = 'text_model'
  modules = [f'{tower}.final_layer_norm']
  for i in range(layers):
    modules += [
      f'{tower}.encoder.layers.{i}.{name}'
      for name in (*_LAYER, *(f'self_attn.{part}_proj' for part in 'qkv'))
    ]
  found = [rule for module in modules for rule in same(module, module)]
  tables = [f'{tower}.embeddings.{name}_embedding' for name in ('token', 'position')]
  for name in tables + ['text_projection'] * projection:
    found += same(name, name, ['weight'])
  return found


def open_clip_rules(layers: int, projection: bool = False) -> list[Rule]:
  """OpenCLIP's: queries, keys and values in one matrix, the projection as [in out]."""
  tower = 'text_model'
  found = [
    *same(f'{tower}.final_layer_norm', 'ln_final'),
    *same(f'{tower}.embeddings.token_embedding', 'token_embedding', ['weight']),
    Rule((f'{tower}.embeddings.position_embedding.weight',), 'positional_embedding'),
  ]
  if projection:
    found.append(Rule(('text_projection.weight',), 'text_projection', 'transposed'))
  for i in range(layers):
    ours, theirs = f'{tower}.encoder.layers.{i}', f'transformer.resblocks.{i}'
    for name, stored in _LAYER.items():
      found += same(f'{ours}.{name}', f'{theirs}.{stored}')
    for leaf in _LEAVES:
      parts = tuple(f'{ours}.self_attn.{part}_proj.{leaf}' for part in 'qkv')
      found.append(Rule(parts, f'{theirs}.attn.in_proj_{leaf}', 'stacked'))
  return found


def clip_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """config.json by tensors in transformers' names, of CLIP ViT-L's kind."""
  tower = 'text_model'
  return _config(
    where, shapes.get(f'{tower}.embeddings.token_embedding.weight'),
    shapes.get(f'{tower}.embeddings.position_embedding.weight'),
    shapes.get(f'{tower}.encoder.layers.0.mlp.fc1.weight'),
    _count(r'text_model\.encoder\.layers\.(\d{1,4})\.', shapes), 'quick_gelu', None,
  )


def open_clip_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """config.json by tensors in OpenCLIP's names, with a projection where they have one."""
  return _config(
    where, shapes.get('token_embedding.weight'), shapes.get('positional_embedding'),
    shapes.get('transformer.resblocks.0.mlp.c_fc.weight'),
    _count(r'transformer\.resblocks\.(\d{1,4})\.', shapes), 'gelu', shapes.get('text_projection'),
  )


def _config(where, tokens, positions, wide, layers, act, projection) -> dict[str, Any]:
  require(
    tokens is not None and positions is not None and wide is not None,
    f'{where} holds no whole text encoder; give a whole model.',
  )
  width = tokens[1]
  architecture = 'CLIPTextModelWithProjection' if projection else 'CLIPTextModel'
  return {
    'architectures': [architecture], 'model_type': 'clip_text_model', 'hidden_act': act,
    'vocab_size': tokens[0], 'hidden_size': width, 'intermediate_size': wide[0],
    'num_hidden_layers': layers, 'num_attention_heads': max(1, width // 64),
    'max_position_embeddings': positions[0], 'layer_norm_eps': 1e-5,
    'projection_dim': projection[1] if projection else width,
    # As published: 2 means pooling at the largest id, which is the end of the text.
    'bos_token_id': 0, 'eos_token_id': 2, 'pad_token_id': 1,
  }


def _count(pattern: str, shapes: Shapes) -> int:
  found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
  return max(found, default=-1) + 1
