"""Keys in files of LoRA: the layer of a network that a tensor belongs to, and its part.

A layer is the dotted name of a dense layer or a convolution, here and in diffusers. kohya's files
join names by underscores, so undoing that needs the network's names; for Stable Diffusion XL they
number the U-Net's blocks as single files do.

Read are PEFT (with or without an adapter's name), diffusers now, its training scripts and its
former attention processors, kohya's scripts with both numberings, LyCORIS' convolutions, ComfyUI,
SimpleTuner and XLabs; of Stable Diffusion 3 and Flux.1 also the original names, in which several
layers may be one (`formats.adapter_layers`).
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError, require
from diffusion_jax.formats.adapter_layers import original_rows
from diffusion_jax.formats.single_file_names import unet_names

LONGEST = 2000
"""Characters of all patterns of one file that are more than names."""
DEEPEST = 5
"""Choices within one another."""

_NAME = re.compile(r'(\^?)((?:[\w-]|\\?\.)+)\$?')
_ONE = re.compile(r'(\\[dDwWsS]|\\[^\w\s]|\[\^?[\w.\\-]+\]|[^\\\[\](){}|*+?^$])([*+?]?)\??')


class NamePatterns:
  r"""Values by patterns of layer names, as in PEFT's configs, matched in bounded time.

  The first pattern that matches a name's end, from a dot on, gives its value, as PEFT's
  re.match(rf'(.*\.)?({pattern})$', name). A backtracking matcher may never end; here all places in
  the pattern advance together along a name. Known are characters, classes such as [a-z], . \d \w, *
  + ? on one of these, ^ and $, and choices as in (to_q|to_k)(_proj)?.
  """

  def __init__(self, patterns: Mapping[str, Any], where: str):
    """`where` names the source in the UserError for a pattern that is not known here."""
    self._names: dict[str, tuple[int, bool, Any]] = {}
    self._patterns: list[tuple[int, list, Any]] = []
    length = 0
    for number, (text, value) in enumerate(patterns.items()):
      if name := _NAME.fullmatch(text):  # A dot is taken for a dot, as whoever wrote it meant it.
        key = name[2].replace('\\.', '.')
        self._names.setdefault(key, (number, bool(name[1]), value))
        continue
      length += len(text)
      require(
        length <= LONGEST, f'{where}: the patterns have over {LONGEST} characters; write names.'
      )
      self._patterns.append((number, _parse(text, where), value))

  def find(self, names: Iterable[str], default: Any) -> Any:
    """Return the value of the first pattern that matches one of the names."""
    found = [hit for name in names for hit in self._hits(name)]
    return min(found, key=lambda hit: hit[0])[1] if found else default

  def _hits(self, name: str) -> Iterable[tuple[int, Any]]:
    parts = name.split('.')
    for start in range(len(parts)):
      number, anchored, value = self._names.get('.'.join(parts[start:]), (0, True, None))
      if value is not None and not (anchored and start):
        yield number, value
    for number, choices, value in self._patterns:
      if _matches(choices, name):
        yield number, value


def _parse(text: str, where: str) -> list:
  """Choices, which are lists of steps: (^, $, a character's test or choices, how many times)."""
  shown = text if len(text) <= 60 else f'{text[:60]}...'
  unknown = UserError(
    f'{where}: the pattern {shown!r} is more than names, classes, *, +, ? and choices; write the '
    'names of the layers.'
  )

  def choices(place: int, depth: int) -> tuple[list, int]:
    if depth > DEEPEST:
      raise unknown
    found: list[list] = [[]]
    while place < len(text) and text[place] != ')':
      if text[place] == '|':
        found.append([])
        place += 1
      elif text[place] in '^$':
        found[-1].append((text[place], ''))
        place += 1
      elif text[place] == '(':
        inner, place = choices(place + 1, depth + 1)
        if text[place : place + 1] != ')':
          raise unknown
        optional = text[place + 1 : place + 2] == '?'
        found[-1].append((inner, '?' if optional else ''))
        place += 1 + optional
      elif one := _ONE.match(text, place):
        found[-1].append((_test(one[1]), one[2]))
        place = one.end()
      else:
        raise unknown
    return found, place

  try:
    found, end = choices(0, 0)
  except re.error:  # A class such as [z-a].
    raise unknown from None
  if end < len(text):
    raise unknown
  return found


@functools.lru_cache(maxsize=256)
def _test(text: str) -> re.Pattern:
  return re.compile(text)


def _matches(choices: list, name: str) -> bool:
  """Sets of places in the name are bits of whole numbers; bit n is after n characters."""
  starts = 1 | sum(2 << i for i, character in enumerate(name) if character == '.')
  bits: dict[re.Pattern, int] = {}

  def here(test: re.Pattern) -> int:
    if test not in bits:
      bits[test] = sum(1 << i for i, character in enumerate(name) if test.match(character))
    return bits[test]

  def run(choices: list, places: int) -> int:
    ends = 0
    for steps in choices:
      at = places
      for step, times in steps:
        at = after(step, times, at)
      ends |= at
    return ends

  def after(step: Any, times: str, places: int) -> int:
    if step == '^':
      return places & 1
    if step == '$':
      return places & 1 << len(name)
    if isinstance(step, list):
      return run(step, places) | (places if times else 0)
    fits = here(step)
    once = (places & fits) << 1
    if times in ('', '?'):
      return once | places if times else once
    places = once if times == '+' else places
    # A carry runs through each run of characters that fit, from every place on.
    return ((places & fits) + fits ^ fits) | places

  return bool(run(choices, starts) >> len(name) & 1)


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
_JOINED = KOHYA | {
  'unet': (*KOHYA['unet'], 'lycoris_'),
  'transformer': (*KOHYA['transformer'], 'lycoris_', ORIGINAL),
}
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
  '.lora_A.weight': 'a', '.lora_B.weight': 'b', '.lora_A': 'a', '.lora_B': 'b',
  '.lora_down.weight': 'a', '.lora_up.weight': 'b', '.lora_mid.weight': 'mid',
  '.down.weight': 'a', '.up.weight': 'b', '.lora.down.weight': 'a', '.lora.up.weight': 'b',
  '_lora.down.weight': 'a', '_lora.up.weight': 'b',
  '.lora_linear_layer.down.weight': 'a', '.lora_linear_layer.up.weight': 'b',
  '.alpha': 'alpha', '.lora.alpha': 'alpha', '_lora.alpha': 'alpha',
  '.lora_linear_layer.alpha': 'alpha',
}
_SHORTEST_FIRST = sorted(_PARTS, key=len)
_ADAPTER = re.compile(r'\.(lora_[AB])\.[^.]+\.weight$')


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


