"""All kinds of parts by name: one table each, whose rows are imported on demand.

A part from outside is one more row: `register(SAMPLERS, 'mine', 'my_sampler:INFO')`, in the config
file, in a module of DIFFUSION_JAX_PLUGINS (separated by commas), or in an installed package's entry
point of the group 'diffusion_jax'.
"""

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from diffusion_jax.errors import UserError, shown

PLUGINS = 'DIFFUSION_JAX_PLUGINS'


class Table(dict[str, Any]):
  """Name, as configs and options use it -> 'module:Name', or the object itself; `kind` of part."""

  def __init__(self, kind: str, rows: Mapping[str, Any]):
    super().__init__(rows)
    self.kind = kind


TASKS = Table('task', {
  'autoencoder': 'diffusion_jax.train.tasks.autoencoder:AutoencoderTask',
  'classifier': 'diffusion_jax.train.tasks.classifier:ClassifierTask',
  'clip': 'diffusion_jax.train.tasks.clip:CLIPTask',
  'diffusion': 'diffusion_jax.train.tasks.diffusion:DiffusionTask',
  'finetune': 'diffusion_jax.train.tasks.finetune:FinetuneTask',
  'distillation': 'diffusion_jax.train.tasks.distillation:DistillationTask',
  'image_tokens': 'diffusion_jax.train.tasks.image_tokens:ImageTokensTask',
  'sequences': 'diffusion_jax.train.tasks.sequences:SequenceTask',
  'prior': 'diffusion_jax.train.tasks.prior:PriorTask',
  't5': 'diffusion_jax.train.tasks.t5:T5Task',
  'token_prior': 'diffusion_jax.train.tasks.token_prior:TokenPriorTask',
  'toy': 'diffusion_jax.train.tasks.toy:ToyTask',
  'vae': 'diffusion_jax.train.tasks.vae:VAETask',
})
"""Subclasses of `train.tasks.task.Task`."""

NETWORKS = Table('network', {
  'autoencoder': 'diffusion_jax.formats.autoencoder:AUTOENCODER',
  'unet': 'diffusion_jax.formats.unet:UNET',
  'unet2d': 'diffusion_jax.formats.unet:UNET2D',
  'controlnet': 'diffusion_jax.formats.unet:CONTROLNET',
  'clip': 'diffusion_jax.formats.clip:CLIP',
  'clip_text': 'diffusion_jax.formats.clip:TEXT',
  'clip_text_projection': 'diffusion_jax.formats.clip:TEXT_PROJECTION',
  'clip_vision': 'diffusion_jax.formats.clip:VISION',
  'clip_vision_projection': 'diffusion_jax.formats.clip:VISION_PROJECTION',
  'dinov2': 'diffusion_jax.formats.dinov2:DINOV2',
  't5': 'diffusion_jax.formats.t5:T5',
  'vq': 'diffusion_jax.formats.autoencoder:VQ',
  'fsq': 'diffusion_jax.formats.autoencoder:FSQ',
  'dvae': 'diffusion_jax.formats.autoencoder:DVAE',
  'autoencoder_tiny': 'diffusion_jax.formats.autoencoder:TINY',
  'dit': 'diffusion_jax.formats.dit:DIT',
  'mmdit': 'diffusion_jax.formats.dit:MMDIT',
  'flux': 'diffusion_jax.formats.dit:FLUX',
  'pixart': 'diffusion_jax.formats.dit:PIXART',
  'classifier': 'diffusion_jax.formats.classifier:CLASSIFIER',
  'prior': 'diffusion_jax.formats.prior:PRIOR',
  'embedding_tokens': 'diffusion_jax.models.embedding_tokens:EmbeddingTokens',
  'token_transformer': 'diffusion_jax.models.token_transformer:TokenTransformer',
  'mlp': 'diffusion_jax.models.mlp:MLP',
})
"""`formats.published.NetworkFormat` objects, or classes whose __init__ annotates `config`."""

BOTTLENECKS = Table('bottleneck', {
  'kl': 'diffusion_jax.train.bottlenecks.kl:KL',
  'plain': 'diffusion_jax.train.bottlenecks.plain:Plain',
  'vq': 'diffusion_jax.train.bottlenecks.vq:VQ',
  'gumbel': 'diffusion_jax.train.bottlenecks.gumbel:Gumbel',
  'fsq': 'diffusion_jax.train.bottlenecks.fsq:FSQ',
})
"""Subclasses of `train.bottlenecks.bottleneck.Bottleneck`."""

