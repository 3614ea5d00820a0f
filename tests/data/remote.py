"""A server of a folder: plain files with ranges and listings, and what gcsfs asks of Google's JSON
API; with faults when they are ordered."""

import contextlib
import hashlib
import html
import http.server
import json
import threading
import urllib.parse
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    path = url.path
    fault = next((status for word, status in self.server.down.items() if word in path), None)
    if fault is None and self.headers.get('Range'):
      known = (faults for word, faults in self.server.faults.items() if word in path and faults)
      fault = next((faults.pop(0) for faults in known), None)
    if isinstance(fault, int):
      return self._send(b'no', fault)
    for start in ('/download/storage/v1/b/', '/storage/v1/b/'):
      if path.startswith(start):
        bucket, _, name = path.removeprefix(start).partition('/o')
        name = urllib.parse.unquote(name.removeprefix('/'))
        if 'download' in start or query.get('alt') == 'media':
          return self._file(self.server.root / bucket / name, fault)
        return self._json(bucket, name, query)
    place = self.server.root / urllib.parse.unquote(path).strip('/')
    if place.is_dir():
      links = ''.join(f'<a href="{html.escape(each.name)}{"/" * each.is_dir()}">.</a>\n'
                      for each in sorted(place.iterdir()))
      return self._send(links.encode(), kind='text/html')
    return self._file(place, fault)

  def _json(self, bucket, name, query):
    root = self.server.root / bucket
    if name:
      place = root / name
      found = self._about(bucket, place) if place.is_file() else None
      return self._send(json.dumps(found or {}).encode(), 200 if found else 404)
    prefix, items, prefixes = query.get('prefix', ''), [], set()
    for place in sorted(path for path in root.rglob('*') if path.is_file()):
      key = place.relative_to(root).as_posix()
      if key.startswith(prefix):
        rest = key.removeprefix(prefix)
        if query.get('delimiter') and '/' in rest:
          prefixes.add(prefix + rest.partition('/')[0] + '/')
        else:
          items.append(self._about(bucket, place))
    self._send(json.dumps({'items': items, 'prefixes': sorted(prefixes)}).encode())

  def _about(self, bucket, place):
    data = place.read_bytes()
    return {'name': place.relative_to(self.server.root / bucket).as_posix(), 'bucket': bucket,
            'size': str(len(data)), 'md5Hash': hashlib.md5(data).hexdigest(),
            'generation': '1', 'kind': 'storage#object'}

  def _file(self, place, fault):
    if not place.is_file():
      return self._send(b'none', 404)
    data, status, more = place.read_bytes(), 200, {}
    if (wanted := self.headers.get('Range')) and fault != 'whole':
      first, _, last = wanted.removeprefix('bytes=').partition('-')
      first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
      if first > last:
        return self._send(b'', 416)
      more['Content-Range'] = f'bytes {first}-{last}/{len(data)}'
      data, status = data[first : last + 1], 206
    if fault == 'short':
      data = data[: len(data) // 2]
    self._send(data, status, cut=fault == 'cut', **more)

  def _send(self, data, status=200, kind='application/octet-stream', cut=False, **more):
    self.send_response(status)
    for key, value in {'Content-Type': kind, 'Content-Length': len(data), 'ETag': f'"{len(data)}"',
                       'Accept-Ranges': 'bytes', **more}.items():
      self.send_header(key, str(value))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(data[: len(data) // 2] if cut else data)
    self.close_connection |= cut


@contextlib.contextmanager
def serving(root: Path):
  """The server; server.url.

  server.faults: word of a path -> a status, 'cut', 'short', 'whole' or None for each request of a
  part in turn. server.down: word of a path -> the status of all requests.
  """
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.root, server.faults, server.down = root, {}, {}
  server.url = f'http://127.0.0.1:{server.server_address[1]}'
  thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
