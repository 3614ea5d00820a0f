"""Files of textual inversion (Gal et al. 2022): learned rows for the table of token embeddings.

diffusers: one tensor named by its token, a file for each text encoder. AUTOMATIC1111: `emb_params`,
or `clip_l` and `clip_g` for Stable Diffusion XL, the token being the file's name. Files of LoRA may
hold either, under `bundle_emb.TOKEN.` or as they are.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import require
from diffusion_jax.files import inside
from diffusion_jax.formats.adapter_names import BUNDLE, INVERSION, is_inversion, is_lora
from diffusion_jax.formats.published import some
from diffusion_jax.formats.tensors import PICKLES, is_finite, open_tensors, write_tensors
from diffusion_jax.formats.torch_files import load_plain, tensors_of

FILES = {
  'text_encoder': 'learned_embeds.safetensors', 'text_encoder_2': 'learned_embeds_2.safetensors'
}
"""Files of a directory, by role."""
LAYOUTS = ('diffusers', 'a1111')
MOST_ROWS = 1000
"""Most rows of one word; a prompt has room for 75."""
MOST_CHARACTERS = 200


class TextualInversion(NamedTuple):
  """A token, and by role the rows [n d] that stand for it in each text encoder."""

  token: str
  embeddings: dict[str, np.ndarray]


def read_textual_inversion(
  path: str | os.PathLike, widths: Mapping[str, int] | None = None
) -> TextualInversion:
  """Read a file of either layout; of a .pt file only arrays, never code, and only with PyTorch.

  path: a file, or a directory with one or both of FILES. widths: of each text encoder's table, by
  role ('text_encoder', 'text_encoder_2'), to check rows and find the encoder of a diffusers file;
  None: no check. UserError: no such layout, or rows of another width or number.
  """
  path = Path(path)
  if path.is_dir():
    return _read_directory(path, widths)
  token, stored = _read_pickle(path) if path.suffix in PICKLES else (None, open_tensors(path))
  require(
    not any(map(is_lora, stored)),
    f'{path} is a LoRA rather than a textual inversion; give it as --lora, which also reads those '
    'that it may hold.',
  )
  if any(name.startswith(BUNDLE) for name in stored):
    found = bundled_inversions(path, widths)
    require(len(found) == 1, f'{path} holds {len(found)} words; give a file for each.')
    return found[0]
  return _word(path, token, stored, widths)


def bundled_inversions(
  path: str | os.PathLike, widths: Mapping[str, int] | None = None
) -> list[TextualInversion]:
  """The textual inversions in a safetensors file of a LoRA; `widths` as above; or UserError."""
  path = Path(path)
  if path.suffix in PICKLES:
    return []
  groups: dict[str, dict[str, Any]] = {}
  for name, tensor in open_tensors(path).items():
    if not is_inversion(name):
      continue
    token, key = '', name
    if name.startswith(BUNDLE):
      token, _, key = name.removeprefix(BUNDLE).rpartition('.')
      if key == '*':  # Of string_to_param.*
        token, _, key = token.rpartition('.')[0], '', 'string_to_param.*'
      require(
        key in INVERSION and bool(token),
        f'{path} holds {name[:200]}, a part of a textual inversion that is not known here.',
      )
    elif name not in INVERSION:
      token = name
    groups.setdefault(token, {})[key] = tensor
  return [_word(path, token or None, stored, widths) for token, stored in groups.items()]


def _word(
  path: Path, token: Any, stored: Mapping[str, Any], widths: Mapping[str, int] | None
) -> TextualInversion:
  known = set(stored) <= set(INVERSION)
  require(
    bool(stored) and (known or len(stored) == 1),
    f'{path} holds {some(stored) or "nothing"}: neither one tensor called by its token nor '
    f'{", ".join(INVERSION)}.',
  )
  arrays = {key: np.array(tensor) for key, tensor in stored.items()}
  rows = {key: value[None] if value.ndim == 1 else value for key, value in arrays.items()}
  if known:
    roles = [INVERSION[key] for key in rows]
    require(len(set(roles)) == len(roles), f'{path} holds {some(rows)}, two of one text encoder.')
    token = path.stem if token is None else token
    found = TextualInversion(token, dict(zip(roles, rows.values(), strict=True)))
  else:
    [(key, value)] = rows.items()
    found = TextualInversion(key, {_role(path, value, widths): value})
  _check(found, widths, path)
  return found


def _read_directory(path: Path, widths: Mapping[str, int] | None) -> TextualInversion:
  files = [inside(path / n, path) for n in FILES.values() if (path / n).is_file()]
  require(
    bool(files), f'{path} holds no {" or ".join(FILES.values())}; name a file of another name.'
  )
  parts = [read_textual_inversion(file, widths) for file in files]
  tokens = {part.token for part in parts}
  require(len(tokens) == 1, f'{path} holds files of several words, {", ".join(sorted(tokens))}.')
  embeddings = {role: rows for part in parts for role, rows in part.embeddings.items()}
  found = TextualInversion(parts[0].token, embeddings)
  _check(found, widths, path)
  return found


def _role(path: Path, value: np.ndarray, widths: Mapping[str, int] | None) -> str:
  """The encoder by the file's name, else by its table's width, else the first."""
  for role, name in FILES.items():
    if path.name == name and role != 'text_encoder':
      return role
  fits = [role for role, width in (widths or {}).items() if width == value.shape[-1]]
  return fits[0] if fits else 'text_encoder'


def _check(found: TextualInversion, widths: Mapping[str, int] | None, path: Path) -> None:
  every = list(found.embeddings.values())
  require(
    all(rows.ndim == 2 and 0 < len(rows) <= MOST_ROWS for rows in every)
    and len({len(rows) for rows in every}) == 1,
    f'{path} must hold 1 to {MOST_ROWS} rows [n d], as many for each encoder, not '
    f'{" and ".join(str(list(rows.shape)) for rows in every)}.',
  )
  require(all(map(is_finite, every)), f'{path} must hold finite floating numbers; fetch it again.')
  require(
    isinstance(found.token, str) and 0 < len(found.token) <= MOST_CHARACTERS,
    f'{path} must name its word in 1 to {MOST_CHARACTERS} characters.',
  )
  for role, rows in found.embeddings.items():
    if widths is not None:
      require(
        widths.get(role) == rows.shape[1],
        f'{path} has embeddings {list(rows.shape)} for the {role}, whose table is '
        f'{widths.get(role, "not there")}' + ' wide' * (role in widths) + '; they are of another '
        'model.',
      )


def _read_pickle(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
  """Old files of either layout."""
  values, token = load_plain(path), None
  if 'string_to_param' in values:
    table = values['string_to_param']
    require(isinstance(table, dict) and '*' in table, f'{path} has no rows in its string_to_param.')
    token, values = values.get('name'), {'emb_params': table['*']}
  return token, tensors_of(values, path)


def write_textual_inversion(
  path: str | os.PathLike, learned: TextualInversion, layout: str = 'diffusers'
) -> None:
  """Write safetensors; in layout 'a1111' the token is the file's name.

  UserError for two encoders in diffusers' layout, which has one file for each.
  """
  require(layout in LAYOUTS, f'layout must be one of {", ".join(LAYOUTS)}, not {layout!r}.')
  rows = {role: np.asarray(value) for role, value in learned.embeddings.items()}
  if layout == 'diffusers':
    require(
      len(rows) == 1,
      f"diffusers' layout holds one text encoder, not {len(rows)}; use layout 'a1111' or write "
      'one file for each.',
    )
    write_tensors(path, {learned.token: next(iter(rows.values()))})
    return
  require(
    Path(path).stem == learned.token,
    f"In layout 'a1111' the file's name is the token: call it {learned.token}.safetensors, not "
    f'{Path(path).name}.',
  )
  single = set(rows) == {'text_encoder'}
  names = {'text_encoder': 'emb_params' if single else 'clip_l', 'text_encoder_2': 'clip_g'}
  write_tensors(path, {names[role]: value for role, value in rows.items()})
