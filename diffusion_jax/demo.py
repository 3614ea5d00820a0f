"""A page in the browser that draws from a model, made with Gradio.

pip install 'diffusion_jax[demo]'; in a notebook `launch` shows the page below the cell.
"""

import atexit
import collections
import html
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax.cli.demo import MOST_LETTERS, Limits
from diffusion_jax.cli.sample import STRENGTH, file_name
from diffusion_jax.errors import UserError, require
from diffusion_jax.limits import MOST_SEED, check_seed
from diffusion_jax.pipelines.generator import OfOneSize
from diffusion_jax.registry import SAMPLERS
from diffusion_jax.session import Session
from diffusion_jax.viz.grids import save_png

MOST_UPLOAD = 2**25
"""Bytes of a picture that is uploaded."""
KEPT, HISTORY = 200, 24
"""Pictures on the disk, of all who draw, and those that one page goes back to."""
UPLOADS = {
  'control': 'Picture that the ControlNet sees', 'depth': 'Depth map: white is near',
  'small': 'Picture to enlarge', 'reference': 'Picture to vary',
}
"""Pictures that a model may need besides the one to paint on."""
EDITED = {'image': 'uploaded', 'mask': 'painted'}
"""What the metadata say of an editor's pictures."""
WHOLE = ('steps', 'top_k')
"""Settings that are whole numbers."""
DRAWING = 'drawing'
CSS = '#said textarea { font-weight: 600; }'


class Pictures:
  """Files in a folder of their own, which ends with the process; the last KEPT stay."""

  def __init__(self):
    self.folder = Path(tempfile.mkdtemp(prefix='diffusion_jax_demo_'))
    atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
    self._files: collections.deque[Path] = collections.deque()
    self._count = 0

  def add(self, image: Image.Image, name: str, metadata: Mapping[str, str]) -> str:
    """Write a PNG with its metadata; return its path."""
    path = self.folder / file_name(self._count, name)
    self._count += 1
    save_png(image, path, metadata)
    self._files.append(path)
    if len(self._files) > KEPT:
      self._files.popleft().unlink(missing_ok=True)
    return str(path)


def painted(layers: Sequence[str]) -> Image.Image | None:
  """Return where the layers of an editor are painted on, white on black; None for nowhere."""
  alphas = []
  for layer in layers:
    with Image.open(layer) as file:
      alphas.append(np.asarray(file.convert('RGBA'))[..., 3])
  mask = np.max(alphas, axis=0) >= 128 if alphas else np.zeros((1, 1), bool)
  return Image.fromarray(mask.astype(np.uint8) * 255) if mask.any() else None


def is_empty(file: str) -> bool:
  """Return whether a picture is transparent everywhere, as an editor's canvas is at first."""
  with Image.open(file) as image:
    return 'A' in image.getbands() and image.getchannel('A').getextrema()[1] == 0


