"""Keys of files of LoRA: which layer of which network a tensor belongs to, and what it is there.

Writers differ in how they spell a layer and in how they end a key. Read are PEFT (with the name of
an adapter or without), diffusers now, its training scripts and its former attention processors,
kohya's scripts with both numberings of the blocks, LyCORIS' convolutions, ComfyUI and SimpleTuner.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffusion_jax.io.lora_names import kohya_names, spellings
from diffusion_jax.models.checks import require

_TEXTS = ('clip_l', 'clip_h')
KOHYA = {
  'unet': ('lora_unet_',), 'text_encoder': ('lora_te_', 'lora_te1_'),
  'text_encoder_2': ('lora_te2_',),
}
"""How the names of each role begin in kohya's files; lora_te1_ where there are two encoders."""
_JOINED = KOHYA | {'unet': (*KOHYA['unet'], 'lycoris_')}
_DOTTED = {
  'unet': ('diffusion_model.', 'model.diffusion_model.'),
  'text_encoder': tuple(
    f'{start}{name}.transformer.' for name in _TEXTS for start in ('text_encoders.', '')
  ),
  'text_encoder_2': ('text_encoders.clip_g.transformer.', 'clip_g.transformer.'),
}
_BARE = 'base_model.model.'

_ENDS = {
  '.lora_A.weight': 'a', '.lora_B.weight': 'b', '.lora_A': 'a', '.lora_B': 'b',
  '.lora_down.weight': 'a', '.lora_up.weight': 'b', '.lora_mid.weight': 'mid',
  '.lora.down.weight': 'a', '.lora.up.weight': 'b',
  '_lora.down.weight': 'a', '_lora.up.weight': 'b',
  '.lora_linear_layer.down.weight': 'a', '.lora_linear_layer.up.weight': 'b',
  '.alpha': 'alpha', '.lora.alpha': 'alpha', '_lora.alpha': 'alpha',
  '.lora_linear_layer.alpha': 'alpha',
}
_SHORTEST_FIRST = sorted(_ENDS, key=len)
_ADAPTER = re.compile(r'\.(lora_[AB])\.[^.]+\.weight$')

_WORDS = re.compile(
  r'bundle_emb\.|(emb_params|clip_[lg]|text_encoders_[01]|string_to_param.*)$|<[^>]*>$'
)
_OTHERS = {
  'DoRA': re.compile(r'dora_scale|lora_magnitude_vector|\.magnitude'),
  'LoHa': re.compile(r'\.hada_'), 'LoKr': re.compile(r'\.lokr_'),
  'OFT': re.compile(r'\.b?oft_'), 'GLoRA': re.compile(r'\.[ab][12]\.weight$'),
  'IA3': re.compile(r'\.ia3_|\.on_input$'), 'a Control-LoRA': re.compile(r'^lora_controlnet$'),
  'Custom Diffusion': re.compile(r'_custom_diffusion\.'),
  'adapters of embeddings': re.compile(r'\.lora_embedding_'),
  'adapters with biases': re.compile(r'\.lora_[AB](\.[^.]+)?\.bias$'),
  'whole differences of weights': re.compile(r'\.(diff|diff_b|w_norm|b_norm)$'),
}

Place = tuple[str, str]
"""Role and layer."""


def is_word(name: str) -> bool:
  """Whether a tensor is a learned word rather than a part of a LoRA."""
  return _WORDS.match(name) is not None


def is_lora(name: str) -> bool:
  """Whether a tensor is one of a LoRA's matrices."""
  return (split := _split(name)) is not None and split[1] in 'ab'


def some(names: Iterable[str]) -> str:
  """The first three names, and how many more there are."""
  names = sorted(names)
  return ', '.join(name[:200] for name in names[:3]) + (
    f' and {len(names) - 3} more' * (len(names) > 3)
  )


def of_other_kinds(names: Iterable[str]) -> dict[str, list[str]]:
  """Which names belong to an adapter of another kind than LoRA, by the kind."""
  found: dict[str, list[str]] = {}
  for name in names:
    kind = next((kind for kind, pattern in _OTHERS.items() if pattern.search(name)), None)
    if kind is not None:
      found.setdefault(kind, []).append(name)
  return found


def places(
  names: Iterable[str], known: Mapping[str, Iterable[str]], path: Path
) -> tuple[dict[Place, dict[str, str]], list[str]]:
  """Sorts the names of a file's tensors.

  Args:
    known: the layers of each network, by role.

  Returns:
    ({(role, layer): {'a', 'b', 'mid' or 'alpha': name}}, names that are no part of these networks).

  Raises:
    UserError: names without a network that fit several, or two for one part of one layer.
  """
  prefixed, bare = _tables(known)
  split = {name: _split(name) for name in names}
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
  name = _ADAPTER.sub(r'.\1.weight', name)
  ends = [end for end in _SHORTEST_FIRST if name.endswith(end)]
  if not ends:
    return None
  return name.removesuffix(ends[-1]).replace(_BARE, '', 1), _ENDS[ends[-1]]


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