MODELS = Table('kind of model', {
  'Diffusion': 'diffusion_jax.pipelines.directory:read_model',
  'TextToImage': 'diffusion_jax.pipelines.directory:read_model',
  'Cascade': 'diffusion_jax.pipelines.cascade:read',
  'ImageTokens': 'diffusion_jax.pipelines.image_tokens:read',
  'TokenPrior': 'diffusion_jax.pipelines.token_prior:read',
  'UnCLIP': 'diffusion_jax.pipelines.unclip:read',
  'AutoencoderKL': 'diffusion_jax.pipelines.vae:read',
})
"""Functions (path, dtype) -> (`pipelines.generator.Generator`, parts, sample settings), by the
class in a directory's model_index.json or config.json; other pipelines are read as 'Diffusion'."""

SPACES = Table('space', {
  'latents': 'diffusion_jax.pipelines.spaces:LatentSpace',
  'pixels': 'diffusion_jax.pipelines.spaces:PixelSpace',
  'embeddings': 'diffusion_jax.pipelines.embeddings:EmbeddingSpace',
  'vectors': 'diffusion_jax.pipelines.spaces:VectorSpace',
  'sequences': 'diffusion_jax.pipelines.sequences:SequenceSpace',
})
"""Spaces of generative models: pixels, latents of an autoencoder, points, sequences."""

CONDITIONERS = Table('conditioner', {
  'text': 'diffusion_jax.pipelines.text_conditioners:TextEncoders',
  'class': 'diffusion_jax.pipelines.conditioners:ClassLabel',
  'sizes': 'diffusion_jax.pipelines.size_conditions:Sizes',
  'distilled_guidance': 'diffusion_jax.pipelines.distilled:DistilledGuidance',
  'image_embedding': 'diffusion_jax.pipelines.image_conditioners:ImageEncoder',
  'control': 'diffusion_jax.pipelines.image_conditioners:ControlNet',
  'inpaint': 'diffusion_jax.pipelines.image_conditioners:Inpainting',
  'upscale': 'diffusion_jax.pipelines.image_conditioners:LowResolution',
  'edit': 'diffusion_jax.pipelines.image_conditioners:Editing',
  'depth': 'diffusion_jax.pipelines.image_conditioners:Depth',
})
"""Conditions of a denoiser."""

SOURCES = Table('source of data', {
  'openmoji': 'diffusion_jax.data.sources.tfds:prepared',
  'folder': 'diffusion_jax.data.sources.folder:open_captioned',
  'tar': 'diffusion_jax.data.sources.tar:open_tars',
  'parquet': 'diffusion_jax.data.sources.tables:open_parquet',
  'arrow': 'diffusion_jax.data.sources.tables:open_arrow',
  'tfds': 'diffusion_jax.data.sources.tfds_sets:open_prepared',
  'records': 'diffusion_jax.data.sources.records:open_records',
  'wordnet': 'diffusion_jax.data.sources.texts:wordnet',
  'text': 'diffusion_jax.data.sources.texts:text_files',
  'moons': 'diffusion_jax.data.sources.arrays:points',
  'rings': 'diffusion_jax.data.sources.arrays:points',
  'mixture': 'diffusion_jax.data.sources.arrays:points',
  'autoregressive': 'diffusion_jax.data.sources.sequences:signals',
  'sines': 'diffusion_jax.data.sources.sequences:signals',
  'outlines': 'diffusion_jax.data.sources.sequences:outlines',
  'sequences': 'diffusion_jax.data.sources.sequences:from_file',
})
"""Functions of a `DataConfig` that return the sources (train, test). What follows a colon in
`data.dataset`, such as 'folder:PATH', is theirs."""

LABELLED = Table('labelled source', {'folder': 'diffusion_jax.data.sources.folder:open_labelled'})
"""The same for tasks of classes, of those SOURCES that have labels only if they are asked for."""

