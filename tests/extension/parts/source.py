"""A source of data: images of one colour, 'plain:COUNT', with the colour as caption and label."""

import numpy as np

from diffusion_jax.registry import SOURCES, register

COLOURS = {'red': (220, 30, 30), 'green': (30, 160, 60), 'blue': (40, 60, 210)}


class Plain:
  """Records of so many images, size x size pixels."""

  def __init__(self, size, count):
    self.size, self.count = size, count
    self.labels = [list(COLOURS)[i % len(COLOURS)] for i in range(count)]

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    label = self.labels[range(self.count)[index]]
    image = np.broadcast_to(np.uint8(COLOURS[label]), (self.size, self.size, 3))
    return {'image': image, 'captions': [label, f'a {label} square'], 'label': label,
            'id': f'{index}'}


def open_plain(config):
  """(train, test) of a DataConfig."""
  count = int(config.dataset.partition(':')[2] or 64)
  return Plain(config.size, count), Plain(config.size, max(count // 2, 1))


register(SOURCES, 'plain', f'{__name__}:open_plain')
