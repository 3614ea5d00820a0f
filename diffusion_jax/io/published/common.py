"""Our configs <-> the config.json of diffusers and transformers: what all families share.

Reading accepts a key that is not ours only with the values under which the published network
computes what ours does; anything else is an error that names the key.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_jax.models.checks import require

ANY = object()  # The key has no effect on the network.


def ours(cls: type, values: Mapping[str, Any], accepted: Mapping[str, Any], where: str) -> Any:
  """A `cls` from those of `values` that are its fields, after judging all the others."""
  fields = {field.name for field in dataclasses.fields(cls)}
  for key, value in values.items():
    if key in fields or key.startswith('_') or value is None:
      continue
    require(
      key in accepted and (accepted[key] is ANY or accepted[key] == value),
      f'{where}: {key}={value!r} is not implemented'
      + (f' (only {accepted[key]!r} is).' if key in accepted else '; such a model cannot be read.'),
    )
  return cls(**{key: value for key, value in values.items() if key in fields})
