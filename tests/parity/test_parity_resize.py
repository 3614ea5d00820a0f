"""Each resize rule against the tool that it is named after, or a loop that does the same."""

from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors.resize import (
  OF_INCEPTION,
  RULES,
  prepare,
  resize,
  resize_on_host,
  rule,
)
from tests.evaluation.golden import record_resize
from tests.parity.reference import resizers

# 2.4e-3 on 0-255 is what bicubic products cost in float32; the others are far nearer.
TOLERANCE = {'tensorflow': 2e-4, 'pytorch': 2e-4, 'clean': 2.4e-3, 'pillow': 0}


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize(('old', 'new'), [
  ((32, 32), (299, 299)), ((300, 451), (299, 299)), ((512, 96), (299, 299)), ((64, 48), (64, 75)),
  ((598, 2), (299, 299)), ((1, 7), (5, 3)),
])
def test_against_its_tool(name, old, new):
  images = np.random.default_rng(0).integers(0, 256, (2, *old, 3), np.uint8)
  images[1] = np.indices(old).sum(0)[..., None] % 2 * 255  # Nothing is harder than a chessboard.
  found = np.asarray(jax.jit(lambda x: resize(x, new, name))(images))
  assert found.shape == (2, *new, 3) and found.dtype == np.float32
  np.testing.assert_allclose(
    found, getattr(resizers, name)(images, *new), rtol=0, atol=TOLERANCE[name]
  )


@pytest.mark.parametrize('size', record_resize.SIZES)
def test_tensorflow_against_torch_fidelity(size):
  """Its figures are in a file; record_resize.py says how they were made."""
  with np.load(Path(record_resize.__file__).with_name('resize.npz')) as file:
    wanted = file['x'.join(map(str, size))]
  assert wanted.shape == (23, 23, 3) and wanted.std() > 20
  every = record_resize.EVERY
  found = resize(record_resize.draw(size), record_resize.OUT, 'tensorflow')[0, ::every, ::every]
  np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize('old', [(1, 1), (7, 1200), (511, 300), (2000, 37), (448, 112), (225, 223)])
def test_whole_numbers_are_those_of_pillow(old):
  """Bit for bit, on the device and on the host, where a sum lies half between two as well."""
  rng = np.random.default_rng(old)
  images = np.stack([
    rng.integers(0, 256, (*old, 3), np.uint8), rng.integers(0, 2, (*old, 3), np.uint8) * 255
  ])
  wanted = resizers.pillow(images, 224, 224)
  np.testing.assert_array_equal(resize(images, 224, 'pillow'), wanted)
  hosts = resize_on_host(images[0], 224, 'pillow')
  np.testing.assert_array_equal(hosts, wanted[0])
  assert hosts.dtype == np.float32


@pytest.mark.parametrize('name', RULES)
def test_the_same_size_stays_as_it_is(name):
  images = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 3), np.uint8)
  np.testing.assert_array_equal(resize(images, 9, name), images)


def test_what_overshoots_is_cut():
  images = np.zeros((1, 8, 8, 1), np.uint8)
  images[:, 4:] = 255
  raw = RULES['clean'].matrix(8, 32).astype(np.float32) @ images[0, :, :, 0].astype(np.float32)
  assert raw.min() < -5 and raw.max() > 260
  found = np.asarray(resize(images, 32, 'clean'))
  assert found.min() == 0 and found.max() == 255


def test_each_normalizes_as_its_tool_does():
  ends = np.array([0, 128, 255], np.uint8).reshape(1, 1, 3, 1).repeat(3, 1)
  shown = {name: np.asarray(prepare(ends, 3, name))[0, 0, :, 0] for name in OF_INCEPTION}
  np.testing.assert_array_equal(shown['tensorflow'], [-1, 0, 127 / 128])
  np.testing.assert_array_equal(shown['clean'], [-1, 0, 127 / 128])
  np.testing.assert_allclose(shown['pytorch'], [-1, 1 / 255, 1], atol=1e-7)


def test_another_name():
  with pytest.raises(UserError, match='no resize rule \'lanczos\'; choose of tensorflow, pytorch'):
    rule('lanczos')
