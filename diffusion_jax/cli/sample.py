"""sample: prompts to PNGs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from diffusion_jax import __version__
from diffusion_jax.cli.editing import EditOptions
from diffusion_jax.cli.inverting import InvertOptions
from diffusion_jax.cli.options import (
  AdapterOptions,
  DrawOptions,
  ModelOptions,
  add_options,
  given,
  open_model,
  read_options,
)
from diffusion_jax.cli.refining import RefinerOptions
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Help, parse_size
from diffusion_jax.pipelines.options import SampleOptions, TokenOptions

if TYPE_CHECKING:
  import numpy as np

HELP = 'sample pictures for prompts'
DESCRIPTION = """Draws one picture for each prompt, as PNG with the prompt and all settings in its
metadata, and one grid of the first 256. The same seed gives the same pictures, up to the rounding
that --batch explains. An empty prompt samples without condition.

examples:
  python -m diffusion_jax sample --prompt 'grinning cat' --prompt 'red apple' --out pictures
  python -m diffusion_jax sample --prompt 'blue car' --image car.png --strength 0.6 --out new
  python -m diffusion_jax sample --prompt 'red hat' --image cat.png --mask hat.png --out new"""


STRENGTH = 0.8
NEEDED = {'strength': 'image', 'control_strength': 'control', 'noise_level': 'small'}
"""Numbers that mean nothing without a picture."""
NUMBERS = 'values.npy'
"""What sequences are kept in, beside pictures of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
  """Prompts, and where the pictures go."""

  prompt: Annotated[tuple[str, ...], Help(
    'prompt; repeat for several pictures. An empty one samples without condition', 'TEXT'
  )] = ()
  prompts: Annotated[str, Help(
    'a text file with one prompt a line; blank lines are skipped', 'FILE'
  )] = ''
  size: Annotated[str, Help(
    'of the pictures in pixels: one number for a square, or height x width, such as 96x64 '
    "(default: the aspect of the picture that is given, about as large as the model's training; "
    'without one, that of the training)', 'HxW'
  )] = ''
  label: Annotated[tuple[str, ...], Help(
    'with --classifier_guidance, the class that the classifier leads to, of all prompts, or repeat '
    'for one of each (default: the one that the prompt names)', 'NAME'
  )] = ()
  negative: Annotated[str, Help('what not to draw (default: nothing)', 'TEXT')] = ''
  out: Annotated[str, Help('where the pictures go', 'DIR')]

  def __post_init__(self):
    if self.size:
      parse_size(self.size)  # So that no model is read for a size that is none.

  def folder(self) -> Path:
    """Return where the pictures go. UserError for a file."""
    out = Path(self.out)
    if out.exists() and not out.is_dir():
      raise UserError(f'--out {self.out} is a file; choose a directory.')
    return out

  def labelled(self, inputs, metadata: dict[str, str], config) -> tuple:
    """Return (inputs, metadata) with the classes of --label. UserError where nothing reads them."""
    if not self.label:
      return inputs, metadata
    if inputs is None or 'classifier_guidance' not in config.guides:
      raise UserError(
        '--label needs --classifier_guidance S, and no picture that is inverted; leave it out.'
      )
    return dataclasses.replace(inputs, classes=self.label), metadata | {
      'label': ', '.join(self.label)
    }

  def read(self, needed: bool = True) -> list[str]:
    """All prompts; in a file blank lines only separate. UserError: none, or an unreadable file."""
    prompts = list(self.prompt)
    if self.prompts:
      from diffusion_jax.data.captions import read_lines

      prompts += read_lines(self.prompts, 'prompts file')
    if not prompts and needed:
      raise UserError(
        "there is no prompt; give --prompt TEXT (--prompt '' draws without one) or --prompts FILE."
      )
    return prompts