class Desk:
  """Draws what a page asks for: a mapping of names to values of its fields."""

  def __init__(self, session: Session, limits: Limits):
    self.session, self.limits, self.pictures = session, limits, Pictures()

  def draw(self, asked: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (file, metadata) of one picture after another. UserError for what cannot be drawn."""
    asked = dict(asked)
    prompt, negative = asked.pop('prompt') or '', asked.pop('negative', '') or ''
    seed, count = whole('seed', asked.pop('seed')), whole('pictures', asked.pop('count'))
    settings = {k: whole(k, v) if k in WHOLE else v for k, v in asked.items()}
    check_seed(seed)
    self.limits.check((prompt, negative), count, settings.get('steps', 1))
    settings = self._with_files(settings)
    size = (settings.pop('size', '') or '').strip()
    height, width = self.session.size(size, **settings)
    self.limits.check_size(height, width, self.session.model.trained_size)
    named = EDITED | {n: Path(settings[n]).name for n in UPLOADS if n in settings}
    for image, metadata in self.session.sample(
      [prompt] * count, negative=negative, seed=seed, size=size, **settings
    ):
      # Whoever looks at the picture need not know where this machine keeps files.
      own = metadata | {name: text for name, text in named.items() if name in metadata}
      yield self.pictures.add(Image.fromarray(image), prompt, own), own

  def _with_files(self, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the files that an editor has made, and without empty ones."""
    editor = settings.pop('editor', None) or {}
    out = {name: value for name, value in settings.items() if name not in UPLOADS or value}
    strength = out.pop('strength', None)
    image = editor.get('background')
    mask = painted(editor.get('layers') or [])
    if image and not is_empty(image):
      out['image'] = image
    if mask is not None:
      out['mask'] = self.pictures.add(mask, 'mask', {})
    return out | ({'strength': strength} if 'image' in out and mask is None else {})


def whole(name: str, value: Any) -> int:
  """Return a whole number of a field. UserError for anything else, as for an empty field."""
  require(
    isinstance(value, (int, float)) and value == value // 1,
    f'{name} is {"empty" if value is None else value}; give a whole number.',
  )
  return int(value)


def page(model: Session | str = '', limits: Limits = Limits()) -> Any:  # noqa: B008
  """Return the page, Gradio's Blocks, of an opened model, or of a directory or 'asset:NAME'.

  UserError: Gradio is not installed, or no such model.
  """
  gradio = check_gradio()
  session = Session.opened(model)
  desk = Desk(session, limits)
  with gradio.Blocks(
    analytics_enabled=False, title='diffusion_jax', delete_cache=(600, 7200), fill_width=True
  ) as blocks:
    gradio.HTML(f'<h1>Draw</h1><p>{html.escape(session.name)}</p>')
    with gradio.Row():
      with gradio.Column():
        fields, buttons = _fields(gradio, session, limits)
      with gradio.Column():
        shown = _results(gradio)
    _connect(gradio, desk, fields, buttons, shown)
  blocks.queue(max_size=limits.queue, default_concurrency_limit=1)
  return blocks


def launch(
  model: Session | str = '', host: str = '127.0.0.1', port: int = 0,
  limits: Limits = Limits(), **how: Any,  # noqa: B008
) -> str:
  """Serve the page to this machine alone, or to whoever reaches `host`; return its address.

  port: 0 for the first free one from 7860 on. how: more of Blocks.launch, such as
  prevent_thread_lock=True. UserError: as for `page`, or a host or port that cannot be had.
  """
  blocks = page(model, limits)
  try:
    _, address, _ = blocks.launch(
      server_name=host, server_port=port or None, share=False, max_file_size=MOST_UPLOAD,
      footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, css=CSS, **how,
    )
  except OSError as error:
    where = f'{host}, port {port or "7860 to 7959"}'
    raise UserError(f'the page cannot be served at {where} ({error}); choose others.') from error
  return address


def _fields(gradio: ModuleType, session: Session, limits: Limits) -> tuple[dict, dict]:
  """Return (what one fills in, by the names that `Desk.draw` knows; buttons by name)."""
  model, config = session.model, session.config
  of_one_size = isinstance(model, OfOneSize)
  height, width = model.trained_size
  fields = {'prompt': gradio.Textbox(label='Prompt', lines=2, max_length=MOST_LETTERS)}
  if not of_one_size:
    fields['negative'] = gradio.Textbox(
      label='Negative prompt: what not to draw', max_length=MOST_LETTERS
    )
  with gradio.Row():
    buttons = {'draw': gradio.Button('Draw', variant='primary'), 'stop': gradio.Button('Stop')}
  for name, make in _settings(gradio, limits).items():
    if name in session.settings:
      fields[name] = make(getattr(config, name))
  with gradio.Row(equal_height=True):
    fields['seed'] = gradio.Number(0, label='Seed', precision=0, scale=3)
    buttons['seed'] = gradio.Button('New seed', scale=1)
  with gradio.Row():
    fields['count'] = gradio.Slider(
      1, limits.most_pictures, 1, step=1, label='Pictures', visible=limits.most_pictures > 1
    )
    if not of_one_size:
      fields['size'] = gradio.Textbox(
        label='Height x width in pixels', placeholder=f'{height}x{width}', max_length=20
      )
  if model.takes_pictures and not model.stages:
    fields |= _picture_fields(gradio, session)
  return fields, buttons


def _settings(gradio: ModuleType, limits: Limits) -> dict[str, Any]:
  """Return how the field of each setting is made of its value; for models that have it."""
  def slider(label: str, low: float, high: float, step: float):
    return lambda value: gradio.Slider(
      min(low, value), max(high, value), value, step=step, label=label
    )

  return {
    'sampler': lambda value: gradio.Dropdown(list(SAMPLERS), value=value, label='Sampler'),
    'steps': lambda value: gradio.Slider(
      1, limits.most_steps, min(value, limits.most_steps), step=1, label='Steps'
    ),
    'guidance': slider('Guidance; 1 is none', 0, 20, 0.1),
    'temperature': slider('Temperature', 0.05, 2, 0.05),
    'top_k': slider('Top k; 0 is all', 0, 512, 1),
    'top_p': slider('Top p', 0.05, 1, 0.05),
  }


def _picture_fields(gradio: ModuleType, session: Session) -> dict[str, Any]:
  """Return an editor to paint a mask in, and what else the model needs."""
  needs, fields = session.needs, {}
  radius = max(1, min(session.model.trained_size) // 16)  # Gradio's own covers small pictures.
  for name in (name for name in UPLOADS if name in needs):
    fields[name] = gradio.Image(type='filepath', label=UPLOADS[name], sources=['upload'])
  with gradio.Accordion('Start from a picture', open='image' in needs):
    fields['editor'] = gradio.ImageEditor(
      label='Paint over what is to be drawn anew; without paint all of it is',
      type='filepath', format='png', sources=['upload', 'clipboard'], transforms=(), layers=False,
      brush=gradio.Brush(radius, [('#d55e00', 0.7)], color_mode='fixed'), elem_id='editor',
    )
    fields['strength'] = gradio.Slider(
      0.05, 1, 1 if 'image' in needs else STRENGTH, step=0.05,
      label='Strength without paint: at 1 least of the picture is kept',
    )
  return fields


def _results(gradio: ModuleType) -> dict[str, Any]:
  """Return what is shown, by name."""
  return {
    'said': gradio.Textbox(label='Progress', interactive=False, elem_id='said'),
    'drawn': gradio.Gallery(
      label='Pictures', columns=2, object_fit='contain', elem_id='drawn', interactive=False,
      buttons=['fullscreen'],
    ),
    'download': gradio.DownloadButton(
      'Download this picture, with its settings in it', interactive=False, elem_id='download'
    ),
    'metadata': gradio.JSON(label='Its settings', elem_id='metadata'),
    'history': gradio.Gallery(
      label='History', columns=6, object_fit='contain', elem_id='history', interactive=False,
      allow_preview=False, fit_columns=False, buttons=[],
    ),
    'now': gradio.State([]), 'before': gradio.State([]),
  }


def _connect(gradio: ModuleType, desk: Desk, fields: dict, buttons: dict, shown: dict) -> None:
  """Say what happens on a click."""
  names = list(fields)
  files = lambda pictures: [file for file, _ in pictures]
  of_one = lambda picture: {
    shown['download']: gradio.DownloadButton(value=picture[0], interactive=True),
    shown['metadata']: picture[1],
  }

  def draw(before, *values, progress=gradio.Progress()):  # noqa: B008
    asked, began, now = dict(zip(names, values, strict=True)), time.monotonic(), []
    yield {shown['said']: f'{DRAWING}; the first picture of a sampler or size takes longer.'}
    try:
      for picture in desk.draw(asked):
        now.append(picture)
        done, of = len(now), whole('pictures', asked['count'])
        progress((done, of), unit='pictures')
        seconds = time.monotonic() - began
        before = [picture, *before][:HISTORY]
        said = f'{done} of {of} drawn, {seconds:.1f} s.'
        yield {
          shown['said']: said, shown['now']: now, shown['before']: before,
          shown['drawn']: files(now), shown['history']: files(before),
          **of_one(now[0]),
        }
    except UserError as error:
      yield {shown['said']: sentence(error)}

  def chosen(pictures, event: gradio.SelectData):
    return of_one(pictures[event.index])

  outputs = [shown[name] for name in shown]
  selected = [shown['download'], shown['metadata']]
  hidden = {'api_visibility': 'private'}
  event = gradio.on(
    [buttons['draw'].click, fields['prompt'].submit], draw, [shown['before'], *fields.values()],
    outputs, concurrency_limit=1, **hidden,
  )
  buttons['stop'].click(lambda: 'stopped.', None, shown['said'], cancels=[event], **hidden)
  buttons['seed'].click(lambda: random.randrange(MOST_SEED), None, fields['seed'], **hidden)
  shown['drawn'].select(chosen, shown['now'], selected, **hidden)
  shown['history'].select(chosen, shown['before'], selected, **hidden)


def sentence(error: UserError) -> str:
  """Return what an error says, to someone who has fields in place of options."""
  return str(error).replace(' --', ' ').removeprefix('--')


def check_gradio() -> ModuleType:
  """Return Gradio, which then asks nobody for a newer version. UserError where it is missing."""
  os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
  try:
    import gradio
  except ImportError as error:
    raise UserError(
      "the page needs the package gradio; install it with pip install 'diffusion_jax[demo]'."
    ) from error
  return gradio
