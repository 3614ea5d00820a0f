"""Reconstructions of an autoencoder, and how like the originals they are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from diffusion_jax.backend.xla import jit
from diffusion_jax.data.unreadable import first_readable
from diffusion_jax.evaluation.comparison import Column, Work
from diffusion_jax.evaluation.evaluator import EVALUATE, SAMPLE, TEST, Cached, Picture, Value, named
from diffusion_jax.evaluation.extract import reader
from diffusion_jax.evaluation.images import ImageSet
from diffusion_jax.evaluation.metrics.images import l1_of_each, psnr_of_each, ssim_of_each
from diffusion_jax.evaluation.pieces import Made
from diffusion_jax.formats.networks import load_lpips
from diffusion_jax.models.network import Network
from diffusion_jax.models.perceptual import lpips as lpips_of_each
from diffusion_jax.parallel.mesh import in_batches, put_params, to_host
from diffusion_jax.pipelines.spaces import latent_moments
from diffusion_jax.pixels import to_float, to_uint8
from diffusion_jax.types import Params, Source

PAIR_METRICS: Mapping[str, Callable] = {
  'psnr': psnr_of_each, 'ssim': ssim_of_each, 'l1': l1_of_each,
}
BATCH = 32


def reconstructor(network: Network, mesh: Mesh, batch_size: int = BATCH) -> Callable:
  """(parameters on the mesh, uint8 [n h w 3]) -> reconstructions without randomness, uint8.

  UserError where h or w is no multiple of the network's factor.
  """

  @jit
  def run(params: Params, images: jax.Array) -> jax.Array:
    return network.bind(params).reconstruct(to_float(images)).astype(jnp.float32)

  def reconstruct(params: Params, images: np.ndarray) -> np.ndarray:
    batches = in_batches(run, params, images, mesh=mesh, batch_size=batch_size)
    return np.concatenate([to_uint8(batch) for batch in batches])

  return reconstruct


def compare_pairs(
  originals: UInt8[np.ndarray, 'n h w 3'], outputs: UInt8[np.ndarray, 'n h w 3'],
  names: Sequence[str],
) -> dict[str, Float[np.ndarray, 'n']]:
  """Return metrics of each pair: PSNR in dB, SSIM up to 1, L1 of values in [-1, 1]."""
  x, y = (to_float(images, np.float64) for images in (originals, outputs))
  return {name: PAIR_METRICS[name](y, x) for name in names}


def perceptual(params: Params, mesh: Mesh, batch_size: int = BATCH) -> Callable:
  """Return (originals, reconstructions), uint8 [n h w 3] -> LPIPS [n]; params on the mesh."""
  run = jit(lambda params, a, b: lpips_of_each(params, to_float(a), to_float(b)))

  def distances(originals: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return np.concatenate(list(
      in_batches(run, params, outputs, originals, mesh=mesh, batch_size=batch_size)
    ))

  return distances


def of_autoencoder(
  reconstruct: Callable, params: Callable[[], Params], name: str, images: ImageSet,
  metrics: Sequence[str] = tuple(PAIR_METRICS), distances: Callable | None = None,
  weights: str = '',
) -> Work:
  """The work of encoding and decoding a set of images of one size.

  Args:
    reconstruct: of `reconstructor`; params: gives them on its mesh; first called by all processes
      together, when there is something to do.
    name: of the autoencoder with its weights, such as a run and its step.
    metrics: of PAIR_METRICS, kept for each image.
    distances: of `perceptual`, whose LPIPS is kept, too; weights: identity of its weights.
  """
  read = reader(images)
  every = (*metrics, *(['lpips'] if distances else []))

  def make(items: range) -> Made:
    found, errors, _ = read(items)
    there = [i for i, image in enumerate(found) if image is not None]
    made: list = [None] * len(found)
    each = {name: np.full(len(found), np.nan) for name in every}
    if there:
      originals = np.stack([found[i] for i in there])
      outputs = reconstruct(params(), originals)
      values = compare_pairs(originals, outputs, metrics)
      if distances:
        values['lpips'] = distances(originals, outputs)
      for place, i in enumerate(there):
        made[i] = outputs[place]
      for name in every:
        each[name][there] = values[name]
    return Made(made, errors, each)

  plan = {'model': name, 'images': images.name, 'files': images.stamp, 'lpips': weights}
  return Work(len(images), plan, make, params, every)


def columns(
  network: Network, params: Callable[[], Params], name: str, originals: ImageSet, mesh: Mesh,
  batch_size: int, lpips: str = '',
) -> dict[str, Column]:
  """'reconstructed' and 'untrained', of an autoencoder and of one with fresh parameters.

  params: host arrays, read at first use; lpips: file of weights, '' for none.
  """
  reconstruct = reconstructor(network, mesh, batch_size)
  distances = perceptual(put_params(load_lpips(lpips), mesh), mesh, batch_size) if lpips else None
  fresh = lambda: to_host(jax.jit(network.initialize)(jax.random.key(1)))
  # All metrics whatever is asked for, so that a second start may ask for more.
  column = lambda name, params, keep: Column(of_autoencoder(
    reconstruct, functools.cache(lambda: put_params(params(), mesh)), name, originals,
    distances=distances, weights=lpips,
  ), keep=keep)
  return {
    'reconstructed': column(name, params, True),
    'untrained': column(f'untrained {name}', fresh, False),
  }


@dataclasses.dataclass(frozen=True, eq=False)
class ReconstructionPreview(Cached):
  """Test images, each with its reconstruction."""

  test: Source
  mesh: Mesh
  name = 'reconstruction_preview'
  when = SAMPLE
  about = 'Test images with their captions, each beside its reconstruction.'

  def run(self, model: Network, params: Params, key) -> Iterator[tuple[str, Value]]:
    records = first_readable(self.test, 16)
    images = np.stack([record['image'] for record in records])
    outputs = self.reconstruct(model, params, images)
    pairs = np.stack([images, outputs], axis=1).reshape(-1, *images.shape[1:])
    captions = [text for r in records for text in (r['captions'][0], 'reconstruction')]
    yield 'samples', Picture(pairs, captions, self.about)

  def reconstruct(self, model: Network, params: Params, images: np.ndarray) -> np.ndarray:
    """A `reconstructor`, compiled once."""
    return self.once('reconstruct', lambda: reconstructor(model, self.mesh))(params, images)


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction(ReconstructionPreview):
  """PSNR in dB of reconstructed test images, L1 in [-1, 1], and the latents' moments, or how many
  of the codes are used and the perplexity of their use."""

  samples: int = 256
  name = 'reconstruction'
  when = EVALUATE

  def run(self, model: Network, params: Params, key) -> Iterator[tuple[str, Value]]:
    images = np.stack([record['image'] for record in first_readable(self.test, self.samples)])
    values = compare_pairs(images, self.reconstruct(model, params, images), ('psnr', 'l1'))
    scores = {name: float(each.mean()) for name, each in values.items()}
    if hasattr(model.config, 'vocabulary'):
      scores |= code_usage(model, params, images, self.mesh)
    else:
      mean, deviation = latent_moments(model, params, images, self.mesh)
      scores |= {'latent_mean': mean, 'latent_std': deviation}
    yield from named({TEST: scores | {'images': float(len(images))}})


def code_usage(
  network: Network, params: Params, images: UInt8[np.ndarray, 'n h w 3'], mesh: Mesh
) -> dict[str, float]:
  """Return the fraction of the codes that the images use, and the perplexity of their use: 2 to the
  entropy in bits, at most the number of codes."""
  run = jit(lambda params, images: network.bind(params).encode_indices(to_float(images)))
  indices = np.concatenate(list(in_batches(run, params, images, mesh=mesh)))
  counts = np.bincount(indices.ravel(), minlength=network.config.vocabulary)
  fractions = counts[counts > 0] / counts.sum()
  return {
    'codes_used': float((counts > 0).mean()),
    'code_perplexity': float(np.exp(-(fractions * np.log(fractions)).sum())),
  }
