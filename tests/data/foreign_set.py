"""A prepared data set of somebody else's, with every kind of feature that TFDS writes without
TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 10, 3), np.uint8)


def _png(pixels):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'png')
  buffer.seek(0)
  return buffer


class ForeignSet(tfds.core.GeneratorBasedBuilder):
  """Five images with labels, boxes, texts, lists, and a second image."""

  VERSION = tfds.core.Version('1.0.0')
  code_path = epath.Path(__file__)  # As in our own builder.

  def _info(self):
    f = tfds.features
    return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict({
      'image': f.Image(shape=(None, None, 3), encoding_format='png'),
      'mask': f.Image(shape=(8, 10, 1), encoding_format='png'),
      'label': f.ClassLabel(names=['cat', 'fox']),
      'box': f.BBoxFeature(),
      'score': f.Scalar(np.float32),
      'text': f.Text(),
      'titles': f.Translation(['de', 'en']),
      'words': f.Sequence(f.Text()),
      'objects': f.Sequence({'name': f.Text(), 'box': f.BBoxFeature()}),
      'nested': {'type': f.Tensor(shape=(2,), dtype=np.int64), 'inner': {'id': f.Text()}},
    }))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(range(3)), 'test': self._generate_examples([3, 4])}

  def _generate_examples(self, numbers):
    box = tfds.features.BBox(0.1, 0.2, 0.3, 0.4)
    for i in numbers:
      yield i, {
        'image': _png(IMAGES[i]), 'mask': _png(IMAGES[i, ..., 0]), 'label': i % 2, 'box': box,
        'score': i / 2, 'text': f'picture {i}', 'titles': {'de': 'Fuchs', 'en': 'fox'},
        'words': ['a'] * i,
        'objects': [{'name': 'x', 'box': box}] * i,
        'nested': {'type': [i, i], 'inner': {'id': str(i)}},
      }


def write_foreign_set(root):
  """The folder of the data set, below `root`."""
  tfds.disable_progress_bar()
  builder = ForeignSet(data_dir=str(root), file_format='array_record')
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(
    try_download_gcs=False
  ))
  return builder.data_dir
