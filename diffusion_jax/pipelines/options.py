"""Options of sampling, also of the command line."""

import dataclasses
import math
from typing import Annotated, NamedTuple

from diffusion_jax.errors import UserError
from diffusion_jax.limits import Help, OneOf, Range, parse_size
from diffusion_jax.registry import SAMPLERS

Option = bool | int | float | str
"""The value of a sampler's option."""

THRESHOLDS = ('none', 'static', 'dynamic')
DECODINGS = ('whole', 'sliced', 'tiled', 'undivided')
"""How latents become images: a batch at once, image by image, or in overlapping tiles, as the first
two are above `spaces.MOST_WHOLE`; undivided at any size."""
PLAIN, WEIGHTED = SYNTAXES = ('plain', 'weighted')
"""How prompts are read, see `pipelines.prompts`."""
BINNINGS = ('none', 'aspect')
"""At which sizes is drawn, see `pipelines.bins`."""
EXTRAPOLATED, PLUS_PLUS, ZERO_STAR = GUIDANCES = ('extrapolated', 'plus_plus', 'zero_star')
"""Kinds of classifier-free guidance, see `diffusion.free_guidance`."""
AESTHETIC, NEGATIVE_AESTHETIC = 6.0, 2.5
SIZING = {
  'original_size': '', 'crop': (0, 0), 'target_size': '', 'aesthetic_score': AESTHETIC,
  'negative_aesthetic_score': NEGATIVE_AESTHETIC,
}
"""The options that make up a `Sizing`, and what they are where nothing is said."""
Pixels = Annotated[int, Range(0, 2**20, text='a number of pixels')]
Score = Annotated[float, Range(0, 10)]
FINITE = Range(-math.inf, math.inf, above=True, below=True, text='a finite scale, 1 for none')
SCALE = Range(-math.inf, math.inf, above=True, below=True, text='a finite scale, 0 for none')


GUIDES = ('clip_guidance', 'classifier_guidance')
"""Options that are the scales of guides, see `pipelines.guides`; 0 is none."""


class Sizing(NamedTuple):
  """Sizes that a model is conditioned on, in pixels: the original's and the target's height and
  width, None as drawn, the top and left of the crop; and scores of how good a picture looks, also
  for the negative prompt."""

  original: tuple[int, int] | None = None
  crop: tuple[int, int] = (0, 0)
  target: tuple[int, int] | None = None
  aesthetic: float = AESTHETIC
  negative_aesthetic: float = NEGATIVE_AESTHETIC


AS_DRAWN = Sizing()


