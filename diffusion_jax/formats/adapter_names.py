"""Keys in files of adapters: the layer of a network that a tensor belongs to, and its part.

A layer is the dotted name of a dense layer or a convolution, here and in diffusers. kohya's files
join names by underscores, so undoing that needs the network's names; for Stable Diffusion XL they
number the U-Net's blocks as single files do.

Read are PEFT (with or without an adapter's name), diffusers now, its training scripts and its
former attention processors, kohya's scripts with both numberings, LyCORIS' convolutions, ComfyUI,
SimpleTuner and XLabs; of Stable Diffusion 3 and Flux.1 also the original names, in which several
layers may be one (`formats.adapter_layers`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.errors import require
from diffusion_jax.formats.adapter_layers import original_rows
from diffusion_jax.formats.single_file_names import unet_names
from diffusion_jax.models.adapters import KINDS

TOWER = 'text_model.'
"""Before the layers of a text encoder; some writers leave it out."""
_FORMERLY = {'q_proj': 'to_q', 'k_proj': 'to_k', 'v_proj': 'to_v', 'out_proj': 'to_out'}
"""Names in diffusers of the projections of text encoders while it replaced their processors."""


def layers(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Return the layers of a network, from its parameters, with the shapes of their kernels."""
  return {
    name.removesuffix('.kernel'): tuple(value.shape)
    for name, value in params.items() if name.endswith('.kernel')
  }


def spellings(names: Iterable[str]) -> dict[str, str]:
  """Spellings in files -> layer names, without the network's name.

  Its own, its former attention processor's, without a text encoder's tower, and a single file's.
  Layers that are not one of the network's alone are those of `adapter_layers.joined_layers`.
  """
  names = list(names)
  found: dict[str, str] = {}
  original = [
    (row.published[0] if row.change == 'same' else row.stored, row.stored)
    for row in original_rows(names)
  ]
  for name, spelt in [*zip(names, names, strict=True), *unet_names(names).items(), *original]:
    for one in (spelt, *_former(spelt)):
      for key in (one, one.removeprefix(TOWER)):
        found.setdefault(key, name)
  return found


def _former(name: str) -> Iterator[str]:
  """Former names of attention processors: attn1.processor.to_q, and to_out for to_out.0."""
  if found := re.fullmatch(r'(.+\.attn\d)\.(to_[qkv]|to_out)(\.0)?', name):
    yield f'{found[1]}.processor.{found[2]}'
    if found[3]:
      yield f'{found[1]}.processor.{found[2]}.0'
      yield f'{found[1]}.{found[2]}'
  module, _, leaf = name.rpartition('.')
  if module.endswith('.self_attn') and leaf in _FORMERLY:
    yield f'{module}.{_FORMERLY[leaf]}'


def kohya_names(names: Iterable[str]) -> dict[str, str]:
  """Return the names of layers in kohya's files, without the role: joined by underscores."""
  found: dict[str, str] = {}
  for stored, name in spellings(names).items():
    key = stored.replace('.', '_')
    if found.setdefault(key, name) != name:
      raise ValueError(f'{name} and {found[key]} are both called {key}.')
  return found


_TEXTS = ('clip_l', 'clip_h')
KOHYA = {
  'unet': ('lora_unet_',), 'text_encoder': ('lora_te_', 'lora_te1_'),
  'text_encoder_2': ('lora_te2_', 'lora_te3_'), 'text_encoder_3': ('lora_te3_',),
  'text_encoder_4': ('lora_te4_',), 'transformer': ('lora_transformer_',),
}
"""How the names of each role begin in kohya's files, see `kohya_start`. Those of a transformer
without original names are OneTrainer's, which ComfyUI reads, too."""
ORIGINAL = 'lora_unet_'
"""Before the original names of a transformer, as kohya's scripts write them."""
LYCORIS_START = 'lycoris_'
"""Before the layers of a network of its own that LyCORIS wraps, as SimpleTuner writes them."""
_JOINED = KOHYA | {
  'unet': (*KOHYA['unet'], LYCORIS_START),
  'transformer': (*KOHYA['transformer'], LYCORIS_START, ORIGINAL),
}
_OF_KOHYA = tuple({start.rstrip('_') for starts in _JOINED.values() for start in starts})
_COMFYUI = ('diffusion_model.', 'model.diffusion_model.')
_OF_T5 = ('text_encoders.t5xxl.transformer.', 't5xxl.transformer.')
_DOTTED = {
  'unet': _COMFYUI, 'transformer': _COMFYUI, 'text_encoder_3': _OF_T5,
  'text_encoder': tuple(
    f'{start}{name}.transformer.' for name in _TEXTS for start in ('text_encoders.', '')
  ),
  'text_encoder_2': (
    'text_encoders.clip_g.transformer.', 'clip_g.transformer.', *_OF_T5
  ),
}
_BARE = 'base_model.model.'