@dataclasses.dataclass(frozen=True)
class PictureOptions:
  """Pictures that a model may be conditioned on."""

  image: Annotated[str, Help('a picture to start from, repaint or edit', 'FILE')] = ''
  strength: Annotated[float | None, Help(
    'with --image: fraction of the steps that are taken, up to 1; 1 keeps least of the picture '
    f'(default: {STRENGTH}; 0.3 of a refiner; 1 where the model is shown it, or part of it is '
    'kept)', 'S'
  )] = None
  mask: Annotated[str, Help(
    'white where to paint, by any model; laid over the image whatever its size, and what is '
    'transparent is not painted; all that is not painted comes back as it is', 'FILE'
  )] = ''
  control: Annotated[str, Help('what a ControlNet sees', 'FILE')] = ''
  control_strength: Annotated[float | None, Help(
    'factor on what the ControlNet adds (default: 1)', 'S'
  )] = None
  depth: Annotated[str, Help('for a depth model: white is near', 'FILE')] = ''
  small: Annotated[str, Help('for an upscaler: a picture to enlarge', 'FILE')] = ''
  reference: Annotated[str, Help(
    'for a model that varies a picture; the prompt then only names the file', 'FILE'
  )] = ''
  noise_level: Annotated[int | None, Help(
    'noise put on the small picture, also between the stages of a cascade, 0 to 350 (default: 20)',
    'N'
  )] = None

  def given(self) -> list[str]:
    """Return the names of what was given."""
    return [*self.files(), *(name for name in NEEDED if getattr(self, name) is not None)]

  def files(self) -> dict[str, str]:
    """Return the files by what they are."""
    names = ('image', 'mask', 'control', 'depth', 'small', 'reference')
    return {name: getattr(self, name) for name in names if getattr(self, name)}

  def sizes(
    self, model, size: str, binning: str, edit: EditOptions
  ) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return `Diffusion.drawn_size` of `size` as in --size, else of the pictures' own aspect, or
    of what `edit` makes of it.

    Raises:
      UserError: no size, one that the model cannot halve, or a picture that cannot be read.
    """
    from diffusion_jax.data.pictures import frame_size

    files = self.files()
    if size:
      return model.drawn_size(*parse_size(size), 'none' if files else binning)
    own = frame_size(files)
    if own and (edit.outpaint or edit.enlarge):
      return (model.size_of(*edit.canvas(*own)),) * 2
    return (model.size_like(*own) if own else model.trained_size,) * 2

  def check_numbers(self, model, steps: int) -> None:
    """Raise UserError for a number without its picture, and a strength that leaves no step."""
    given = {needed for needed in NEEDED.values() if getattr(self, needed)}
    if model.stages:  # Which enlarge what the base of a cascade draws.
      given.add('small')
    for name, needed in NEEDED.items():
      if getattr(self, name) is not None and needed not in given:
        raise UserError(f'--{name} needs a picture; give --{needed} FILE, too.')
    strength = self.strength
    if strength is not None and (not 0 < strength <= 1 or round(strength * steps) < 1):
      raise UserError(
        f'--strength {strength:g} leaves no step of {steps}; choose a fraction up to 1.'
      )

  def read(self, model, config, height: int, width: int, edit: EditOptions) -> tuple:
    """(`Inputs`, metadata) of the given pictures, for images of that size; or UserError."""
    from diffusion_jax.data.pictures import read_pictures
    from diffusion_jax.pipelines.inputs import Inputs

    if not model.takes_pictures:
      return Inputs(), {}
    self.check_numbers(model, config.steps)
    latent, needs = model.space.shape(height, width)[:2], model.inputs(height, width)
    sizes = dict.fromkeys(('image', 'mask'), edit.within(height, width)) | dict.fromkeys(
      ('depth', 'small'), latent
    ) | {'control': (height, width)}
    if 'reference' in needs:
      sizes['reference'] = needs['reference'][0][:2]
    files = self.files()
    if 'reference' in files and 'reference' not in needs:
      raise UserError(
        'the model varies no picture; leave --reference out, or use a model that does.'
      )
    pictures, notes = read_pictures(files, sizes)
    for note in notes:
      print(f'note: {note}')
    numbers = {name: getattr(self, name) for name in NEEDED if getattr(self, name) is not None}
    inputs = Inputs(**edit.changed(pictures), **numbers)
    inputs.rows(model, 1, height, width)  # So that what does not fit is said before sampling.
    inputs.check_kept(model, height, width, config.resample)
    if 'image' in files and inputs.fraction(model) < 1:
      numbers['strength'] = inputs.fraction(model)
    return inputs, files | {name: f'{value:g}' for name, value in numbers.items()}


OPTIONS = {
  ModelOptions: '', PromptOptions: '', AdapterOptions: '', RefinerOptions: '',
  EditOptions: 'changes of a picture', PictureOptions: (
    'pictures; the first given of image, small, control and depth is scaled until it just covers '
    'the size that is drawn, and its middle cut out; without --size that is its own aspect, so '
    'that hardly anything is cut. The others are laid over it, and cut at the same place'
  ),
  InvertOptions: 'pictures as noise', SampleOptions: '', TokenOptions: '', DrawOptions: '',
}
"""Dataclasses of options, and the titles of their groups."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Model, prompts, settings."""
  for cls, title in OPTIONS.items():
    add_options(parser, cls, title)


def file_name(index: int, prompt: str) -> str:
  """'0003_red_apple.png'."""
  return f'{index:04d}_{re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]}.png'


def write(
  out: Path, batches: Iterable[np.ndarray], prompts: Sequence[str], settings: dict[str, str]
) -> str:
  """Write each picture as it comes, then the grid; return a sentence. batches: uint8 [b h w 3]."""
  from PIL import Image
  from tqdm import tqdm

  from diffusion_jax.viz.grids import MOST, Overview, save_png

  overview, shown = Overview(len(prompts)), prompts[:MOST]
  images = (image for batch in batches for image in batch)
  with tqdm(total=len(prompts), desc='drawing', unit='img', leave=False) as bar:
    for index, image in enumerate(images):
      metadata = {'prompt': prompts[index], 'index': str(index), **settings}
      save_png(Image.fromarray(image), out / file_name(index, prompts[index]), metadata)
      overview.add(image)
      bar.update()
  save_png(overview.grid(shown), out / 'grid.png', {'prompts': '\n'.join(shown), **settings})
  more = len(prompts) - len(shown)
  left_out = f'; grid.png shows the first {len(shown)} and leaves out {more:,}' * bool(more)
  return f'{len(prompts)} pictures and grid.png are in {out}{left_out}'