def is_inversion(name: str) -> bool:
  """Return whether a tensor is of a textual inversion rather than of a LoRA."""
  return name in INVERSION or name.startswith((BUNDLE, 'string_to_param')) or (
    re.fullmatch('<[^>]*>', name) is not None
  )


def is_lora(name: str) -> bool:
  """Return whether a tensor is one of a LoRA's matrices."""
  return (split := _split(name)) is not None and split[1] in 'ab'


def of_other_kinds(names: Iterable[str]) -> dict[str, list[str]]:
  """Return the names that belong to adapters of other kinds than LoRA, by the kind."""
  found: dict[str, list[str]] = {}
  for name in names:
    kind = next((kind for kind, pattern in _OTHERS.items() if pattern.search(name)), None)
    if kind is not None:
      found.setdefault(kind, []).append(name)
  return found


def places(
  names: Iterable[str], known: Mapping[str, Iterable[str]], path: Path
) -> tuple[dict[Place, dict[str, str]], list[str]]:
  """({(role, layer): {'a', 'b', 'mid' or 'alpha': name}}, names of no part of these networks).

  known: the layers of each network, by role. UserError: names without a network that fit several,
  or two for one part of one layer.
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
  return name.removesuffix(ends[-1]).replace(_BARE, '', 1), _PARTS[ends[-1]]


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