@dataclasses.dataclass(frozen=True)
class SampleOptions:
  """Options of sampling; each `Help` explains its own.

  guidance_rescale: phi of Lin et al. 2024, of what the network predicts if that is epsilon or v,
  else of x_0. guidance_interval: a high of None is no bound. threshold: as in Saharia et al.
  2022, for pixels; latents have no bounds. options: of the sampler, such as its order; eta, where
  given, is one. steps_offset, drop_last, fractional, set_alpha_to_one and, in places, the
  other arguments of `sampling_grid`: as diffusers' schedulers place their steps. timesteps: one of
  `noise.LABELS`. scaled_noise: start from noise of the first level's sigma, not of unit variance.
  image_guidance: s_I of Brooks et al. 2023. distilled_guidance: None for the model's own.
  perturbed_attention: s of Ahn et al. 2024. strength_steps: how many steps a picture to start
  from leaves, see `part_way`. autoguidance: w of Karras et al. 2024. clip_skip: for the prompt
  alone, besides the layers that the model leaves out anyway; as in diffusers, the negative prompt
  keeps them. denoising_start, denoising_end: fractions of the noise's timesteps between which steps
  begin (Podell et al. 2023, sec. 2.5); from above 0 on, `Inputs.latents` are gone on from.
  resample, resample_jump: r and j of Lugmayr et al. 2022, sec. 4.2, where `Inputs` hold something.
  """

  sampler: Annotated[str, OneOf(SAMPLERS), Help(
    'one of the table in README.md, or any other word to have them listed', 'NAME'
  )] = 'dpmpp_2m'
  steps: Annotated[int, Range(1, 10_000), Help('sampling steps', 'N')] = 20
  guidance: Annotated[float, FINITE, Help('classifier-free guidance scale; 1 is none', 'G')] = 4.0
  spacing: Annotated[str, Help(
    'spacing of the steps, such as trailing, karras or beta', 'NAME'
  )] = 'trailing'
  guidance_rescale: Annotated[float, Range(0, 1), Help(
    'fraction by which guidance keeps the contrast it would raise', 'PHI'
  )] = 0.0
  guidance_interval: Annotated[tuple[float, float | None], Help(
    'noise levels sigma / alpha that are guided; HIGH may be inf', 'LOW HIGH'
  )] = (0.0, None)
  threshold: Annotated[str, OneOf(THRESHOLDS), Help(
    'none, static or dynamic: keep each estimate of the latents in bounds', 'KIND'
  )] = 'none'
  threshold_limit: Annotated[float, Range(
    0, math.inf, above=True, below=True,
    text='a number above 0, in standard deviations of the latents',
  ), Help(
    'of static: the bound, in standard deviations of the latents; of dynamic: the most that an '
    'estimate is divided by to lie in [-1, 1]', 'L'
  )] = 4.0
  threshold_percentile: Annotated[float, Range(
    0, 1, above=True, text='a fraction above 0 and up to 1'
  ), Help('of dynamic: the fraction of an image that is not clipped', 'P')] = 0.995
  eta: Annotated[Annotated[float, Range(0, 1)] | None, Help(
    'of samplers such as ddim: the part of the noise of an ancestral step that each adds, from 0, '
    "none, to 1, DDPM (default: the sampler's own)", 'E'
  )] = None
  options: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
  steps_offset: int = 0
  drop_last: bool = False
  fractional: bool = False
  set_alpha_to_one: bool = True
  places: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
  timesteps: Annotated[str, OneOf('diffusion_jax.diffusion.noise:LABELS')] = 'exact'
  scaled_noise: bool = False
  strength_steps: Annotated[str, OneOf(('nearest', 'up'))] = 'nearest'
  image_guidance: Annotated[float, FINITE, Help(
    'of a model that edits a picture: how closely to keep to it; 1 is none', 'G'
  )] = 1.0
  distilled_guidance: Annotated[Annotated[float, FINITE] | None, Help(
    'of a distilled denoiser, such as Flux.1 dev or a consistency model: the guidance that it '
    "imitates (default: the pipeline's, such as 3.5)", 'G'
  )] = None
  perturbed_attention: Annotated[float, Range(0), Help(
    'scale of perturbed-attention guidance, beside --guidance; 0 is none', 'S'
  )] = 0.0
  perturbed_part: Annotated[str, Help(
    'the part of the denoiser whose self-attention that perturbs (default: mid_block)', 'NAME'
  )] = 'mid_block'
  autoguidance: Annotated[float, FINITE, Help(
    'with --worse, scale of the guidance away from that model; 1 is none', 'W'
  )] = 1.0
  clip_guidance: Annotated[float, SCALE, Help(
    "scale of the gradient of CLIP's similarity of the picture to the prompt, in units of CLIP's "
    'temperature, beside --guidance; 0 is none', 'S'
  )] = 0.0
  clip_guidance_every: Annotated[int, Range(1, text='a number of steps'), Help(
    'with --clip_guidance: of so many steps only the first is guided by it (default: 1)', 'K'
  )] = 1
  classifier_guidance: Annotated[float, SCALE, Help(
    "scale of the gradient of a classifier's log-probability of the class, beside --guidance; 0 is "
    'none', 'S'
  )] = 0.0
  classifier_guidance_every: Annotated[int, Range(1, text='a number of steps'), Help(
    'with --classifier_guidance: of so many steps only the first is guided by it (default: 1)', 'K'
  )] = 1
  guidance_kind: Annotated[str, OneOf(GUIDANCES), Help(
    'how --guidance acts: extrapolated; plus_plus (CFG++), of ddim, with a scale from 0 to 1; or '
    'zero_star (CFG-Zero*), of a flow, which leaves out the first step', 'KIND'
  )] = EXTRAPOLATED
  clip_skip: Annotated[int, Range(0, text='a number of layers, 0 for none'), Help(
    'layers of the text encoder to leave out at the end', 'N'
  )] = 0
  prompt_syntax: Annotated[str, OneOf(SYNTAXES), Help(
    'plain, or weighted: (word:1.3), (word), [word], BREAK and long prompts in chunks, as in the '
    'Stable Diffusion web UI; a backslash before a bracket makes it text', 'HOW'
  )] = PLAIN
  binning: Annotated[str, OneOf(BINNINGS), Help(
    'of PixArt: aspect draws at the size of its training whose aspect is nearest, and cuts what '
    'was asked for out of that; none draws at the size itself', 'HOW'
  )] = 'none'
  decoding: Annotated[str, OneOf(DECODINGS), Help(
    'whole, or with less memory sliced (image by image); both in tiles where latents are of more '
    'than 160 x 160 places, as tiled does for those above 64 x 64; or undivided at any size', 'HOW'
  )] = 'whole'
  original_size: Annotated[str, Help(
    'of Stable Diffusion XL: the size in pixels that the picture seems to have had before it was '
    'scaled, as in --size (default: that which is drawn)', 'HxW'
  )] = ''
  crop: Annotated[tuple[Pixels, Pixels], Help(
    'of Stable Diffusion XL: pixels that seem to be cut off at the top and the left (default: 0 0)',
    'TOP LEFT'
  )] = (0, 0)
  target_size: Annotated[str, Help(
    'of Stable Diffusion XL: the size in pixels that the picture seems to have been made for '
    '(default: that which is drawn)', 'HxW'
  )] = ''
  aesthetic_score: Annotated[Score, Help(
    f"of Stable Diffusion XL's refiner: how good the picture looks, 0 to 10 (default: {AESTHETIC})",
    'S'
  )] = AESTHETIC
  negative_aesthetic_score: Annotated[Score, Help(
    f'the same, of what not to draw (default: {NEGATIVE_AESTHETIC})', 'S'
  )] = NEGATIVE_AESTHETIC
  denoising_start: Annotated[float, Range(0, 1, below=True)] = 0.0
  denoising_end: Annotated[float, Range(0, 1, above=True), Help(
    "fraction of the noise's timesteps after which to stop, and where a refiner goes on", 'F'
  )] = 1.0

  resample: Annotated[int, Range(1, 1000), Help(
    'where something of a picture is kept: how often each stretch of steps is sampled, with noise '
    'put back in between, so that the rest agrees better with it (default: 1)', 'R'
  )] = 1
  resample_jump: Annotated[int, Range(1, 10_000), Help(
    'with --resample: steps of a stretch (default: 5)', 'J'
  )] = 5

  def __post_init__(self):
    if not self.denoising_start < self.denoising_end:
      raise UserError(
        f'denoising_start is {self.denoising_start:g} and denoising_end {self.denoising_end:g}; '
        'the first must be less.'
      )
    for name in ('original_size', 'target_size'):
      if getattr(self, name):
        parse_size(getattr(self, name), name)
    low, high = self.guidance_interval
    if not 0 <= low < (math.inf if high is None else high):
      raise UserError(
        f'guidance_interval is {low} to {high}; give two noise levels sigma / alpha from 0 on, the '
        'lower one first.'
      )

  @property
  def guides(self) -> tuple[str, ...]:
    """Names of the guides that are in force."""
    return tuple(name for name in GUIDES if getattr(self, name))

  @property
  def sizing(self) -> Sizing:
    """The sizes that a model is conditioned on."""
    size = lambda text: parse_size(text) if text else None
    return Sizing(
      size(self.original_size), self.crop, size(self.target_size), self.aesthetic_score,
      self.negative_aesthetic_score,
    )


@dataclasses.dataclass(frozen=True)
class TokenOptions:
  """Options of drawing tokens one after another."""

  temperature: Annotated[float, Range(0, 1e6, above=True), Help(
    'of a model of tokens: below 1 likely tokens are drawn more often', 'T'
  )] = 1.0
  top_k: Annotated[int, Range(0), Help(
    'of a model of tokens: draw among so many likeliest tokens; 0 for all, 1 for no chance', 'K'
  )] = 0
  top_p: Annotated[float, Range(0, 1, above=True), Help(
    'of a model of tokens: draw among the likeliest that together have this probability', 'P'
  )] = 1.0
  candidates: Annotated[int, Range(1, 512), Help(
    'of a model of tokens: pictures drawn for each prompt, of which CLIP chooses one', 'N'
  )] = 1