def kept(
  batches: Iterable[np.ndarray], path: Path, count: int
) -> Iterator[np.ndarray]:
  """Yield the batches, whose rows also go into an npy file of `count` rows as they come."""
  import numpy as np

  rows, done = None, 0
  for batch in batches:
    if rows is None:
      rows = np.lib.format.open_memmap(path, 'w+', batch.dtype, (count, *batch.shape[1:]))
    rows[done : done + len(batch)] = batch
    done += len(batch)
    yield batch


def run(args: argparse.Namespace) -> int:
  """Sample and write."""
  sampling = (SampleOptions, TokenOptions)
  parts = (read_options(cls, args) for cls in OPTIONS if cls not in sampling)
  return sample(*parts, {k: v for cls in sampling for k, v in given(cls, args).items()})


def check_options(
  model, config, pictures: PictureOptions, edit: EditOptions, inverting: InvertOptions, fits
) -> None:
  """Raise UserError for options that do not fit a model, before its weights are read."""
  inverting.check_model(model)
  given = [name for part in (pictures, edit) for name in part.given()]
  if given and not (model.takes_pictures or inverting.wanted):
    raise UserError(f'the model takes no pictures; leave --{given[0]} out.')
  size, _ = fits(model, config)
  if model.takes_pictures:
    pictures.check_numbers(model, config.steps)
    edit.check_model(model, pictures.files(), config.resample, *size)


def checked_inputs(model, config, prompts: Sequence[str], negative: str, drawn, read) -> tuple:
  """Return what `read()` does, (`Inputs`, metadata), of prompts and settings that the model takes.

  drawn: (height, width) in pixels. UserError for others.
  """
  model.check_sampling(config, negative)
  if model.text is not None:
    model.check_prompts([*prompts, negative], config.prompt_syntax)
  inputs, metadata = read()
  if model.text is None or model.takes_classes:  # Prompts name classes, or nothing but the files.
    model.rows(prompts, negative, inputs, *drawn)
  return inputs, metadata


def metadata_of(
  config, negative: str, parts: Iterable[Mapping[str, str]], seed: int, model: str
) -> dict[str, str]:
  """Return what a picture's file says besides its prompt; parts: of pictures, adapters and more."""
  more = {name: value for part in parts for name, value in part.items()}
  return {
    'negative': negative, **config.in_force(), **more, 'seed': str(seed), 'model': model,
    'software': f'diffusion_jax {__version__}',
  }


def sample(
  source: ModelOptions, prompt: PromptOptions, adapters: AdapterOptions, refining: RefinerOptions,
  edit: EditOptions, pictures: PictureOptions, inverting: InvertOptions, draw: DrawOptions,
  values: Mapping[str, Any],
) -> int:
  """Sample and write; `values` are sample settings in place of the model's own."""
  edit.check(pictures.files(), refining.refiner)
  prompts = edit.prompts(prompt.read)
  inverting.check(pictures.image, (pictures, refining, edit), prompts)
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
  from diffusion_jax.pipelines.tiling import tiled

  enable_compile_cache()
  out, mesh = prompt.folder(), make_mesh(MeshConfig())
  fits = lambda model, config: pictures.sizes(model, prompt.size, config.binning, edit)
  check = lambda *found: check_options(*found, pictures, edit, inverting, fits)
  model, weights, config, name = open_model(source, values, mesh, check)
  config, refiner = refining.read(model, config, values)
  config = inverting.settings(model, config, values)
  model, weights = adapters.apply(model, weights, config.guides)
  model = tiled(model, edit.tiling)
  drawn, (height, width) = fits(model, config)
  read = lambda: (
    (None, pictures.files()) if inverting.wanted else pictures.read(model, config, *drawn, edit)
  )
  inputs, started = checked_inputs(
    model, config, prompts, prompt.negative, drawn, lambda: prompt.labelled(*read(), config)
  )
  parts = (started, *(part.named() for part in (edit, adapters)), refining.named(refiner),
           inverting.named())
  settings = metadata_of(config, prompt.negative, parts, draw.seed, name)
  how = dict(
    seed=draw.seed, mesh=mesh, negative=prompt.negative, height=height, width=width,
    batch_size=min(draw.batch, inverting.interpolate or len(prompts)),
  )
  weights = model.on_mesh(weights, mesh)
  first = functools.partial(model.sample, weights, prompts, config, inputs=inputs, **how)
  try:
    out.mkdir(parents=True, exist_ok=True)
    if inverting.wanted:
      batches, prompts = inverting.run(
        model, weights, prompts, config, pictures.image, out, drawn, **how
      )
    elif refiner is None:
      batches = first()
      if model.numbers:
        batches = kept(batches, out / NUMBERS, len(prompts))
      batches = map(model.drawn, batches)
    else:
      batches = refiner.generate(lambda: first(latents=True), prompts, **how)
    print(write(out, batches, prompts, settings))
  except OSError as error:
    raise UserError(f'--out {out} cannot be written to ({error}).') from error
  return 0
