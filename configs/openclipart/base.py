"""What these recipes share: drawings of the Open Clip Art Library; see docs/pictures.md."""

from ml_collections import ConfigDict

AUTOENCODER, CLIP = 'runs/openclipart-autoencoder/model', 'runs/openclipart-clip/model'
"""Where the first two recipes leave what the third one takes."""
CAPTIONS = (
  'bird, animals birds', 'horse, animals mammals horses', 'cat, animals mammals cats',
  'flag, signs and symbols flags', 'arrow, shapes arrows',
  'star 12 points step 05, shapes stars',
  'apple, food fruit', 'cup of coffee, food', 'flower, plants flowers', 'tree, plants',
  'house, buildings', 'car, transportation', 'folder, computer icons', 'hammer, tools',
  'playing card, recreation games cards', 'woman, people',
)


def with_drawings(config: ConfigDict) -> ConfigDict:
  """Return a recipe of OpenMoji with these drawings as its data, at the same 64 pixels."""
  config.data.update({'dataset': 'records:data/openclipart', 'prepare': False})
  return config