_PARTS = {
  '.lora_A.weight': 'lora.a', '.lora_B.weight': 'lora.b', '.lora_A': 'lora.a', '.lora_B': 'lora.b',
  '.lora_down.weight': 'lora.a', '.lora_up.weight': 'lora.b', '.lora_mid.weight': 'lora.mid',
  '.down.weight': 'lora.a', '.up.weight': 'lora.b', '.lora.down.weight': 'lora.a',
  '.lora.up.weight': 'lora.b', '_lora.down.weight': 'lora.a', '_lora.up.weight': 'lora.b',
  '.lora_linear_layer.down.weight': 'lora.a', '.lora_linear_layer.up.weight': 'lora.b',
  '.alpha': 'alpha', '.lora.alpha': 'alpha', '_lora.alpha': 'alpha',
  '.lora_linear_layer.alpha': 'alpha',
  '.dora_scale': 'magnitude', '.lora_magnitude_vector': 'vector',
  '.lora_magnitude_vector.weight': 'vector', '.lora_B.bias': 'bias', '.diff_b': 'diff_b',
  '.oft_R.weight': 'oft.skew',
}
"""Ends of names -> what they are of an adapter: KIND.PART, or a part that several kinds have."""
LYCORIS = {
  'lora': {'a': 'lora_down.weight', 'b': 'lora_up.weight'},
  'loha': {part: f'hada_{part}' for part in KINDS['loha'].parts},
  'lokr': {part: f'lokr_{part}' for part in KINDS['lokr'].parts},
  'diag_oft': {'blocks': 'oft_blocks', 'rescale': 'rescale'}, 'full': {'diff': 'diff'},
}
"""Names of parts, by kind, in the files of LyCORIS and of kohya's scripts."""
PEFT = {
  'lora': {'a': 'lora_A.weight', 'b': 'lora_B.weight'}, 'loha': LYCORIS['loha'],
  'lokr': LYCORIS['lokr'], 'oft': {'skew': 'oft_R.weight'},
}
"""The same in those of PEFT."""
_PARTS |= {
  f'.{end}': f'{kind}.{part}' for kind, ends in LYCORIS.items() for part, end in ends.items()
}
_SHORTEST_FIRST = sorted(_PARTS, key=len)
_ADAPTER = re.compile(r'\.(lora_[AB]|oft_R|lora_magnitude_vector)\.[^.]+\.(weight|bias)$')
_OF_LYCORIS = re.compile(r'\.((?:hada|lokr)_\w+)\.[^.]+$')


def kohya_start(role: str, layers: Iterable[str], roles: Iterable[str]) -> str:
  """Return how kohya's names of a network with these layers begin, in a model with these roles.

  The first text encoder is te where it is alone and a CLIP, else te1. A T5 that is the second, as
  in Flux.1, is te3, as kohya's scripts have it and ComfyUI reads it.
  """
  starts, is_t5 = KOHYA[role], any('.SelfAttention.' in f'{layer}.' for layer in layers)
  alone = not any(other.startswith(f'{role}_') for other in roles)
  if role == 'text_encoder':
    return starts[0 if alone and not is_t5 else 1]
  return starts[-1 if is_t5 else 0]


BUNDLE = 'bundle_emb.'
INVERSION = {
  'emb_params': 'text_encoder', 'string_to_param.*': 'text_encoder', 'clip_l': 'text_encoder',
  'clip_g': 'text_encoder_2', 'text_encoders_0': 'text_encoder',
  'text_encoders_1': 'text_encoder_2',
}
"""Tensors of AUTOMATIC1111's textual inversions -> the roles that they are for."""
_OTHERS = {
  'BOFT': re.compile(r'\.boft_'), 'GLoRA': re.compile(r'\.[ab][12]\.weight$'),
  'IA3': re.compile(r'\.ia3_|\.on_input$'), 'a Control-LoRA': re.compile(r'^lora_controlnet$'),
  'Custom Diffusion': re.compile(r'_custom_diffusion\.'),
  'adapters of embeddings': re.compile(r'\.lora_embedding_'),
  'differences of norms': re.compile(r'\.(w_norm|b_norm)$'),
}

