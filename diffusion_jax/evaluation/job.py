"""Scores a text-to-image model on the captions of the test split."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.data.sources import ImageSource
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.features import CLIPFeatures, load_features
from diffusion_jax.evaluation.scores import Compared, score
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.parallel.sharding import put_params, to_host
from diffusion_jax.pipelines.text_to_image import SampleConfig, TextToImage
from diffusion_jax.types import Record, Weights

MINIMUM = 16
DRAW_BATCH = 32
METRICS = ('fd', 'kid', 'clip_score', 'retrieval')


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What every evaluation of one model shares: the reference, computed once.

  The reference of fd_clip and kid_clip are the images of the training split, so that real test
  images have a value of their own: the floor that a perfect model could reach.
  """

  model: TextToImage
  features: CLIPFeatures
  mesh: Mesh
  reference: np.ndarray
  captions: list[str]
  real: np.ndarray
  texts: np.ndarray

  @classmethod
  def prepare(
    cls, model: TextToImage, clip: str, train: ImageSource, test: ImageSource, *, mesh: Mesh
  ) -> 'Evaluation':
    """Embeds the real images of both splits and the test captions by the CLIP at a path."""
    features = load_features(clip, mesh)
    records = shuffled(test, len(test))
    images = np.stack([train[i]['image'] for i in range(len(train))])
    captions = [record['captions'][0] for record in records]
    return cls(
      model, features, mesh, features.images(images), captions,
      features.images(np.stack([record['image'] for record in records])), features.texts(captions),
    )


def shuffled(source: ImageSource, count: int) -> list[Record]:
  """The first `count` records in an order that is fixed for each length: a fair sample."""
  order = np.random.default_rng(0).permutation(len(source))
  return [source[int(i)] for i in order[:count]]


def check_samples(samples: int, available: int) -> None:
  """Raises a UserError for fewer samples than 16, or more than there are test captions."""
  if not MINIMUM <= samples <= available:
    raise UserError(
      f'{samples} samples cannot be scored; choose {MINIMUM} to {available}, the number of test '
      'captions.'
    )


def fresh_weights(model: TextToImage, weights: Weights, mesh: Mesh, seed: int = 1) -> Weights:
  """The same model with an untrained U-Net."""
  fresh = jax.jit(model.unet.initialize)(jax.random.key(seed))
  return {**weights, 'unet': put_params(to_host(fresh), mesh)}


def _scores(evaluation: Evaluation, images: np.ndarray, seed: int) -> dict[str, float]:
  """METRICS of image embeddings [n p] that belong to the first n test captions."""
  compared = Compared(
    f'{evaluation.features.extractor.name}:embedding', images,
    Statistics.from_features(evaluation.reference), evaluation.reference,
    evaluation.texts[: len(images)],
  )
  return score(METRICS, [compared], seed=seed, intervals=False).values


def evaluate_text_to_image(
  evaluation: Evaluation, weights: Weights, untrained: Weights | None, sample: SampleConfig, *,
  samples: int, seed: int, real: bool, progress: bool = True,
) -> dict[str, dict[str, float]]:
  """Draws one image for each of the first `samples` test captions and scores it.

  Returns columns 'generated', and on request 'real' (the test images of the same captions) and
  'untrained' (the same model with fresh weights), each with fd_clip, kid_clip (and its standard
  deviation over subsets), clip_score and retrieval_r1 (own caption among 100).

  Raises:
    UserError: fewer than 16 samples, or more than the test split has captions.
  """
  check_samples(samples, len(evaluation.captions))
  columns = {'generated': weights} | ({'untrained': untrained} if untrained else {})
  out = {}
  for column, params in columns.items():
    images = generate(evaluation, params, sample, samples, seed, column if progress else '')
    out[column] = _scores(evaluation, evaluation.features.images(images), seed)
  if real:
    out['real'] = _scores(evaluation, evaluation.real[:samples], seed)
  out['settings'] = {'samples': samples, 'reference_images': len(evaluation.reference),
                     'seed': seed, **dataclasses.asdict(sample)}
  return out


def generate(
  evaluation: Evaluation, weights: Weights, sample: SampleConfig, samples: int, seed: int,
  label: str = '', batch_size: int = DRAW_BATCH,
) -> np.ndarray:
  """Images, uint8 [samples h w 3], for the first test captions; a label shows progress."""
  captions = evaluation.captions[:samples]
  batches = evaluation.model.generate(
    weights, captions, sample, seed=seed, mesh=evaluation.mesh, batch_size=batch_size
  )
  with tqdm(total=samples, desc=f'drawing ({label})', disable=not label, leave=False) as bar:
    out = []
    for batch in batches:
      out.append(batch)
      bar.update(len(batch))
  return np.concatenate(out)
