"""evaluate: score models, pictures, autoencoders; likelihood; sweeps."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated, NamedTuple

from diffusion_jax.cli.options import (
  DrawOptions,
  GuideOptions,
  ModelOptions,
  add_options,
  given,
  read_options,
)
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.options import (
  CaptionOptions,
  CompareOptions,
  DataOptions,
  LikelihoodConfig,
  PairOptions,
  check_next,
)
from diffusion_jax.limits import Help
from diffusion_jax.pipelines.options import SampleOptions, TokenOptions
from diffusion_jax.registry import SAMPLERS, check

HELP = 'score a model, pictures, an autoencoder'
DESCRIPTION = """Scores are written to FILE.json, a row to FILE.csv and a page to FILE.html.
What has been computed is kept in FILE.parts, so that it resumes after an interruption;
several processes share the work.

  python -m diffusion_jax evaluate KIND --help   explains each kind."""

MODEL = """Samples a picture for each test caption and reports, in the features of the CLIP image
tower, the Frechet distance (fd_clip) and KID (kid_clip) to the training images, the CLIP score,
and how often a picture's own caption is the nearest among 100 (retrieval_r1), each with the
value of the real test images and of the same network untrained. Other features, metrics,
captions and references are named by options. The workdir of another task is scored by its own
metrics.

examples:
  python -m diffusion_jax evaluate model --workdir runs/quickstart --out runs/quickstart/scores.json
  python -m diffusion_jax evaluate model --workdir runs/quickstart --follow --out followed.json"""

IMAGES = """Scores existing pictures: of a folder, of tar files, of a prepared data set
(FOLDER:SPLIT), or of an npz with arr_0.

examples:
  python -m diffusion_jax evaluate images samples --reference test --out folder.json
  python -m diffusion_jax evaluate images photos --save_statistics photos.npz --out photos.json"""

AUTOENCODER = """Encodes and decodes test images and compares them with themselves: rfid or
rfd_FEATURES, psnr, ssim, l1, lpips.

example:
  python -m diffusion_jax evaluate autoencoder --workdir runs/autoencoder --out scores.json"""

LIKELIHOOD = """Bits per dimension of test images given their captions. The density is that of
the scaled latents, one sample of the autoencoder's posterior per image, not of pixels, and lower
is better: the variational bound over the schedule's steps (discrete), the bound in continuous
time, and the probability-flow ODE (flow), each with its standard error over images, with those of
the same network untrained and a diagonal Gaussian fitted to training latents. All three give a
latent the width of the schedule's first noise. image_bits_per_dim_bound adds the autoencoder's
part and bounds the bits of the pixels, so that it compares models with different autoencoders.

Of a model on pixels: bits of the pixels' 256 levels by the bound of its steps, in its three terms
(the end, the steps between, the levels), with a chart by timestep, and by the probability-flow ODE.

example:
  python -m diffusion_jax evaluate likelihood --samples 64 --out likelihood.json"""

SWEEP = """Scores every combination of values of guidance, steps, sampler, spacing,
guidance_rescale, guidance_kind, guidance_interval, perturbed_attention, autoguidance (with
--worse), clip_guidance, classifier_guidance (with --classifier; both also NAME_every),
image_guidance, clip_skip, eta, ema_halflife_images, and real test images; several sweeps with `or`
between them on one page.

examples:
  python -m diffusion_jax evaluate sweep guidance=1,2,4 steps=6,12 --out sweep.json
  python -m diffusion_jax evaluate sweep guidance=2,4 or guidance=2,4 guidance_interval=0.2:5 \
    or guidance=1 perturbed_attention=1,2 or autoguidance=1.5,2 --worse runs/small/model \
    --out guidance.json"""

STEPS = """Draws the same noise and captions by more and more steps, of a deterministic sampler and
of an ancestral one, and shows how much pictures still change: the first settles, the second does
not.

