"""The sample grids of a run as a section of its page."""

from typing import Any

from PIL import Image

from diffusion_jax.files import parse_json
from diffusion_jax.viz import page
from diffusion_jax.viz.curves import spread
from diffusion_jax.viz.rundir import Run

ABOUT = 'about'
"""The text in a grid's PNG that says what the grid shows."""
_THUMBNAILS = 24
_THUMBNAIL_SIZE = 416  # Twice what the page shows, for dense screens.


def grids_section(run: Run, limit: int) -> str:
  """The newest grid large, earlier ones small, in at most about `limit` characters."""
  readable = [(step, image) for step, image in _open_grids(run) if image is not None]
  if not readable or limit < 50_000:
    return ''
  (step, newest), earlier = readable[-1], readable[:-1]
  share = 0.6 if earlier else 0.95
  label = f'Step {step:,}'
  about = newest.info['text'].pop(ABOUT, '')
  source = page.embed_image(newest, int(limit * share))
  body = (
    f'<figure class="card latest"><img src="{source}" alt="{label}"></figure>'
    + _image_text(newest)
  )
  thumbnails = []
  for earlier_step, image in earlier:
    image.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    source = page.embed_image(image, int(limit * 0.35 / len(earlier)))
    name = f'step {earlier_step:,}'
    thumbnails.append(
      f'<figure><img src="{source}" alt="{name}"><figcaption>{name}</figcaption></figure>\n'
    )
  strip = f'<div class="strip">\n{"".join(thumbnails)}</div>' if thumbnails else ''
  shown = f' Below it {len(earlier)} of {len(run.grids) - 1} earlier ones.' if earlier else ''
  note = ' '.join(part for part in (about, f'{label}.{shown}') if part)
  return page.section('samples', 'Pictures', note, body + strip)


def _open_grids(run: Run) -> list[tuple[int, Image.Image | None]]:
  """The grids that are shown; None for a file that is damaged or still being written."""
  opened = []
  for step, path in spread(run.grids, _THUMBNAILS + 1):
    try:
      with Image.open(path) as file:
        image = file.convert('RGB')
        image.info = {'text': dict(getattr(file, 'text', {}))}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
      image = None
    opened.append((step, image))
  return opened


def _image_text(image: Image.Image) -> str:
  """The text chunks of a PNG: captions, settings; a JSON list is shown as a list."""
  parts = []
  for key, text in image.info.get('text', {}).items():
    try:
      value: Any = parse_json(text)
    except ValueError:
      value = text
    if isinstance(value, list):
      shown = '<ol>' + ''.join(f'<li>{page.escape(page.plain(v))}</li>' for v in value) + '</ol>'
    else:
      shown = page.escape(page.plain(value))
    parts.append(f'<dt class="muted">{page.escape(key)}</dt><dd>{shown}</dd>\n')
  return page.details('About these pictures', f'<dl>{"".join(parts)}</dl>') if parts else ''
