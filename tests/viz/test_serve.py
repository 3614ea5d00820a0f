"""The live page over HTTP: what it serves, to whom, and how often it is made."""

import contextlib
import http.client
import json
import threading

import pytest

from diffusion_jax.cli import report
from diffusion_jax.errors import UserError
from diffusion_jax.viz import serve
from diffusion_jax.viz.page import LIVE
from diffusion_jax.viz.serve import LivePage, make_server


def write(workdir, *steps):
  workdir.mkdir(exist_ok=True)
  with (workdir / 'metrics.jsonl').open('a') as file:
    for step in steps:
      file.write(json.dumps({'kind': 'train', 'step': step, 'time': 1.0, 'loss': 2.0}) + '\n')


@contextlib.contextmanager
def serving(workdir):
  """get(path, **headers): (status, headers, text) of a server of the run."""
  with make_server(workdir, 0) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()

    def get(path='/', **headers):
      connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=20)
      named = {name.replace('_', '-'): value for name, value in headers.items()}
      connection.request('GET', path, headers=named)
      with connection.getresponse() as answer:
        found = answer.status, dict(answer.headers), answer.read().decode()
      connection.close()
      return found

    assert server.server_address[0] == '127.0.0.1'
    try:
      yield get
    finally:
      server.shutdown()
      thread.join()


def test_the_page_is_served_anew_when_the_run_has_written(tmp_path, monkeypatch):
  monkeypatch.setattr(serve, 'REST', 0)
  workdir = tmp_path / 'run'
  with serving(workdir) as get:
    status, before, text = get()
    assert status == 200 and 'There is no run directory' in text and LIVE in text
    write(workdir, 1, 2)
    status, first, text = get(If_None_Match=before['ETag'])
    assert status == 200 and '<dt>Step</dt><dd>2</dd>' in text and "connect-src 'self'" in text
    assert get(If_None_Match=first['ETag'])[::2] == (304, '')
    write(workdir, 3)
    status, second, text = get(If_None_Match=first['ETag'])
    assert status == 200 and '<dt>Step</dt><dd>3</dd>' in text and second['ETag'] != first['ETag']
    with (workdir / 'metrics.jsonl').open('a') as file:
      file.write('{"kind": "train", "st')
    assert '1 line of metrics.jsonl could not be read' in get()[2]
    (workdir / 'status.json').write_text('{')
    assert 'status.json is not readable' in get()[2]
    monkeypatch.setattr(serve, 'report_page', lambda *_, **__: 1 / 0)
    write(workdir, 4)
    (workdir / 'status.json').unlink()
    assert 'The page cannot be made now (division by zero)' in get()[2]


def test_nothing_else_is_served_and_to_nobody_else(tmp_path):
  workdir = tmp_path / 'run'
  write(workdir, 1)
  (workdir / 'config.json').write_text('{"secret": 1}')
  with serving(workdir) as get:
    assert get('/README.md')[0] == 404
    (workdir / 'README.md').write_text('# <b>Card')
    status, headers, text = get('/README.md')
    assert (status, text) == (200, '# <b>Card') and headers['Content-Type'].startswith('text/plain')
    for path in ('/config.json', '/../run/config.json', '/%2e%2e/x', '/README.md/..'):
      assert get(path)[::2] == (404, ''), path
    # Another site's name that leads here is that site's, not this machine's.
    assert get(Host='evil.example:80')[::2] == (403, '')
    assert get(Host='localhost:80')[0] == 200


def test_a_page_is_not_made_more_often_than_it_may(tmp_path, monkeypatch):
  now, made = [0.0], []
  monkeypatch.setattr(serve, 'read_run', lambda *_: made.append(now[0]))

  def slow(run, live):
    now[0] += 3.0
    return f'{len(made)}'

  monkeypatch.setattr(serve, 'report_page', slow)
  live = LivePage(tmp_path, clock=lambda: now[0])
  assert live().text == live().text == b'1'
  for later, text in ((29.0, b'1'), (2.0, b'2'), (100.0, b'2')):
    if later < 100:
      (tmp_path / 'status.json').write_text('{}' + ' ' * int(later))
    now[0] += later
    assert live().text == text
  assert made == [0.0, 34.0]


def test_a_port_that_is_taken_is_named_and_options_fit(tmp_path):
  with make_server(tmp_path, 0) as server, pytest.raises(UserError, match=r'--port \d+ of 127'):
    make_server(tmp_path, server.server_port)
  with pytest.raises(UserError, match='--compare'):
    report.Options('a', compare='b', serve=True)
  with pytest.raises(UserError, match='--port'):
    report.Options('a', port=1)
