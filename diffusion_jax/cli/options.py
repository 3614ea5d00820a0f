"""Arguments that sample and evaluate share."""

import argparse
import dataclasses
import math

from diffusion_jax.errors import UserError
from diffusion_jax.limits import check_seed

DEFAULT_MODEL = 'asset:text-to-image-openmoji-64'
OF_SAMPLER = ('options', 'drop_last', 'fractional', 'set_alpha_to_one', 'places', 'timesteps',
              'scaled_noise')
"""Settings that another sampler does not take over."""


def check_overrides(args: argparse.Namespace) -> None:
  """UserError for what no option of a command with --config.KEY=VALUE is."""
  if stray := [a for a in args.overrides if a.startswith('-') and not a.startswith('--config.')]:
    raise UserError(
      f'{args.command} does not know {stray[0]}; keys of the config start with --config.'
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
  """--workdir or --model."""
  group = parser.add_mutually_exclusive_group()
  group.add_argument('--workdir', metavar='DIR',
                     help='a run of train; its last checkpoint is used, averaged weights first')
  group.add_argument('--model', metavar='DIR',
                     help=f'a model directory, or asset:NAME (default: {DEFAULT_MODEL})')
  parser.add_argument('--ema_halflife_images', type=float, metavar='N', help='with --workdir, '
                      'average the weights over another length, put together from the checkpoints '
                      "that are there; 0 for no average (default: the run's own)")


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
  """What others have trained for the model."""
  parser.add_argument('--lora', action='append', default=[], metavar='FILE[:SCALE]',
                      help='a LoRA to merge, of any usual trainer; repeat for several')
  parser.add_argument('--controlnet', metavar='DIR', help='a ControlNet made for the model')
  parser.add_argument('--words', action='append', default=[], metavar='FILE',
                      help='a learned word (textual inversion); repeat for several')


def with_adapters(model, weights, args: argparse.Namespace):
  """(model, weights) with what --lora, --controlnet and --words name."""
  from diffusion_jax.pipelines.adapters import add_controlnet, add_lora, add_words

  for text in args.lora:
    path, _, scale = text.rpartition(':')
    try:
      path, scale = (path, float(scale)) if path else (text, 1.0)
    except ValueError:
      path, scale = text, 1.0
    weights = add_lora(model, weights, path, scale)
  for path in args.words:
    weights = add_words(model, weights, path)
  if args.controlnet:
    model, weights = add_controlnet(model, weights, args.controlnet)
  return model, weights


def named_adapters(args: argparse.Namespace) -> dict[str, str]:
  """Argument -> what it names, of those of `add_adapter_arguments` that were given."""
  given = {'lora': ' '.join(args.lora), 'controlnet': args.controlnet,
           'words': ' '.join(args.words)}
  return {name: value for name, value in given.items() if value}


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
  """How to sample; what is not given is what the model was trained to be used with."""
  parser.add_argument('--sampler', metavar='NAME', help='one of the table in README.md, or any '
                      'other word to have them listed')
  parser.add_argument('--spacing', metavar='NAME',
                      help='how the steps are placed, such as trailing, karras or beta')
  parser.add_argument('--steps', type=int, metavar='N', help='sampling steps')
  parser.add_argument('--guidance', type=float, metavar='G',
                      help='classifier-free guidance scale; 1 is none')
  parser.add_argument('--guidance_rescale', type=float, metavar='PHI',
                      help='share from 0 to 1 by which guidance keeps the contrast it would raise')
  parser.add_argument('--guidance_interval', type=float, nargs=2, metavar=('LOW', 'HIGH'),
                      help='noise levels sigma / alpha that are guided; HIGH may be inf')
  parser.add_argument('--threshold', metavar='KIND',
                      help='none, static or dynamic: keep each estimate of the latents in bounds')
  parser.add_argument('--threshold_limit', type=float, metavar='L',
                      help='of static: the bound, in standard deviations of the latents; of '
                      'dynamic: the most that an estimate is divided by to lie in [-1, 1]')
  parser.add_argument('--threshold_percentile', type=float, metavar='P',
                      help='of dynamic: the share of an image that is not clipped')
  parser.add_argument('--image_guidance', type=float, metavar='G',
                      help='of a model that edits a picture: how closely to keep to it; 1 is none')
  parser.add_argument('--clip_skip', type=int, metavar='N',
                      help='layers of the text encoder to leave out at the end')
  parser.add_argument('--decoding', metavar='HOW', help='whole, or with less memory sliced (image '
                      'by image) or tiled (for large images)')
  parser.add_argument('--seed', type=int, default=0, metavar='S',
                      help='random seed, from 0 to 2**32 - 1 (default: 0)')
  parser.add_argument('--batch', type=int, default=16, metavar='N',
                      help='images drawn at a time (default: 16); another number rounds otherwise: '
                      'now and then a value of a picture moves by a level of 255, by more where a '
                      'device multiplies in less than float32')


def load_run(args: argparse.Namespace):
  """(the run of --workdir, sample settings with the arguments applied)."""
  from diffusion_jax.run import TrainedRun

  check_numbers(args)
  run = TrainedRun(args.workdir)
  sample = with_arguments(run.sample, args)
  sample.check(run.model.noise, run.model.parameterization)
  return run, sample


def load(args: argparse.Namespace, mesh):
  """(model, weights on the mesh, sample settings with the arguments applied, the model's name)."""
  from diffusion_jax.pipelines.directory import load_text_to_image

  if args.workdir:
    run, sample = load_run(args)
    weights = run.weights(ema_halflife_images=args.ema_halflife_images)
    return run.model, run.model.on_mesh(weights, mesh), sample, args.workdir
  check_numbers(args)
  if args.ema_halflife_images is not None:
    raise UserError('--ema_halflife_images needs --workdir: a model alone has one average.')
  name = args.model or DEFAULT_MODEL
  model, weights, sample = load_text_to_image(name, mesh=mesh)
  sample = with_arguments(sample, args)
  sample.check(model.noise, model.parameterization)
  return model, model.on_mesh(weights, mesh), sample, name


def check_numbers(args: argparse.Namespace) -> None:
  """UserError for a seed or a batch that cannot be."""
  check_seed(args.seed, '--seed')
  if args.batch < 1:
    raise UserError(f'--batch is {args.batch}; draw at least 1 image at a time.')


def with_arguments(sample, args: argparse.Namespace):
  """The settings with those that were given as arguments in place of the model's."""
  names = {field.name for field in dataclasses.fields(sample)}
  given = {k: v for k, v in vars(args).items() if k in names and v is not None}
  if 'guidance_interval' in given:
    low, high = given['guidance_interval']
    given['guidance_interval'] = (low, None if high == math.inf else high)
  if given.get('sampler', sample.sampler) != sample.sampler:
    # What a published scheduler says beside its sampler's name holds for that sampler alone.
    given = {name: getattr(type(sample)(), name) for name in OF_SAMPLER} | given
  return dataclasses.replace(sample, **given)
