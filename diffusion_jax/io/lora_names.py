"""What files of LoRA call the layers of a network.

A layer is the dotted name of a dense layer or a convolution, here and in diffusers. kohya's files
join the parts of a name by underscores, so it can only be undone by knowing the network. For
Stable Diffusion XL they number the blocks of the U-Net as single files do.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffusion_jax.io.single_file.unet import ENDS, MLP, RESNET, SHORTCUT

TOWER = 'text_model.'
"""Before the layers of a text encoder; some writers leave it out."""
_FORMERLY = {'q_proj': 'to_q', 'k_proj': 'to_k', 'v_proj': 'to_v', 'out_proj': 'to_out'}
"""What diffusers called the projections of text encoders while it replaced their processors."""
_RESNET = RESNET | SHORTCUT
_ENDS = ENDS | {f'add_embedding.{name}': stored for name, stored in MLP.items()}


def layers(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The layers of a network by its parameters, or their shapes -> the shapes of their kernels."""
  return {
    name.removesuffix('.kernel'): tuple(value.shape)
    for name, value in params.items() if name.endswith('.kernel')
  }


def spellings(names: Iterable[str]) -> dict[str, str]:
  """Dotted names in files, without the network's name -> layers.

  A layer's own name, that of its former attention processor, without the tower of a text encoder,
  and by the block numbers of a single file.
  """
  names = list(names)
  stored = [*zip(names, names, strict=True), *single_file_names(names).items()]
  found: dict[str, str] = {}
  for spelt, name in stored:
    for one in (spelt, *_former(spelt)):
      for key in (one, one.removeprefix(TOWER)):
        found.setdefault(key, name)
  return found


def _former(name: str) -> Iterator[str]:
  """As attention processors were called: attn1.processor.to_q, and to_out for to_out.0."""
  if found := re.fullmatch(r'(.+\.attn\d)\.(to_[qkv]|to_out)(\.0)?', name):
    yield f'{found[1]}.processor.{found[2]}'
    if found[3]:
      yield f'{found[1]}.processor.{found[2]}.0'
      yield f'{found[1]}.{found[2]}'
  module, _, leaf = name.rpartition('.')
  if module.endswith('.self_attn') and leaf in _FORMERLY:
    yield f'{module}.{_FORMERLY[leaf]}'


def kohya_names(names: Iterable[str]) -> dict[str, str]:
  """Names in kohya's files, without the role -> layers; all `spellings`, joined by underscores."""
  found: dict[str, str] = {}
  for stored, name in spellings(names).items():
    key = stored.replace('.', '_')
    if found.setdefault(key, name) != name:
      raise ValueError(f'{name} and {found[key]} are both called {key}.')
  return found


def single_file_names(names: Iterable[str]) -> dict[str, str]:
  """Names by the block numbers of a single file -> layers; empty for what is no U-Net."""
  names = set(names)
  blocks = dict(_blocks(names))
  found = {stored: name for name, stored in _ENDS.items() if name in names and blocks}
  for name in names:
    parts = name.split('.')
    for length in (4, 5):  # down_blocks.0.resnets.1 and down_blocks.0.downsamplers.0.conv
      if stored := blocks.get('.'.join(parts[:length])):
        rest = '.'.join(parts[length:])
        rest = _RESNET.get(rest, rest)
        found[f'{stored}.{rest}' if rest else stored] = name
  middle = {'resnets.0': '0', 'attentions.0': '1', 'resnets.1': '2'}
  for name in names:
    for block, number in middle.items():
      if name.startswith(f'mid_block.{block}.'):
        rest = name.removeprefix(f'mid_block.{block}.')
        found[f'middle_block.{number}.{_RESNET.get(rest, rest)}'] = name
  return found


def _blocks(names: set[str]) -> Iterator[tuple[str, str]]:
  """Each resnet, attention and resampling on the ways down and up with its number in the file."""
  has = lambda start: any(name.startswith(f'{start}.') for name in names)
  number, level = 1, 0
  while has(block := f'down_blocks.{level}'):
    layer = 0
    while has(f'{block}.resnets.{layer}'):
      yield f'{block}.resnets.{layer}', f'input_blocks.{number}.0'
      yield f'{block}.attentions.{layer}', f'input_blocks.{number}.1'
      number, layer = number + 1, layer + 1
    if has(f'{block}.downsamplers'):
      yield f'{block}.downsamplers.0.conv', f'input_blocks.{number}.0.op'
      number += 1
    level += 1
  number, level = 0, 0
  while has(block := f'up_blocks.{level}'):
    layer = 0
    while has(f'{block}.resnets.{layer}'):
      yield f'{block}.resnets.{layer}', f'output_blocks.{number}.0'
      yield f'{block}.attentions.{layer}', f'output_blocks.{number}.1'
      number, layer = number + 1, layer + 1
    place = 2 if has(f'{block}.attentions') else 1
    yield f'{block}.upsamplers.0.conv', f'output_blocks.{number - 1}.{place}.conv'
    level += 1
