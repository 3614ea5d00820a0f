"""Options of evaluations, for the command line and for functions; nothing heavy is imported."""

import dataclasses
from typing import Annotated, Any, Literal

from diffusion_jax.errors import UserError
from diffusion_jax.limits import Help, OneOf, Positive
from diffusion_jax.registry import METRICS, check

CLIP = 'asset:clip-openmoji-64'


def check_next(cls: type, options: Any) -> None:
  """Run the checks of the classes that come after this one among the bases of some options."""
  if check := getattr(super(cls, options), '__post_init__', None):
    check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
  """The data set of a model that is not of a run."""

  dataset: Annotated[str, Help('data set, without --workdir (default: openmoji)', 'NAME')] = (
    'openmoji'
  )
  data_dir: Annotated[str | None, Help('folder of all data sets, without --workdir', 'DIR')] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
  """Reference, features and metrics; metrics: names, divided by commas."""

  reference: Annotated[str | None, Help(
    'what pictures are compared with: other pictures, a file of statistics (.npz with mu and '
    'sigma, a cache of torch-fidelity), or train or test of the data set (default: train)', 'WHAT'
  )] = None
  features: Annotated[tuple[str, ...], Help(
    'inception/tensorflow, inception/pytorch or inception/clean (by the rule of resizing) with a '
    'file of weights, or clip, dinov2, classifier with a directory; repeat for several (default: '
    f"the run's CLIP, else clip:{CLIP})", 'KIND:PATH'
  )] = ()
  metrics: Annotated[str, Help(f'any of {", ".join(METRICS)}', 'A,B')] = ''
  save_statistics: Annotated[str, Help(
    'write the mean and covariance of the features, as .npz (mu, sigma) or .pt (a cache of '
    'torch-fidelity); of pictures without --metrics and --reference, nothing else is computed',
    'FILE'
  )] = ''
  most_unreadable: Annotated[float | None, Help(
    'fraction of the pictures of a set that may be damaged; they are named and left out (default: '
    "the run's data.most_unreadable, else 0)", 'FRACTION'
  )] = None

  def __post_init__(self):
    names = self.metrics.split(',') if self.metrics else []
    for name in names:
      check(METRICS, name)
      if names.count(name) > 1:
        raise UserError(f'the metric {name} is named twice; name it once.')
    if self.save_statistics and not self.save_statistics.endswith(('.npz', '.pt')):
      raise UserError(
        f'Statistics cannot be written to {self.save_statistics}; name it NAME.npz or NAME.pt.'
      )
    check_next(CompareOptions, self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionOptions:
  """Captions that a model samples."""

  samples: Annotated[int | None, Help(
    'pictures to sample (default: 256, or all --captions)', 'N'
  )] = None
  captions: Annotated[str, Help(
    'captions to sample, one a line (default: of the test split)', 'FILE'
  )] = ''
  labels: Annotated[str, Help(
    'with --captions, the class of each, one a line, for class_accuracy (default: of the test '
    'split)', 'FILE'
  )] = ''
  keep: Annotated[Literal['', 'png', 'tar'], Help(
    'keep what is sampled, in NAME.images: png or tar', 'KIND'
  )] = ''
  clip: Annotated[str, Help(
    f"a CLIP with both towers, in whose features to score (default: the run's, else {CLIP})", 'DIR'
  )] = ''

  def __post_init__(self):
    if self.labels and not self.captions:
      raise UserError('--labels are those of --captions; give both.')
    check_next(CaptionOptions, self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions:
  """Test images of an autoencoder."""

  samples: Annotated[int | None, Help('test images (default: 256)', 'N')] = None
  size: Annotated[int | None, Help(
    'edge of the images in pixels, without --workdir (default: what it was trained at, else 64)',
    'N'
  )] = None
  lpips: Annotated[str, Help(
    'weights of LPIPS (VGG) as safetensors, with which lpips is a metric, too', 'FILE'
  )] = ''
  keep: Annotated[Literal['', 'png', 'tar'], Help(
    'keep the reconstructions, in NAME.images: png or tar', 'KIND'
  )] = ''

  def __post_init__(self):
    metrics = getattr(self, 'metrics', '')
    if self.lpips and metrics and 'lpips' not in metrics.split(','):
      raise UserError('--lpips does nothing without lpips among --metrics; name it there, too.')
    if self.size is not None and getattr(self, 'workdir', ''):
      raise UserError('--size does nothing with --workdir; leave it out.')
    check_next(PairOptions, self)


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
  """Settings by which bits per dimension are estimated."""

  draws: Annotated[Positive, Help(
    'noise levels of each bound, a network call each (default: 32)', 'N'
  )] = 32
  trace: Annotated[str, OneOf('diffusion_jax.diffusion.likelihood:TRACES'), Help(
    'of the Jacobian: rademacher (default), gaussian, or exact, which takes a backward pass per '
    'dimension', 'NAME'
  )] = 'rademacher'
  probes: Annotated[Positive, Help('noises that estimate the trace (default: 1)', 'N')] = 1
  solver: Annotated[str, OneOf('diffusion_jax.diffusion.likelihood:SOLVERS'), Help(
    'of the ODE: rk4 (default, 4 calls a step), heun (2), or adaptive, whose steps suit a whole '
    'batch, so that values depend on the batch within its tolerance', 'NAME'
  )] = 'rk4'
  ode_steps: Annotated[Positive, Help('steps of rk4 or heun (default: 8)', 'N')] = 8