TRANSFORMS = Table('transform', {
  'resize': 'diffusion_jax.data.transforms:Resize',
  'center_crop': 'diffusion_jax.data.transforms:CenterCrop',
  'random_crop': 'diffusion_jax.data.transforms:RandomCrop',
  'random_resized_crop': 'diffusion_jax.data.transforms:RandomResizedCrop',
  'random_flip': 'diffusion_jax.data.transforms:RandomFlip',
  'choose_caption': 'diffusion_jax.data.transforms:ChooseCaption',
  'first_caption': 'diffusion_jax.data.transforms:FirstCaption',
  'wrap_caption': 'diffusion_jax.data.caption_transforms:WrapCaption',
  'shuffle_tags': 'diffusion_jax.data.caption_transforms:ShuffleTags',
  'drop_tags': 'diffusion_jax.data.caption_transforms:DropTags',
  'tokenize': 'diffusion_jax.data.transforms:Tokenize',
  'edges': 'diffusion_jax.data.transforms:Edges',
  'label': 'diffusion_jax.data.transforms:Label',
  'normalize': 'diffusion_jax.data.transforms:Normalize',
})
"""Dataclasses called with a record, and with a random generator where `random` is True."""

SAMPLERS = Table('sampler', {
  'ddim': 'diffusion_jax.diffusion.samplers.ode:DDIM',
  'ddpm': 'diffusion_jax.diffusion.samplers.ode:DDPM',
  'ddpm_large': 'diffusion_jax.diffusion.samplers.ode:DDPM_LARGE',
  'euler': 'diffusion_jax.diffusion.samplers.ode:EULER',
  'euler_ancestral': 'diffusion_jax.diffusion.samplers.ode:EULER_ANCESTRAL',
  'heun': 'diffusion_jax.diffusion.samplers.ode:HEUN',
  'heun_churn': 'diffusion_jax.diffusion.samplers.ode:HEUN_CHURN',
  'dpm2': 'diffusion_jax.diffusion.samplers.ode:DPM2',
  'dpm2_ancestral': 'diffusion_jax.diffusion.samplers.ode:DPM2_ANCESTRAL',
  'lms': 'diffusion_jax.diffusion.samplers.multistep:LMS',
  'plms': 'diffusion_jax.diffusion.samplers.multistep:PLMS',
  'pndm': 'diffusion_jax.diffusion.samplers.multistep:PNDM',
  'deis': 'diffusion_jax.diffusion.samplers.multistep:DEIS',
  'dpmpp_2m': 'diffusion_jax.diffusion.samplers.multistep:DPMPP_2M',
  'unipc': 'diffusion_jax.diffusion.samplers.multistep:UNIPC',
  'dpmpp_2s_ancestral': 'diffusion_jax.diffusion.samplers.ode:DPMPP_2S_ANCESTRAL',
  'dpmpp_sde': 'diffusion_jax.diffusion.samplers.sde:DPMPP_SDE',
  'dpmpp_2m_sde': 'diffusion_jax.diffusion.samplers.multistep:DPMPP_2M_SDE',
  'dpmpp_3m_sde': 'diffusion_jax.diffusion.samplers.multistep:DPMPP_3M_SDE',
  'sa_solver': 'diffusion_jax.diffusion.samplers.multistep:SA_SOLVER',
  'dpm_adaptive': 'diffusion_jax.diffusion.samplers.adaptive:DPM_ADAPTIVE',
  'probability_flow': 'diffusion_jax.diffusion.samplers.adaptive:PROBABILITY_FLOW',
  'euler_maruyama': 'diffusion_jax.diffusion.samplers.sde:EULER_MARUYAMA',
  'predictor_corrector': 'diffusion_jax.diffusion.samplers.sde:PREDICTOR_CORRECTOR',
  'annealed_langevin': 'diffusion_jax.diffusion.samplers.sde:ANNEALED_LANGEVIN',
  'restart': 'diffusion_jax.diffusion.samplers.sde:RESTART',
  'lcm': 'diffusion_jax.diffusion.samplers.sde:LCM',
  'tcd': 'diffusion_jax.diffusion.samplers.sde:TCD',
  'flow_euler': 'diffusion_jax.diffusion.samplers.ode:FLOW_EULER',
  'flow_heun': 'diffusion_jax.diffusion.samplers.ode:FLOW_HEUN',
})
"""`diffusion.samplers.SamplerInfo` objects."""

