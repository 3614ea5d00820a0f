"""Files of textual inversion (Gal et al. 2022): learned rows for the table of token embeddings.

diffusers' files hold one tensor called by its token, and a directory has one for each text encoder.
AUTOMATIC1111's hold `emb_params`, or for the two encoders of Stable Diffusion XL `clip_l` and
`clip_g`; there the token is the file's name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.io.tensors import open_tensors, write_tensors
from diffusion_jax.io.torch_files import load_plain, tensors_of
from diffusion_jax.models.checks import require

FILES = {
  'text_encoder': 'learned_embeds.safetensors', 'text_encoder_2': 'learned_embeds_2.safetensors'
}
"""What a directory holds, by role."""
LAYOUTS = ('diffusers', 'a1111')
_A1111 = {'emb_params': 'text_encoder', 'clip_l': 'text_encoder', 'clip_g': 'text_encoder_2'}


class TextualInversion(NamedTuple):
  """A token, and by role the rows [n d] that stand for it in each text encoder."""

  token: str
  embeddings: dict[str, np.ndarray]


def read_textual_inversion(
  path: str | os.PathLike, widths: Mapping[str, int] | None = None
) -> TextualInversion:
  """Reads a file of either layout; of a .pt file only arrays, never code, and only with PyTorch.

  Args:
    path: the file, or a directory with one or both of FILES.
    widths: of the table of each text encoder, by role ('text_encoder', 'text_encoder_2'); checks
      the rows, and tells whose a diffusers file of one encoder of several is. None: no check.

  Raises:
    UserError: no such layout, or rows of another width or number than the encoders take.
  """
  path = Path(path)
  if path.is_dir():
    return _read_directory(path, widths)
  token, stored = _read_pickle(path) if path.suffix in ('.pt', '.bin') else _read_tensors(path)
  rows = {key: value[None] if value.ndim == 1 else value for key, value in stored.items()}
  if rows and set(rows) <= set(_A1111):
    found = TextualInversion(token or path.stem, {_A1111[key]: v for key, v in rows.items()})
  else:
    require(
      len(rows) == 1,
      f'{path} holds {", ".join(sorted(rows)) or "nothing"}: neither one tensor called by its '
      f'token nor {", ".join(_A1111)}.',
    )
    [(token, value)] = rows.items()
    found = TextualInversion(token, {_role(path, value, widths): value})
  _check(found, widths, path)
  return found


def _read_directory(path: Path, widths: Mapping[str, int] | None) -> TextualInversion:
  files = [path / name for name in FILES.values() if (path / name).is_file()]
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
  """The encoder that the file's name or else the width of its table tells; or else the first."""
  for role, name in FILES.items():
    if path.name == name and role != 'text_encoder':
      return role
  fits = [role for role, width in (widths or {}).items() if width == value.shape[-1]]
  return fits[0] if fits else 'text_encoder'


def _check(found: TextualInversion, widths: Mapping[str, int] | None, path: Path) -> None:
  counts = {len(rows) for rows in found.embeddings.values()}
  require(
    all(rows.ndim == 2 and len(rows) for rows in found.embeddings.values()) and len(counts) == 1,
    f'{path} must hold rows [n d], as many for each encoder, not '
    f'{" and ".join(str(list(rows.shape)) for rows in found.embeddings.values())}.',
  )
  for role, rows in found.embeddings.items():
    if widths is not None:
      require(
        widths.get(role) == rows.shape[1],
        f'{path} has embeddings {list(rows.shape)} for the {role}, whose table is '
        f'{widths.get(role, "not there")}' + ' wide' * (role in widths) + '; they are of another '
        'model.',
      )


def _read_tensors(path: Path) -> tuple[str | None, dict[str, np.ndarray]]:
  return None, {name: np.array(tensor) for name, tensor in open_tensors(path).items()}


def _read_pickle(path: Path) -> tuple[str | None, dict[str, np.ndarray]]:
  """Old files of either layout."""
  values, token = load_plain(path), None
  if 'string_to_param' in values:
    token, values = values.get('name'), {'emb_params': values['string_to_param'].get('*')}
  return token, tensors_of(values)


def write_textual_inversion(
  path: str | os.PathLike, learned: TextualInversion, layout: str = 'diffusers'
) -> None:
  """Writes safetensors. In layout 'a1111' the token is not stored: it is the file's name.

  UserError for two encoders in diffusers' layout, which has one file for each: write them apart.
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