example:
  python -m diffusion_jax evaluate steps --samplers ddim,ddpm --counts 10,50,200 --out steps.json"""

BITS_DRAWS = 8
"""Noise levels of the bound beside other metrics: still unbiased, and quicker than sampling."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
  """The file of scores."""

  out: Annotated[str, Help('where the scores go', 'FILE.json')]

  def __post_init__(self):
    if self.path.is_dir():
      raise UserError(
        f'--out {self.out} is a directory; name a file such as {self.path / "scores.json"}.'
      )
    check_next(Output, self)

  @property
  def path(self) -> Path:
    return Path(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEvaluation(
  Output, CaptionOptions, CompareOptions, DataOptions, DrawOptions, ModelOptions, GuideOptions
):
  """A model on captions."""

  draws: Annotated[int | None, Help(
    f'of bits_per_dim among --metrics: noise levels of the bound (default: {BITS_DRAWS})', 'N'
  )] = None

  def __post_init__(self):
    super().__post_init__()
    if self.draws is not None and not self.wants_bits:
      raise UserError('--draws does nothing without bits_per_dim among --metrics; leave it out.')
    if self.wants_bits and self.captions:
      raise UserError('bits_per_dim is of test images; leave it or --captions out.')

  @property
  def wants_bits(self) -> bool:
    """Bits per dimension are among the metrics."""
    return 'bits_per_dim' in self.metrics.split(',')

  @property
  def bits_draws(self) -> int:
    """Noise levels of their bound."""
    return BITS_DRAWS if self.draws is None else self.draws


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneModel(ModelEvaluation):
  """A model, or each checkpoint of a run."""

  follow: Annotated[bool, Help(
    'with --workdir, score each checkpoint as it is written, until the run is over'
  )] = False

  def __post_init__(self):
    super().__post_init__()
    if self.follow and not self.workdir:
      raise UserError('--follow needs the run that it follows; name it by --workdir.')
    if self.follow and self.save_statistics:
      raise UserError('statistics are of one set of pictures; leave out --save_statistics.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(ModelEvaluation):
  """A model with every combination of settings; sweep: NAME=A,B each."""

  sweep: tuple[str, ...]

  def __post_init__(self):
    super().__post_init__()
    if self.save_statistics:
      raise UserError('statistics are of one set of pictures; leave out --save_statistics.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesEvaluation(Output, CompareOptions, DataOptions, DrawOptions):
  """Pictures at a path."""

  images: str
  size: Annotated[int, Help('edge of the images of --dataset in pixels (default: 64)', 'N')] = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderEvaluation(
  Output, PairOptions, CompareOptions, DataOptions, DrawOptions, ModelOptions
):
  """An autoencoder on test images."""

  model: Annotated[str, Help('a directory with an autoencoder, or asset:NAME', 'DIR')] = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodEvaluation(Output, DataOptions, DrawOptions, ModelOptions):
  """A model's likelihood of test images."""

  samples: Annotated[int, Help('test images (default: 64)', 'N')] = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsEvaluation(Output, DataOptions, DrawOptions, ModelOptions, GuideOptions):
  """A model by several samplers, in several numbers of steps."""

  samples: Annotated[int | None, Help('captions of the test split (default: 8)', 'N')] = 8
  captions: Annotated[str, Help('captions in place of these, one a line', 'FILE')] = ''
  samplers: Annotated[str, Help('names, divided by commas (default: ddim,ddpm)', 'A,B')] = (
    'ddim,ddpm'
  )
  counts: Annotated[str, Help(
    'numbers of steps, two or more (default: 10,20,50,100,200,500)', 'N,M'
  )] = '10,20,50,100,200,500'
  labels = ''

  def __post_init__(self):
    super().__post_init__()
    for name in self.names:
      check(SAMPLERS, name, '--samplers')
    if len(self.numbers) < 2 or self.numbers[0] < 1:
      raise UserError(f'--counts is {self.counts}; give two numbers of steps or more: 10,100.')

  @property
  def names(self) -> tuple[str, ...]:
    """The samplers."""
    return tuple(self.samplers.split(','))

  @property
  def numbers(self) -> tuple[int, ...]:
    """Numbers of steps, fewest first; none for what are no numbers."""
    parts = self.counts.split(',')
    return tuple(sorted(set(map(int, parts)))) if all(map(str.isdecimal, parts)) else ()


class Kind(NamedTuple):
  """A subcommand: its options, other settings, and the function of `cli.scoring` for them."""

  help: str
  description: str
  options: type
  more: tuple[type, ...]
  work: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add a parser for each kind."""
  kinds = parser.add_subparsers(dest='kind', metavar='KIND', required=True)
  for name, kind in KINDS.items():
    sub = kinds.add_parser(
      name, help=kind.help, description=kind.description, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name == 'images':
      sub.add_argument('images', metavar='PATH', help='the pictures')
    if name == 'sweep':
      sub.add_argument('sweep', nargs='+', metavar='NAME=A,B', help='values to combine')
    add_options(sub, kind.options)
    for more in kind.more:
      add_options(sub, more, 'estimates' if more is LikelihoodConfig else 'how to sample')


def run(args: argparse.Namespace) -> int:
  """Score, write and print; several processes do it together."""
  kind = KINDS[args.kind]
  options = read_options(kind.options, args)
  more = {name: value for cls in kind.more for name, value in given(cls, args).items()}
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.cli import follow, scoring
  from diffusion_jax.evaluation.report import write
  from diffusion_jax.parallel.startup import start_distributed
  from diffusion_jax.viz.evaluation import print_table, write_evaluation_page

  enable_compile_cache()
  out, shown = options.path, {}
  out.parent.mkdir(parents=True, exist_ok=True)
  start_distributed()
  if getattr(options, 'follow', False):
    return follow.follow(options, more)
  scores = getattr(scoring, kind.work)(options, more, shown)
  if scores is not None:
    write(out, scores, lambda path, scores: write_evaluation_page(path, scores, **shown))
    print_table(scores)
    print(f'written to {out}, beside it {out.with_suffix(".csv").name} and '
          f'{out.with_suffix(".html").name}')
  scoring.all_are_here('written')
  return 0


SAMPLING = (SampleOptions, TokenOptions)
KINDS = {
  'model': Kind('samples of a model for captions', MODEL, OneModel, SAMPLING, 'of_model'),
  'images': Kind('existing pictures', IMAGES, ImagesEvaluation, (), 'of_pictures'),
  'autoencoder': Kind(
    'reconstructions of an autoencoder', AUTOENCODER, AutoencoderEvaluation, (),
    'of_autoencoder',
  ),
  'likelihood': Kind(
    'bits per dimension of test images', LIKELIHOOD, LikelihoodEvaluation, (LikelihoodConfig,),
    'likelihood',
  ),
  'steps': Kind(
    'whether pictures settle as steps grow', STEPS, StepsEvaluation, (SampleOptions,), 'steps'
  ),
  'sweep': Kind('every combination of settings of a model', SWEEP, Sweep, SAMPLING, 'sweep'),
}