METRICS = Table('metric', {
  'fd': 'diffusion_jax.evaluation.metrics.gaussians:FD',
  'fd_infinity': 'diffusion_jax.evaluation.metrics.gaussians:FD_INFINITY',
  'kid': 'diffusion_jax.evaluation.metrics.kernel:KID',
  'precision_recall': 'diffusion_jax.evaluation.metrics.manifold:PRECISION_RECALL',
  'density_coverage': 'diffusion_jax.evaluation.metrics.manifold:DENSITY_COVERAGE',
  'cmmd': 'diffusion_jax.evaluation.metrics.kernel:CMMD',
  'kl': 'diffusion_jax.evaluation.metrics.gaussians:KL',
  'inception_score': 'diffusion_jax.evaluation.metrics.images:INCEPTION_SCORE',
  'clip_score': 'diffusion_jax.evaluation.metrics.images:CLIP_SCORE',
  'retrieval': 'diffusion_jax.evaluation.metrics.images:RETRIEVAL',
  'class_accuracy': 'diffusion_jax.evaluation.metrics.images:CLASS_ACCURACY',
  'psnr': 'diffusion_jax.evaluation.metrics.images:PSNR',
  'ssim': 'diffusion_jax.evaluation.metrics.images:SSIM',
  'l1': 'diffusion_jax.evaluation.metrics.images:L1',
  'lpips': 'diffusion_jax.evaluation.metrics.images:LPIPS',
  'bits_per_dim': 'diffusion_jax.evaluation.metrics.images:BITS_PER_DIM',
})
"""`evaluation.metrics.metric.Metric` objects."""

EVALUATORS = Table('evaluator', {
  'caption_preview': 'diffusion_jax.evaluation.generated:CaptionPreview',
  'generated_images': 'diffusion_jax.evaluation.generated:GeneratedImages',
  'reconstruction_preview': 'diffusion_jax.evaluation.reconstruction:ReconstructionPreview',
  'reconstruction': 'diffusion_jax.evaluation.reconstruction:Reconstruction',
  'retrieval_preview': 'diffusion_jax.evaluation.recognition:RetrievalPreview',
  'retrieval': 'diffusion_jax.evaluation.recognition:Retrieval',
  'classification_preview': 'diffusion_jax.evaluation.recognition:ClassificationPreview',
  'classification': 'diffusion_jax.evaluation.recognition:Classification',
  'likelihood': 'diffusion_jax.evaluation.likelihood:Likelihood',
  'held_out_loss': 'diffusion_jax.evaluation.held_out:HeldOutLoss',
  'memorisation': 'diffusion_jax.evaluation.remembering:Memorisation',
  'drift': 'diffusion_jax.evaluation.remembering:Drift',
  'elbo': 'diffusion_jax.evaluation.elbo:Elbo',
  'pixel_likelihood': 'diffusion_jax.evaluation.pixel_likelihood:PixelLikelihood',
  'span_corruption': 'diffusion_jax.evaluation.spans:SpanCorruption',
  'points_preview': 'diffusion_jax.evaluation.points:PointsPreview',
  'sequences_preview': 'diffusion_jax.evaluation.sequences:SequencesPreview',
  'sequences': 'diffusion_jax.evaluation.sequences:SequencesScores',
  'points': 'diffusion_jax.evaluation.points:Points',
})
"""Previews and scores of a model: see `evaluation.evaluator.Evaluator`."""

EXTRACTORS = Table('kind of features', {
  'inception/tensorflow': 'diffusion_jax.evaluation.extractors.images:load_inception_extractor',
  'inception/pytorch': 'diffusion_jax.evaluation.extractors.images:load_inception_extractor',
  'inception/clean': 'diffusion_jax.evaluation.extractors.images:load_inception_extractor',
  'clip': 'diffusion_jax.evaluation.extractors.clip:load_clip_extractor',
  'dinov2': 'diffusion_jax.evaluation.extractors.images:load_dinov2_extractor',
  'classifier': 'diffusion_jax.evaluation.extractors.images:load_classifier_extractor',
})
"""Features: loaders (path, *, mesh), or for one KIND/RULE (path, rule, outputs, *, mesh)."""

EXPORTS = Table('export', {'model': 'diffusion_jax.pipelines.directory:save_model'})
"""Functions that write a trained model, needed when a run ends."""

