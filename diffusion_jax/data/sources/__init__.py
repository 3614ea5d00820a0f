"""Sources of records, opened by the name in `data.dataset`: 'KIND' or 'KIND:REST'.

A source has `len()` and records by number: dictionaries with 'image', uint8 [h w 3], and what
transforms and the task need: 'captions', a list of texts, 'label', 'id'; damaged ones raise
`Unreadable`. Optional: what else `pictures.PictureSource` has; `fingerprint()`, hashes that change
with the data; `labels` of all records; `measured` (`data.splits.Measured`), `notes` and `credit`,
sentences; `kind(index)`, the numbers of records that may take a record's place.
"""

import dataclasses
from typing import Any

from diffusion_jax.config import WHITE, DataConfig
from diffusion_jax.data.decoding import Decoders
from diffusion_jax.errors import UserError
from diffusion_jax.registry import LABELLED, SOURCES, load


def open_data(config: DataConfig, synthetic: int = 0, labels_for: str = '') -> tuple[Any, Any]:
  """(train, test) that a `DataConfig` names, or `synthetic` random images in their place.

  labels_for: what needs labels, for errors; captions are then the labels. UserError: an unknown
  name, or data that are missing or unreadable.
  """
  if synthetic:
    from diffusion_jax.data.sources.arrays import SyntheticImages

    images = SyntheticImages(config.shapes, synthetic)
    return images, images
  if config.mixture:
    return _open_mixture(config, labels_for)
  kind = config.dataset.partition(':')[0]
  if labels_for and kind in LABELLED:
    without_effect(config, labels_for, 'caption', 'caption_column')
    return _read_by(load(LABELLED, kind)(config), config)
  sources = _read_by(load(SOURCES, kind, 'data.dataset')(config), config)
  if not labels_for:
    return sources
  # A source that others have written may have labels without knowing how to go without.
  return tuple(
    each.labelled(labels_for) if hasattr(each, 'labelled') else each for each in sources
  )


def _read_by(sources: tuple[Any, Any], config: DataConfig) -> tuple[Any, Any]:
  """Sources with the background and the processes of a config. UserError: they decode nothing."""
  for key, usual in (('background', WHITE), ('processes', 0)):
    if getattr(config, key) != usual and not all(hasattr(each, 'read_by') for each in sources):
      raise UserError(
        f'data.{key} has no effect on {config.dataset}, whose pictures are no files; leave it at '
        f'{usual}.'
      )
  if config.background == WHITE and not config.processes:
    return sources
  decoders = Decoders(config.processes) if config.processes else None
  train, test = (each.read_by(config.background, decoders) for each in sources)
  return train, test


def _open_mixture(config: DataConfig, labels_for: str) -> tuple[Any, Any]:
  """(train, test) of `data.mixture`; test: of all parts, or of data.test_of alone."""
  from diffusion_jax.data.mixture import Mixture, Worded

  splits: tuple[dict[str, Any], dict[str, Any]] = {}, {}
  for name, part in config.mixture.items():
    sources = open_data(dataclasses.replace(config, **part.of_data()), labels_for=labels_for)
    for split, source in zip(splits, sources, strict=True):
      worded = part.prefix or part.suffix
      split[name] = Worded(source, part.prefix, part.suffix) if worded else source
  train, test = splits
  if config.test_of:
    return Mixture(train, config.mixture), test[config.test_of]
  return Mixture(train, config.mixture), Mixture(test)


def without_effect(config: DataConfig, what: str, *names: str) -> None:
  """Raise UserError where keys of a `DataConfig` that do nothing for `what` have been set."""
  for field in dataclasses.fields(config):
    if field.name in names and getattr(config, field.name) != field.default:
      raise UserError(f'data.{field.name} has no effect on {what}; leave it at {field.default!r}.')


def square_of(config: DataConfig) -> int:
  """Return `data.size`, one number, for data of which there is nothing oblong. UserError for two.
  """
  if not isinstance(config.size, int):
    raise UserError(
      f'data.size is {config.size}, but {config.dataset} has one size; give one number, or a '
      'folder of pictures.'
    )
  return config.size


OF_FOLDERS = ('caption', 'caption_column', 'test_fraction')
"""Keys of a `DataConfig` that concern pictures of one's own alone."""
