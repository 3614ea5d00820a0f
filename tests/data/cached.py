"""What tests of caches share: encoders as small as can be, pictures, and a cache of them."""

import types

import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax.data.cache import Options, cached_source
from diffusion_jax.errors import Unreadable
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.spaces import PixelSpace
from tests import tiny

COUNT, EDGE, A_FILE = 11, 8, 4


class Letters:
  """A text encoder: how often each letter is in a caption, and its length."""

  networks, kept, random = types.MappingProxyType({}), ('text', 'mask'), False

  def tokens(self, captions):
    texts = [caption.encode()[:20].ljust(20) for caption in captions]
    return np.array([list(text) for text in texts], np.int32)

  def encode(self, weights, rows):
    tokens = rows['tokens']
    return {'text': jnp.sin(tokens[..., None] * jnp.arange(1.0, 4.0)), 'mask': tokens % 2}


class Factor(PixelSpace):
  """Pixels times a weight."""

  networks = types.MappingProxyType({'factor': None})

  def encode(self, weights, examples):
    return super().encode(weights, examples) * weights['factor']['bias']


def model_of(space=None):
  text = Letters()
  return types.SimpleNamespace(
    space=space or Factor(), text=text, conditioners={'text': text}
  )


def write_picture(folder, number, size=(EDGE, EDGE), caption=''):
  rng = np.random.default_rng(number)
  Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f'{number:03}.png')
  text = caption or f'picture {number}\nnumber {number}'
  (folder / f'{number:03}.txt').write_text(text)


def source_of(folder, size=EDGE):
  return tiny.folder_sources(folder, size, test_fraction=0)[0]


def fill(source, cache, model=None, factor=1.0, name='folder:x', **options):
  null = {'text': np.zeros((20, 3), np.float32), 'mask': np.zeros(20, np.int32)}
  with tiny.few_devices():
    return cached_source(
      source, model or model_of(), {'factor': {'bias': np.float32([factor])}},
      make_mesh(MeshConfig()), progress=False, folder=cache, name=name, null=null,
      options=Options(**options),
    )


def values(cache):
  """All arrays of all records; a text where a record cannot be read."""
  found = []
  for i in range(len(cache)):
    try:
      found.append({kind: [dict(part) for part in parts] for kind, parts in cache[i].items()})
    except Unreadable as error:
      found.append(str(error))
  return found


def assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(values(one), values(other), strict=True):
    assert type(a) is type(b)
    if isinstance(a, str):
      assert a == b
      continue
    assert a.keys() == b.keys()
    for kind, parts in a.items():
      assert len(parts) == len(b[kind])
      for x, y in zip(parts, b[kind], strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
          assert value.dtype == y[name].dtype
          np.testing.assert_array_equal(value, y[name])


def records_in(cache):
  """The files with rows, and the manifest; not the dates of files."""
  return {name: data for name, data in tiny.snapshot(cache).items() if 'checked' not in name}