OPTIMIZERS = Table('optimizer', {
  'adamw': 'diffusion_jax.train.optimizers.plain:adamw',
  'adam': 'diffusion_jax.train.optimizers.plain:adam',
  'sgd': 'diffusion_jax.train.optimizers.plain:sgd',
  'lion': 'diffusion_jax.train.optimizers.plain:lion',
  'lamb': 'diffusion_jax.train.optimizers.plain:lamb',
  'adafactor': 'diffusion_jax.train.optimizers.plain:adafactor',
  'prodigy': 'diffusion_jax.train.optimizers.plain:prodigy',
  'muon': 'diffusion_jax.train.optimizers.muon:muon',
  'schedule_free': 'diffusion_jax.train.optimizers.schedule_free:schedule_free',
})
"""Functions (OptimizerConfig, learning rate, mask of what decays, *, own keys) -> optax
transformation; `optimizer.options` are its own keys, of the types that they are annotated with."""


def load(table: Table, name: str, where: str = '') -> Any:
  """Return the object of that name, imported now. UserError as in `check`."""
  check(table, name, where)
  target = table[name]
  if not isinstance(target, str):
    return target
  module, _, attribute = target.partition(':')
  return getattr(importlib.import_module(module), attribute)


def check(table: Collection[str], name: str, where: str = '') -> str:
  """The name of a row; UserError has the nearest name and `where`, such as 'config.task'."""
  if isinstance(name, str):
    if name not in table:
      import_plugins()
    if name in table:
      return name
  close = difflib.get_close_matches(str(name).lower(), table, n=1)
  known = 'choose one of ' + ', '.join(name or "''" for name in table)
  hint = f'did you mean {close[0]}? If not, {known}.' if close else f'{known}.'
  kind = getattr(table, 'kind', 'part')
  what = f'{where} is {shown(name)}' if where else f'there is no {kind} {shown(name)}'
  raise UserError(f'{what}; {hint}')


def check_paths(table: Table, named: Sequence[str], where: str) -> None:
  """Raise UserError for a text that is not KIND:PATH with a kind of the table."""
  for text in named:
    kind, colon, _ = text.partition(':')
    if not colon or kind not in table:
      raise UserError(
        f'{where} {text} is not of the form KIND:PATH with a kind of {", ".join(table)}.'
      )


def build_parts(table: Table, specs: Iterable[Any], where: str, **context: Any) -> list[Any]:
  """Parts of specs: names, pairs (name, arguments), or mappings {'name': ..., **arguments}.

  where: key of the config, for errors. context: arguments such as tokenizer=... for parts that take
  them, unless in the spec. UserError: unknown name, unknown or missing argument.
  """
  return [_build(table, where, *_parse(table, where, spec), context) for spec in specs]


def _parse(table: Table, where: str, spec: Any) -> tuple[str, dict[str, Any]]:
  if isinstance(spec, str):
    return spec, {}
  if isinstance(spec, (tuple, list)):
    name, arguments = spec if len(spec) == 2 else (*spec, {})
    return name, dict(arguments)
  arguments = dict(spec)
  if 'name' not in arguments:
    raise UserError(f'{arguments} in {where} has no name; add one of {", ".join(table)}.')
  return arguments.pop('name'), arguments


def _build(
  table: Table, where: str, name: str, arguments: Mapping[str, Any], context: Mapping[str, Any]
) -> Any:
  part = load(table, name, f'a name in {where}')
  known = inspect.signature(part).parameters
  for argument in arguments:
    if argument not in known:
      raise UserError(
        f'in {where} {name} has no argument {argument!r}: it takes {", ".join(known) or "none"}.'
      )
  given = {key: value for key, value in context.items() if key in known} | arguments
  for key, parameter in known.items():
    if key not in given and parameter.default is parameter.empty:
      raise UserError(f'in {where} {name} needs the argument {key!r}: add it to its entry.')
  return part(**given)


def register(table: Table, name: str, target: Any) -> None:
  """Add a row. ValueError where the name is taken by another target."""
  if table.setdefault(name, target) != target:
    raise ValueError(f'there is already a {table.kind} {name!r}: {table[name]}')


@functools.cache
def import_plugins() -> None:
  for module in filter(None, os.environ.get(PLUGINS, '').split(',')):
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise UserError(f'{PLUGINS} names {module}, which cannot be imported ({error}).') from error
  from importlib import metadata  # Takes a while, and most starts need no plugin.

  for point in metadata.entry_points(group='diffusion_jax'):
    point.load()
