"""The interface of bottlenecks: what an autoencoder's latents go through while it is trained."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import require
from diffusion_jax.models.autoencoder import AutoencoderConfig, AutoencoderKLConfig
from diffusion_jax.train.meter import Metrics, mean_metric
from diffusion_jax.types import Images, Params, PerExample

Carry = dict[str, jax.Array]


class Passed(NamedTuple):
  """What came out of a bottleneck: images, float32, its own loss [b], with its weight; observed: a
  pytree of arrays [b ...] that `next_carry` is given."""

  output: Images
  loss: PerExample
  metrics: Metrics
  observed: Any = ()


class Bottleneck(abc.ABC):
  """A row of `registry.BOTTLENECKS`: a frozen dataclass of its settings."""

  title: ClassVar[str]
  """Name of the autoencoder, for a model card."""
  network: ClassVar[type]
  """Class of the autoencoder, a module of the config of `config`."""

  @abc.abstractmethod
  def config(self, shape: AutoencoderKLConfig) -> AutoencoderConfig:
    """Return the network's config; `shape`: of the settings, which has a KL autoencoder's keys."""

  @abc.abstractmethod
  def __call__(
    self, model: Any, images: Images, carry: Carry, key: jax.Array, step: jax.Array
  ) -> Passed:
    """Images [b h w 3] in [-1, 1] through the autoencoder; pure."""

  def initialize(self, params: Params) -> Params:
    """Return parameters to begin with, of fresh ones."""
    return params

  def carry(self, config: AutoencoderConfig) -> Carry:
    """Return what training begins to carry beside the parameters."""
    del config
    return {}

  def next_carry(self, carry: Carry, observed: Any) -> Carry:
    """Return the carry after a step on these examples of the global batch; pure."""
    del observed
    return carry

  def constrain(self, params: Params, carry: Carry) -> Params:
    """Return the autoencoder's parameters after an update, given the carry after it; pure."""
    del carry
    return params


def config_of(cls: type, shape: AutoencoderKLConfig, **more: Any) -> Any:
  """Return a config of `cls` with the fields that all autoencoders have, and `more`.

  UserError: a field of a KL autoencoder alone is set.
  """
  common = {field.name for field in dataclasses.fields(AutoencoderConfig)}
  for field in dataclasses.fields(shape):
    require(
      field.name in common or getattr(shape, field.name) == field.default,
      f'settings.autoencoder.{field.name} has no effect with another settings.bottleneck than kl '
      'or plain; leave it out.',
    )
  return cls(**{name: getattr(shape, name) for name in sorted(common)} | more)


def code_metrics(indices: jax.Array, vocabulary: int) -> Mapping[str, Any]:
  """Return metrics of the codes [b h w] of a batch, of what `usage` returns."""
  used, perplexity = usage(jnp.zeros(vocabulary).at[indices].add(1.0))
  return {'codes_used': mean_metric(used), 'code_perplexity': mean_metric(perplexity)}


def usage(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Counts of codes [n] -> (fraction that occurs, perplexity: 2 to the entropy in bits)."""
  fractions = counts / counts.sum()
  entropy = -(fractions * jnp.log(jnp.maximum(fractions, 1e-30))).sum()
  return (counts > 0).mean(), jnp.exp(entropy)


def annealed(start: float, end: float, steps: int, step: jax.Array) -> jax.Array:
  """Return a value that goes from `start` to `end` in so many steps, by half a cosine; 0: at once.
  """
  if not steps:
    return jnp.float32(end)
  way = jnp.minimum(step / steps, 1.0)
  return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * way))


def warmed(weight: float, steps: int, step: jax.Array) -> jax.Array | float:
  """Return a weight that grows linearly from 0 in so many steps (Bowman et al. 2016, sec. 3.1)."""
  grown = jnp.minimum(step / max(steps, 1), 1.0)
  return weight * (grown if steps else 1.0)
