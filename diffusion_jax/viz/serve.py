"""The page of a run, served to this machine alone, made anew as the run writes."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.errors import UserError
from diffusion_jax.files import bounded_bytes, first_line
from diffusion_jax.viz import page
from diffusion_jax.viz.report import report_page
from diffusion_jax.viz.run_files import MOST_CARD, MetricsFile, read_run

ADDRESS = '127.0.0.1'
REST = 10
"""Times as long as a page takes to make pass before the next: training needs the processors."""
_FILES = ('config', 'status', 'scores', 'versions')


class Made(NamedTuple):
  """A page, and its name among all pages."""

  text: bytes
  tag: str


class LivePage:
  """The newest page of a run directory, which need not be there yet; safe in threads."""

  def __init__(self, workdir: Path, clock: Callable[[], float] = time.monotonic):
    self._workdir, self._clock = Path(workdir), clock
    self._metrics = MetricsFile(self._workdir / 'metrics.jsonl')
    self._lock = threading.Lock()
    self._seen: object = None
    self._made = Made(b'', '')
    self._next = -float('inf')

  def __call__(self) -> Made:
    """Return the page, made anew if a file has changed and the last making was not just now."""
    with self._lock:
      start = self._clock()
      if start >= self._next and (seen := self._stamps()) != self._seen:
        text = self._text().encode(errors='replace')
        self._made = Made(text, f'"{hashlib.sha256(text).hexdigest()[:24]}"')
        self._seen = seen
        self._next = self._clock() + REST * (self._clock() - start)
      return self._made

  def _stamps(self) -> dict[str, tuple[int, int]]:
    """(time in ns, bytes) of each file that the page is made of."""
    found = {}
    names = [f'{name}.json' for name in _FILES] + ['metrics.jsonl', 'README.md', 'samples']
    for name in names:
      try:
        known = os.stat(self._workdir / name)
      except OSError:
        continue
      found[name] = known.st_mtime_ns, known.st_size
    return found

  def _text(self) -> str:
    try:
      return report_page(read_run(self._workdir, self._metrics), live=True)
    except UserError as error:
      why = str(error)
    except Exception as error:  # Whatever a run leaves behind, the server goes on.
      why = f'The page cannot be made now ({first_line(error)}).'
    words = f'<header><h1>{page.escape(self._workdir.name)}</h1></header>{page.LIVE}'
    return page.page(self._workdir.name, page.first_screen(
      f'{words}<p>{page.escape(why)}</p>', ''
    ))

  def card(self) -> bytes | None:
    """Return the model card, or None."""
    try:
      return bounded_bytes(self._workdir / 'README.md', MOST_CARD)
    except UserError:
      return None


def make_server(workdir: Path, port: int) -> ThreadingHTTPServer:
  """Return a server of a run's page on 127.0.0.1; port 0 takes a free one. UserError: taken."""
  live = LivePage(workdir)

  class Handler(_Handler):
    pages = live

  try:
    return ThreadingHTTPServer((ADDRESS, port), Handler)
  except (OSError, OverflowError) as error:
    raise UserError(
      f'--port {port} of {ADDRESS} cannot be had ({first_line(error)}); give another, or 0.'
    ) from error


class _Handler(BaseHTTPRequestHandler):
  """Two paths, no others: nothing of the address reaches the disk."""

  pages: LivePage
  protocol_version = 'HTTP/1.1'
  timeout = 30

  def do_GET(self) -> None:
    host = self.headers.get('Host', '').rpartition(':')[0]
    if host not in (ADDRESS, 'localhost'):  # A page elsewhere has given its name our address.
      self._send(403, b'')
    elif self.path == '/':
      made = self.pages()
      is_known = self.headers.get('If-None-Match') == made.tag
      self._send(304 if is_known else 200, b'' if is_known else made.text, tag=made.tag)
    elif self.path == '/README.md' and (card := self.pages.card()) is not None:
      self._send(200, card, 'text/plain')
    else:
      self._send(404, b'')

  def _send(self, code: int, text: bytes, kind: str = 'text/html', tag: str = '') -> None:
    self.send_response(code)
    if tag:
      self.send_header('ETag', tag)
    self.send_header('Content-Type', f'{kind}; charset=utf-8')
    self.send_header('Content-Length', str(len(text)))
    self.send_header('X-Content-Type-Options', 'nosniff')
    self.send_header('X-Frame-Options', 'DENY')
    self.send_header('Cache-Control', 'no-cache')
    self.end_headers()
    self.wfile.write(text)

  def log_message(self, *args) -> None:
    """Say nothing of requests, which come every two seconds."""
