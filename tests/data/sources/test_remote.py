"""Sources by URL, from servers of this machine: the same examples, and faults by name."""

import pickle

import numpy as np
import pytest

from diffusion_jax.__main__ import main
from diffusion_jax.data import storage
from diffusion_jax.data.unreadable import Counted, Damage, readable
from diffusion_jax.errors import UserError
from tests.data import kinds, remote

fsspec = pytest.importorskip('fsspec')
KINDS = {'tar': kinds.as_tar, 'parquet': kinds.as_parquet, 'records': kinds.as_records}
NEEDED = {'http': ['aiohttp'], 'gs': ['gcsfs'], 's3': ['s3fs', 'moto', 'flask', 'flask_cors']}


@pytest.fixture(scope='module')
def written(sources, tmp_path_factory):
  """(folder that is served, kind -> data.dataset of the files themselves)."""
  root, pictures = tmp_path_factory.mktemp('served'), kinds.openmoji(sources, 24)
  return root, {kind: write(root / 'bucket' / kind, pictures) for kind, write in KINDS.items()}


@pytest.fixture(scope='module')
def server(written):
  with remote.serving(written[0]) as server:
    yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
  monkeypatch.setattr(storage, '_PAUSES', (0.01, 0.01))
  monkeypatch.setenv('DIFFUSION_JAX_DATA', str(tmp_path / 'cache'))


@pytest.fixture
def root(request, written, server, monkeypatch):
  """The URL of the bucket on a server of that kind, which is found by the environment alone."""
  protocol = request.param
  for package in NEEDED[protocol]:
    pytest.importorskip(package)
  if protocol == 'http':
    yield f'{server.url}/bucket'
  elif protocol == 'gs':
    monkeypatch.setenv('STORAGE_EMULATOR_HOST', server.url)
    from gcsfs.core import GCSFileSystem  # What is experimental in others asks Google itself.

    fsspec.register_implementation('gs', GCSFileSystem, clobber=True)
    monkeypatch.setitem(fsspec.config.conf, 'gs', {'token': 'anon'})
    yield 'gs://bucket'
  else:
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    for key, value in {'ENDPOINT_URL': f'http://{host}:{port}', 'ACCESS_KEY_ID': 'a',
                       'SECRET_ACCESS_KEY': 'b', 'DEFAULT_REGION': 'us-east-1'}.items():
      monkeypatch.setenv(f'AWS_{key}', value)
    system = fsspec.filesystem('s3', skip_instance_cache=True)
    system.mkdir('bucket')
    for kind in KINDS:
      system.put(str(written[0] / 'bucket' / kind), f'bucket/{kind}', recursive=True)
    yield 's3://bucket'
    moto.stop()
  fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.mark.parametrize('root', NEEDED, indirect=True)
def test_the_same_examples_from_servers(written, root):
  for kind, local in written[1].items():
    url = f'{kind}:{root}/{kind}'
    for ours, theirs in zip(*(kinds.opened(each, test_fraction=0.3) for each in (url, local)),
                            strict=True):
      assert len(ours) == len(theirs)
      np.testing.assert_array_equal(ours.hashes(), theirs.hashes())
      for a, b in zip(pickle.loads(pickle.dumps(ours)), theirs, strict=True):
        assert (a['id'], a['captions']) == (b['id'], b['captions'])
        np.testing.assert_array_equal(a['image'], b['image'])
    with pytest.raises(UserError, match=f'{root}/none') as error:
      kinds.opened(f'{kind}:{root}/none')
    assert len(str(error.value).splitlines()) == 1
  one = kinds.opened(f'tar:{root}/tar/0001.tar', test_fraction=0)[0]
  several = kinds.opened(f'tar:{root}/tar/*.tar', test_fraction=0)[0]
  assert (len(one), len(several)) == (12, 24)
  for kind in ('folder', 'arrow'):
    with pytest.raises(UserError, match=rf'{kind}:{root}/x .*copy'):
      kinds.opened(f'{kind}:{root}/x', caption='x')


@pytest.fixture
def http(server):
  pytest.importorskip('aiohttp')
  yield f'{server.url}/bucket'
  server.faults, server.down = {}, {}


@pytest.mark.parametrize('kind', KINDS)
def test_faults_that_pass_change_nothing(http, server, written, kind):
  theirs = [*kinds.opened(written[1][kind], test_fraction=0)[0]]
  server.faults = {'': [None, 'cut', 'short', None, 'whole', 503, None, 500]}
  ours = kinds.opened(f'{kind}:{http}/{kind}', test_fraction=0)[0]
  for a, b in zip(ours, theirs, strict=True):
    assert a['id'] == b['id'] and (a['image'] == b['image']).all()
  assert not any(server.faults.values())


FIRST = {'tar': '0000.tar', 'parquet': 'data-00000.parquet',
         'records': 'train-00000-of-00002.array_record'}


@pytest.mark.parametrize('kind', KINDS)
def test_faults_that_stay_are_named(http, server, kind):
  """One sentence where nothing can be opened, a bad record of a cause where one cannot be read."""
  url = f'{kind}:{http}/{kind}'
  server.down = {f'/{kind}': 503}
  with pytest.raises(UserError, match=rf'{http}/{kind}.* cannot be listed \(.*503') as error:
    kinds.opened(url, test_fraction=0)
  assert len(str(error.value).splitlines()) == 1
  server.down = {}
  source, damage = kinds.opened(url, test_fraction=0)[0], Damage()
  server.down = {FIRST[kind]: 503}
  good = [*readable(Counted(source, 1.0, damage, 'records'))]
  assert len(good) == 12 and damage.causes == {'not readable': 12}
  assert all('503' in text for text in damage.sentences), damage.sentences
  server.down = {}
  assert len([*readable(source)]) == 24  # Nothing of it was kept.


def test_an_archive_that_cannot_be_indexed_is_no_damaged_one(http, server):
  for fault in ('cut', 'short', 404):
    server.faults = {'0001.tar': [fault] * 3}
    with pytest.raises(UserError, match=r'0001\.tar cannot be read'):
      kinds.opened(f'tar:{http}/tar', test_fraction=0)
  server.faults = {}
  assert len([*kinds.opened(f'tar:{http}/tar', test_fraction=0)[0]]) == 24


def test_prepare_reads_by_url_and_writes_to_disk_alone(http, tmp_path, capsys):
  out = tmp_path / 'set'
  options = ('--test_fraction', '0', '--workers', '1')
  assert main(['prepare', '--source', f'tar:{http}/tar', '--out', str(out), *options]) == 0
  ours, theirs = (kinds.opened(each, test_fraction=0)[0]
                  for each in (f'records:{out}', f'tar:{http}/tar'))
  assert all(a['id'] == b['id'] and (a['image'] == b['image']).all()
             for a, b in zip(ours, theirs, strict=True))
  assert main(['prepare', '--source', f'tar:{http}/tar', '--out', 's3://bucket/x', *options]) == 2
  assert '--out is s3://bucket/x; give a folder' in capsys.readouterr().err.splitlines()[-1]