Place = tuple[str, str]
"""Role and layer."""


def is_inversion(name: str) -> bool:
  """Return whether a tensor is of a textual inversion rather than of a LoRA."""
  return name in INVERSION or name.startswith((BUNDLE, 'string_to_param')) or (
    re.fullmatch('<[^>]*>', name) is not None
  )


def is_lora(name: str) -> bool:
  """Return whether a tensor is one of an adapter's matrices."""
  return (split := _split(name)) is not None and '.' in split[1]


def of_other_kinds(names: Iterable[str]) -> dict[str, list[str]]:
  """Return the names that belong to adapters of kinds that are not implemented, by the kind."""
  found: dict[str, list[str]] = {}
  for name in names:
    kind = next((kind for kind, pattern in _OTHERS.items() if pattern.search(name)), None)
    if kind is not None:
      found.setdefault(kind, []).append(name)
  return found


def places(
  names: Iterable[str], known: Mapping[str, Iterable[str]], path: Path
) -> tuple[dict[Place, dict[str, str]], list[str]]:
  """({(role, layer): {part of `_PARTS`: name}}, names of no part of these networks).

  known: the layers of each network, by role. UserError: names without a network that fit several,
  or two for one part of one layer.
  """
  prefixed, bare = _tables(known)
  split = {name: _underscored(_split(name), prefixed) for name in names}
  alone = [
    stem for stem, _ in filter(None, split.values())
    if stem not in prefixed and not _says_a_role(stem, known)
  ]
  hits = {role: sum(stem in table for stem in alone) for role, table in bare.items()}
  fits = [role for role, count in hits.items() if count == len(alone)]
  require(
    not alone or len(fits) <= 1,
    f'{path} does not say whether it is for {" or ".join(fits)}; give one network alone.',
  )
  table = bare[max(hits, key=hits.__getitem__)] | prefixed
  found: dict[Place, dict[str, str]] = {}
  unknown = []
  for name, one in split.items():
    if one is None or one[0] not in table:
      unknown.append(name)
      continue
    parts = found.setdefault(table[one[0]], {})
    require(
      one[1] not in parts,
      f'{path} holds {parts.get(one[1])} and {name}, which are one part of one layer.',
    )
    parts[one[1]] = name
  return found, unknown


def _split(name: str) -> tuple[str, str] | None:
  """(how it spells its layer, its part); None for what is no part of a LoRA."""
  name = _OF_LYCORIS.sub(r'.\1', _ADAPTER.sub(r'.\1.\2', name))
  ends = [end for end in _SHORTEST_FIRST if name.endswith(end)]
  if not ends:
    return None
  return name.removesuffix(ends[-1]).replace(_BARE, '', 1), _PARTS[ends[-1]]


def _underscored(
  split: tuple[str, str] | None, prefixed: Mapping[str, Place]
) -> tuple[str, str] | None:
  """The same with a kohya's name that has dots, wholly or in part, as `prefixed` has it."""
  if split is None or split[0] in prefixed or not split[0].startswith(_OF_KOHYA):
    return split
  return split[0].replace('.', '_'), split[1]


def _says_a_role(stem: str, known: Iterable[str]) -> bool:
  starts = {f'{role}.' for role in (*KOHYA, *known)}
  starts.update(*_JOINED.values(), *_DOTTED.values())
  return stem.startswith(tuple(starts))


def _tables(
  known: Mapping[str, Iterable[str]]
) -> tuple[dict[str, Place], dict[str, dict[str, Place]]]:
  """All spellings -> places: with the network's name before it, and, by role, without."""
  prefixed: dict[str, Place] = {}
  bare: dict[str, dict[str, Place]] = {}
  for role, layers in known.items():
    spelt = spellings(layers)
    bare[role] = {stem: (role, layer) for stem, layer in spelt.items()}
    for start in (f'{role}.', *_DOTTED.get(role, ())):
      prefixed |= {start + stem: (role, layer) for stem, layer in spelt.items()}
    for start in _JOINED.get(role, ()):
      prefixed |= {start + stem: (role, layer) for stem, layer in kohya_names(layers).items()}
  return prefixed, bare
