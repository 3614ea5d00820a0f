"""The pipeline classes of diffusers that are read: which parts they have, and how these are joined.

One row a class. The classes of Stable Diffusion 1, 2 and XL, which have none, differ by their
encoders. Others are refused: they may compute with parts that nothing here calls.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.errors import require, shown
from diffusion_jax.files import INDEX
from diffusion_jax.formats.networks import Part, resolve
from diffusion_jax.formats.pipeline import Pipeline
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.pipelines.text_conditioners import Reader, TextEncoders, tokenizer_role
from diffusion_jax.types import TextShape

FIRST, SECOND, THIRD = 'text_encoder', 'text_encoder_2', 'text_encoder_3'
CLIP_KINDS = ('clip_text_projection', 'clip_text', 'clip')

Shapes = Callable[[Any, Mapping[str, TextShape]], dict[str, TextShape]]
"""(the denoiser's config, shapes of the encoders that are there) -> those of the missing ones."""


@dataclasses.dataclass(frozen=True)
class Encoder:
  """One text encoder of a class: the networks it may be, and how it reads, see `Reader`.

  length: the most tokens; None for those that the network has positions for. lower: whether it is
  given prompts in lower case, without spaces around them.
  """

  kinds: tuple[str, ...] = CLIP_KINDS
  length: int | None = None
  skip: int = 0
  normalize: bool = True
  masked: bool = False
  lower: bool = False


@dataclasses.dataclass(frozen=True)
class PublishedPipeline:
  """One class.

  denoiser: its folder; kinds: the networks that it may be, rows of `registry.NETWORKS`.
  encoders: of texts, by role. text, pooled: as in `TextEncoders`.
  missing: the shapes of the zeros in place of encoders that are left out, which the index must name
  as [null, null]; None where all are needed.
  zero_null: whether the empty prompt is all zeros where the index does not say.
  sample: fields of `SampleConfig` where nothing else is asked.
  """

  denoiser: str = 'unet'
  kinds: tuple[str, ...] = ('unet',)
  encoders: Mapping[str, Encoder] = dataclasses.field(default_factory=lambda: {FIRST: Encoder()})
  text: tuple[tuple[str, ...], ...] = ((FIRST,),)
  pooled: tuple[str, ...] = ()
  missing: Shapes | None = None
  zero_null: bool = False
  sample: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _of_sd3(denoiser: Any, found: Mapping[str, TextShape]) -> dict[str, TextShape]:
  """T5 is as wide as the joined text. CLIP's towers, whose pooled text is as wide as their states,
  share what the others leave of the joined pooled text."""
  clips = [role for role in (FIRST, SECOND) if role not in found]
  known = sum(found[role].pooled for role in (FIRST, SECOND) if role in found)
  rest = denoiser.pooled_projection_dim - known
  require(
    rest >= len(clips), f'the pooled texts of the encoders leave {rest} of pooled_projection_dim '
    f'{denoiser.pooled_projection_dim} to {" and ".join(clips)}; use encoders of this model.',
  )
  widths = [rest // 2, rest - rest // 2] if len(clips) == 2 else [rest]
  length = next((shape.length for shape in found.values() if shape.length), 77)
  shapes = {
    role: TextShape(width, width, length) for role, width in zip(clips, widths, strict=False)
  }
  return shapes | ({} if THIRD in found else {THIRD: TextShape(denoiser.joint_attention_dim)})


_PROJECTED = Encoder(('clip_text_projection',), skip=1, normalize=False)
_SD = PublishedPipeline()
_SDXL = PublishedPipeline(
  encoders=dict.fromkeys((FIRST, SECOND), Encoder(skip=1, normalize=False)),
  text=((FIRST, SECOND),), pooled=(SECOND,), zero_null=True,
)
_REFINER = PublishedPipeline(
  encoders={SECOND: Encoder(skip=1, normalize=False)}, text=((SECOND,),), pooled=(SECOND,),
  zero_null=True, sample={'guidance': 5.0},
)
_SD3 = PublishedPipeline(
  'transformer', ('mmdit',),
  {FIRST: _PROJECTED, SECOND: _PROJECTED, THIRD: Encoder(('t5',), length=256)},
  text=((FIRST, SECOND), (THIRD,)), pooled=(FIRST, SECOND), missing=_of_sd3,
  sample={'steps': 28, 'guidance': 7.0, 'strength_steps': 'up'},
)
# Its pipeline places the steps itself, from 1 to 1 / count.
_FLUX = PublishedPipeline(
  'transformer', ('flux',), {FIRST: Encoder(), SECOND: Encoder(('t5',), length=512)},
  text=((SECOND,),), pooled=(FIRST,),
  sample={'steps': 28, 'guidance': 1.0, 'spacing': 'trailing', 'strength_steps': 'up'},
)
_PIXART = PublishedPipeline(
  'transformer', ('pixart',), {FIRST: Encoder(('t5',), length=120, masked=True, lower=True)},
  sample={'steps': 20, 'guidance': 4.5, 'binning': 'aspect'},
)
_SIGMA = dataclasses.replace(
  _PIXART, encoders={FIRST: dataclasses.replace(_PIXART.encoders[FIRST], length=300)}
)

WAYS = ('', 'Img2Img', 'Inpaint')
"""What one network is used for, as the names of its classes say."""

PUBLISHED: dict[str, PublishedPipeline] = {
  'StableDiffusionInstructPix2PixPipeline': dataclasses.replace(
    _SD, sample={'image_guidance': 1.5}
  ),
  **dict.fromkeys(
    ('LatentConsistencyModelPipeline', 'LatentConsistencyModelImg2ImgPipeline'),
    dataclasses.replace(_SD, sample={'steps': 4, 'guidance': 8.5}),
  ),
  **{f'StableDiffusion3{way}Pipeline': _SD3 for way in (*WAYS, 'PAG', 'PAGImg2Img')},
  **{f'Flux{way}Pipeline': _FLUX for way in WAYS},
  'PixArtAlphaPipeline': _PIXART, 'PixArtSigmaPipeline': _SIGMA, 'PixArtSigmaPAGPipeline': _SIGMA,
  'DiTPipeline': PublishedPipeline(
    'transformer', ('dit',), encoders={}, text=(), sample={'steps': 50, 'guidance': 4.0}
  ),
}
"""The classes that differ from Stable Diffusion 1, 2 and XL."""

_PLAIN = (
  *WAYS, 'ControlNet', 'ControlNetImg2Img', 'ControlNetInpaint', 'PAG', 'PAGImg2Img', 'PAGInpaint',
  'ControlNetPAG', 'ControlNetPAGInpaint', 'ControlNetPAGImg2Img', 'InstructPix2Pix',
)
_OF_SD = frozenset({
  *(f'StableDiffusion{size}{way}Pipeline' for size in ('', 'XL') for way in _PLAIN),
  *(f'StableDiffusion{way}Pipeline' for way in (
    'Depth2Img', 'ImageVariation', 'Upscale', 'SAG', 'Panorama', 'AttendAndExcite', 'DiffEdit',
    'ModelEditing', 'Paradigms', 'Pix2PixZero',
  )),
})
"""The classes of the networks of Stable Diffusion 1, 2 and XL."""


def check_class(kind: Any, where: str) -> None:
  """Raise a UserError for a class of diffusers that is not read; one that is not named may be.

  where: its index.
  """
  plain = [name for name in PUBLISHED if PUBLISHED[name] is not _SD and 'PAG' not in name]
  require(
    isinstance(kind, str) and (not kind or kind in PUBLISHED or kind in _OF_SD),
    f'{where} is of the class {shown(kind)}, which is not implemented; give a model of '
    f'StableDiffusionPipeline, StableDiffusionXLPipeline (or their Img2Img, Inpaint and ControlNet '
    f'classes), {", ".join(plain)}.',
  )


DENOISERS = tuple(dict.fromkeys(row.denoiser for row in (_SD, *PUBLISHED.values())))
"""The folders of denoisers."""
DENOISER_KINDS = tuple(dict.fromkeys(k for row in (_SD, *PUBLISHED.values()) for k in row.kinds))


def published(kind: str | None, names: Any = ()) -> PublishedPipeline:
  """Return the row of a class, or that of Stable Diffusion 1, 2, XL or XL's refiner by the names of
  its parts."""
  if kind in PUBLISHED or SECOND not in names:
    return PUBLISHED.get(kind, _SD)
  return _SDXL if FIRST in names else _REFINER


def text_encoders(
  pipeline: Pipeline, parts: Mapping[str, Part], path: str, denoiser: Any, dtype
) -> TextEncoders:
  """Return the conditioner that reads the prompts of a pipeline of diffusers.

  Args:
    parts: its networks, by role.
    path: of its directory.
    denoiser: the denoiser's config.

  Raises:
    UserError: an encoder that it needs is not there, or is of another kind.
  """
  row, where = published(pipeline.kind, parts), resolve(path) / INDEX
  there = {role: parts[role].expect(row.encoders[role].kinds) for role in row.encoders
           if role in parts}
  for role in row.encoders.keys() - there.keys():
    require(
      row.missing is not None,
      f'{where} names no {role}, without which a {pipeline.kind} cannot read prompts; add it.',
    )
    require(
      role in pipeline.index,
      f'{where} says nothing of {role}; add its folder, or "{role}": [null, null] to do without.',
    )
  networks = {role: part.network(dtype=dtype) for role, part in there.items()}
  tokenizers = {role: load_tokenizer(_folder(pipeline, path, role)) for role in there}
  zero_null = bool(pipeline.index.get('force_zeros_for_empty_prompt', True)) and row.zero_null
  return joined_texts(row, networks, tokenizers, denoiser, zero_null)


def joined_texts(
  row: PublishedPipeline, networks: Mapping[str, Network], tokenizers: Mapping[str, Any],
  denoiser: Any, zero_null: bool | None = None,
) -> TextEncoders:
  """Return the conditioner of a class with these networks and tokenizers, by role.

  Args:
    tokenizers: may lack some, of a model without weights.
    denoiser: the denoiser's config.
    zero_null: None for what is usual in the class.
  """
  shapes = {role: network.config.text_shape for role, network in networks.items()}
  missing = row.missing(denoiser, shapes) if len(shapes) < len(row.encoders) else {}
  shapes |= missing
  # Towers of CLIP read as many tokens each.
  limits = [shape.length for shape in shapes.values() if shape.length is not None]
  readers = {}
  for role, how in row.encoders.items():
    tokenizer, length = tokenizers.get(role), how.length or min(limits)
    if how.length is not None and tokenizer is not None:
      length = min(length, tokenizer.model_max_length)
    readers[role] = Reader(
      length, tokenizer, how.skip, how.normalize, how.masked, missing.get(role), how.lower
    )
  zero_null = row.zero_null if zero_null is None else zero_null
  return TextEncoders(networks, readers, row.text, row.pooled, zero_null)


def _folder(pipeline: Pipeline, path: str, role: str) -> Path:
  name = tokenizer_role(role)
  return resolve(pipeline.parts[name].path) if name in pipeline.parts else resolve(path) / name
