"""Train the denoiser of a generative model on noised data, alone or with its text encoders."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average
from jax.sharding import Mesh

from diffusion_jax.config import WHITE, DataConfig, TrainingConfig
from diffusion_jax.data.cache import (
  KINDS,
  CachedSource,
  Choose,
  Options,
  cached_source,
  synthetic_cache,
)
from diffusion_jax.data.mixture import OWN
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.transforms import check_pictures
from diffusion_jax.data.unreadable import first_readable
from diffusion_jax.diffusion.objective import (
  Losses,
  LossHistory,
  Objective,
  update_history,
)
from diffusion_jax.errors import UserError
from diffusion_jax.limits import check_edges
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.parallel.mesh import to_host
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.conditioners import Arrays, Conditioner, Guided
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.model import DENOISER, Diffusion, joined
from diffusion_jax.pipelines.rules import edge_rule
from diffusion_jax.pipelines.spaces import Moments
from diffusion_jax.pipelines.text_places import places_of
from diffusion_jax.registry import (
  EVALUATORS,
  EXPORTS,
  load,
)
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.diffusion_settings import (
  DiffusionTaskConfig,
  SharedConfig,
  upgrade_settings,
)
from diffusion_jax.train.tasks.task import Carry, Env, Frozen, Observed, Task
from diffusion_jax.train.tasks.text_training import with_texts
from diffusion_jax.train.tasks.trainable import Denoiser, Trainable
from diffusion_jax.types import Condition, Params, Scores, Source, Weights

TIME_BUCKETS = 10
TEXT, NULL = 'text', 'null'
"""The role under which the null condition is kept: 'text.bias', 'pooled.bias'."""
class Encoded(NamedTuple):
  """A batch for the loss, encoded now or before training.

  moments: of z, see `spaces.Space`. conditions: fields of `Condition` by conditioner. weight: [b]
  of the losses, if any. dropout: [b], of the captions of each example, below 0 for that of the
  settings; None where all have that.
  """

  moments: Moments
  conditions: dict[str, Arrays]
  weight: jax.Array | None = None
  dropout: jax.Array | None = None


def seen(data: DataConfig) -> Any:
  """Return what decides how all pictures of known content and size look: transforms, and what else
  is not as usual."""
  colors = [] if data.mixture else [data.background]
  if {*colors} <= {WHITE} and data.crop == 'middle':
    return data.transforms
  return data.transforms, data.crop, colors


def looks(data: DataConfig) -> dict[str, Any]:
  """Return what more decides it in each part of a mixture, None where it is all as usual."""
  own = {name: (part.background or data.background, part.transforms)
         for name, part in data.mixture.items()}
  return {name: None if look == (WHITE, ()) else look for name, look in own.items()}


def _kept(conditioner: Conditioner) -> tuple[str, ...]:
  """Return the fields that a cache has for a conditioner: the condition, or what it is made of."""
  return conditioner.kept or conditioner.fields


def _null(conditioner: Guided, frozen: Frozen) -> Arrays:
  """Return the null condition on the host; of shapes of parameters its shapes."""
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(frozen)):
    return jax.eval_shape(conditioner.null, frozen)
  return to_host(conditioner.null(frozen))


def _keys(names: list[str], key: jax.Array) -> dict[str, jax.Array]:
  """A key for each name; the key itself where there is but one."""
  keys = jax.random.split(key, len(names)) if len(names) > 1 else [key] * len(names)
  return dict(zip(names, keys, strict=True))


class DiffusionTask(Task):
  """Parameters are the denoiser's; the carry has the losses of importance sampling."""

  Config = DiffusionTaskConfig
  upgrade_settings = staticmethod(upgrade_settings)
  name, title = 'diffusion', 'Text-to-image latent diffusion model'
  computing = ('remat', 'attention', 'products')
  captioned = True

  def __init__(
    self, config: SharedConfig, model: Diffusion, frozen: Frozen, train: Source, test: Source,
    remat: str = 'none', products: str = 'plain', trainable: Trainable | None = None,
  ):
    """`remat` and `products`, of `models.network`, are of the loss alone.

    trainable: what is trained, `adapted` to the model; None for all of the denoiser.
    """
    model.check_sampling(config.sample)
    if trainable is None:
      trainable = Denoiser(config)
      trainable.adapted(model)
    self.trainable = trainable
    self.config, self.model, self.train, self.test = config, model, train, test
    self.loss_model = model.with_compute(remat=remat, matmul_precision=products)
    self.objective = Objective(config.objective, model.noise, model.parameterization)
    self._moving = tuple(
      name for name, c in model.conditioners.items()
      if isinstance(c, Guided) and trainable.roles & c.networks.keys()
    )
    nulls = [
      _null(c, frozen) for name, c in model.conditioners.items()
      if isinstance(c, Guided) and name not in self._moving
    ]
    # As parameters that lie on every device.
    null = {f'{name}.bias': value for one in nulls for name, value in one.items()}
    self.frozen: Frozen = {**frozen, NULL: null} if null else frozen
    # What else draws random numbers than the objective.
    self._draws = model.space.random or bool(model.conditioners)
    # Records may have what is not as usual, such as the sizes of what they were cut from.
    conditioners = self.loss_model.conditioners
    told = {field for one in conditioners.values() if one.usual for field in one.fields}
    told = told & first_readable(train, 1)[0].keys() if told else set()
    self._conditioners = {
      name: one for name, one in conditioners.items() if not one.usual or told & {*one.fields}
    }
    self.encode = self._from_cache if config.cache else self._from_examples
    fields = [*model.space.kept] if config.cache else [model.space.field]
    for one in self._conditioners.values():
      fields += _kept(one) if config.cache else one.fields
    mixed = getattr(train, 'mixed', None)
    own = mixed is not None and mixed.drops
    self._drops = bool(own or config.caption_dropout or any(config.encoder_dropout))
    self.batch_fields = tuple(dict.fromkeys([*fields, OWN] if own else fields))
    if config.encoder_dropout and len(config.encoder_dropout) != self._text_encoders:
      raise UserError(
        f'settings.encoder_dropout has {len(config.encoder_dropout)} fractions, but there are '
        f'{self._text_encoders} text encoders; give one for each, or leave it empty.'
      )

  @property
  def _text_encoders(self) -> int:
    return 0 if self.model.text is None else len(self.model.text.networks)

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    settings, data = config.settings, config.data
    if settings.cache:
      given = {f'data.mixture.{n}.transforms': p.transforms for n, p in data.mixture.items()}
      given['data.transforms'] = data.transforms
      drawn = any([check_pictures(specs, 'settings.cache', key) for key, specs in given.items()])
      if settings.cache_views > 1 and not drawn and data.crop == 'middle':
        raise UserError(
          f'settings.cache_views is {settings.cache_views}, but data.transforms make one view of a '
          'picture; add one that is random, such as random_flip, or leave it at 1.'
        )
    elif settings.cache_views > 1:
      raise UserError('settings.cache_views has no effect without settings.cache; leave it at 1.')
    if config.loop.evaluate_samples and settings.with_images:
      raise UserError(
        'scores need a model that is conditioned on the caption alone; set evaluate_samples 0.'
      )
    if other := [size for size in settings.preview_sizes if size not in data.shapes]:
      raise UserError(
        f'settings.preview_sizes has {other[0]}, which is none of the sizes of data.size; give '
        'some of those, or leave it empty.'
      )
    if settings.preview_sizes and settings.with_images:
      raise UserError(
        'settings.preview_sizes has no effect on a model that is conditioned on images; leave it '
        'empty.'
      )
    cls.check_size(config)
    super().check_data(config)

  @classmethod
  def open_sources(cls, config: TrainingConfig, synthetic: bool) -> tuple[Source, Source]:
    """Folders by class, where the model is conditioned on classes alone."""
    names = getattr(config.settings, 'conditioned', {})
    if synthetic or 'class' not in names or 'text' in names:
      return super().open_sources(config, synthetic)
    return open_data(config.data, labels_for='a model of classes')

  @classmethod
  def check_size(cls, config: TrainingConfig) -> None:
    """Raise UserError unless the denoiser is of z of images of `data.size`."""
    space, size = config.settings.space, config.data.size
    rule = edge_rule(space.factor, config.settings.denoiser)
    if not isinstance(size, int):
      for shape in config.data.shapes:
        check_edges(shape, rule)
      return
    factor, rounded = space.factor, max(size // space.factor, 1)
    places = getattr(config.settings.denoiser, 'sample_size', None) or rounded
    several = isinstance(places, tuple)
    wanted = tuple(edge * factor for edge in places) if several else places * factor
    if size != wanted:
      raise UserError(
        f'data.size {size} gives latents of {size / factor:g}, but sample_size of the denoiser is '
        f'{places}; set data.size to {wanted} or sample_size to {size // factor}.'
      )
    check_edges(size, rule)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> 'DiffusionTask':
    settings = config.settings
    model, parts = assemble(
      settings.denoiser, settings.space, settings.conditioned, settings.schedule,
      settings.objective.parameterization, train=env.train, size=config.data.shape,
      dtype=getattr(jnp, config.dtype),
    )
    model = model.with_compute(attention=config.attention)
    trainable = with_texts(Denoiser(settings), settings, model, parts)
    model = trainable.adapted(model)
    return cls(
      settings, model, trainable.rest(parts), env.train, env.test, config.remat, config.products,
      trainable,
    )

  def context(self) -> dict[str, Any]:
    label = self.model.conditioners.get('class')
    return ({} if self.model.text is None else {'tokenizer': self.model.text.tokenize}) | (
      {} if label is None else {'classes': label.classes}
    )

  def examples(self, config: TrainingConfig, env: Env) -> tuple[Source, list[Callable]]:
    """Images with captions, or, with a cache, latents and embeddings of texts."""
    if not self.config.cache:
      return super().examples(config, env)
    if env.synthetic:
      source, _ = super().examples(config, env)
      return synthetic_cache(self.model, self.frozen, source), [Choose()]
    return self.cached(config, env), [Choose()]

  def cached(
    self, config: TrainingConfig, env: Env, kinds: Sequence[str] = KINDS
  ) -> CachedSource:
    """Fill the cache of the training data, or what is missing of it, and open it."""
    settings, data = self.config, config.data
    source, transforms = super().examples(config, env)
    own = any(part.transforms for part in data.mixture.values())
    moves = data.transforms or data.crop == 'random' or own
    null = {name.removesuffix('.bias'): x for name, x in self.frozen.get(NULL, {}).items()}
    return cached_source(
      source, self.model, self.frozen, env.mesh, name=data.name, null=null, kinds=kinds,
      folder=self.cache_folder(env) if settings.cache == 'disk' else None,
      options=Options(
        dtype=settings.cache_dtype, text_dtype=settings.cache_text_dtype,
        views=settings.cache_views, specs=seen(data), looks=looks(data), seed=config.loop.seed,
        transforms=transforms if moves else (),
        size=data.size, shape=data.shape, threads=data.workers, report=env.report,
      ),
    )

  def cache_folder(self, env: Env) -> Path:
    """Return where a cache on the disk is."""
    return Path(self.config.cache_dir) if self.config.cache_dir else env.workdir / 'cache'

  def initialize(self, key: jax.Array) -> Params:
    return self.trainable.initialize(key)

  def start(self, mesh: Mesh) -> Params | None:
    return self.trainable.start(self.frozen, mesh)

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    return self.trainable.weights(params, frozen)

  def carry(self) -> Carry:
    history = self.objective.history()
    return history._asdict() if history else {}

  def next_carry(self, carry: Carry, observed: Observed) -> Carry:
    return update_history(LossHistory(**carry), *observed)._asdict() if carry else carry

  def _from_examples(self, weights: Weights, batch: dict, key: jax.Array) -> Encoded:
    """Return what the frozen networks make of a batch of examples."""
    space, conditioners = self.model.space, self._conditioners
    keys = _keys([name for name, one in conditioners.items() if one.random], key)
    conditions = {
      name: one.of_batch(weights, batch, keys.get(name)) for name, one in conditioners.items()
    }
    moments = space.moments(weights, batch[space.field])
    return Encoded(moments, conditions, batch.get('weight'), batch.get(OWN))

  def _from_cache(self, weights: Weights, batch: dict, key: jax.Array) -> Encoded:
    """Return the same of a batch out of the cache, where it has been computed before."""
    del key
    columns = lambda names: {name: batch[name] for name in names}
    conditions = {
      name: columns(one.kept) if one.kept else one.of_batch(weights, batch)
      for name, one in self._conditioners.items()
    }
    return Encoded(columns(self.model.space.kept), conditions, dropout=batch.get(OWN))

  def nulls(self, weights: Weights) -> Params:
    """Return the null condition, that of trained encoders by their weights of now."""
    found = dict(weights.get(NULL, {}))
    for name in self._moving if self._drops else ():
      null = self._conditioners[name].null(weights)
      found |= {f'{field}.bias': value for field, value in null.items()}
    return found

  def drop(
    self, conditions: dict[str, Arrays], null: Params, key: jax.Array,
    rates: jax.Array | None = None,
  ) -> dict[str, Arrays]:
    """Put the null in the place of a random fraction of each condition that has one, and then of
    what each text encoder gives; rates: `Encoded.dropout`."""
    guided = [
      name for name, one in self._conditioners.items()
      if isinstance(one, Guided) and (self._drops or name not in self._moving)
    ]
    rate, out = self.config.caption_dropout, dict(conditions)
    rate = rate if rates is None else jnp.where(rates < 0, rate, rates)
    for name, key_drop in _keys(guided, key).items():
      count = len(next(iter(out[name].values())))
      dropped = jax.random.bernoulli(key_drop, rate, (count,))
      out[name] = {
        field: jnp.where(
          dropped.reshape(-1, *[1] * (value.ndim - 1)), null[f'{field}.bias'], value
        ) for field, value in out[name].items()
      }
      if name == TEXT:
        out[name] = self._drop_encoders(out[name], null, key_drop)
    return out

  def _drop_encoders(self, text: Arrays, null: Params, key: jax.Array) -> Arrays:
    """Put what an encoder gives of the empty text in the place of a random fraction of its own."""
    out, roles = dict(text), self.model.text.networks if self.config.encoder_dropout else ()
    for i, (role, rate) in enumerate(zip(roles, self.config.encoder_dropout, strict=False)):
      dropped = jax.random.bernoulli(jax.random.fold_in(key, i), rate, (len(text['text']),))
      for field, place in places_of(self.model.text, role).items():
        own = out[field][:, *place]
        gone = dropped.reshape(-1, *[1] * (own.ndim - 1))
        own = jnp.where(gone, null[f'{field}.bias'][place], own)
        out[field] = out[field].at[:, *place].set(own)
    return out

  def condition(
    self, conditions: dict[str, Arrays], null: Params, key: jax.Array, shape: tuple[int, ...],
    rates: jax.Array | None = None,
  ) -> Condition:
    """Return what the denoiser is given with z of this shape, a fraction of it dropped."""
    conditions = self.drop(conditions, null, key, rates)
    for name, one in self.model.conditioners.items():
      if one.usual and name not in conditions:
        size = (edge * self.model.space.factor for edge in shape[1:3])
        conditions[name] = one.of_size(shape[0], *size)
    return joined(conditions.values())

  def losses(self, params, frozen, carry: Carry, batch, key) -> Losses:
    """Return the losses of each example, and the noise level it was given."""
    key_z = key_drop = key_encode = None
    if self._draws:
      key_z, key_drop, key, key_encode = jax.random.split(key, 4)
    weights, space = self.weights(params, frozen), self.model.space
    encoded = self.encode(weights, batch, key_encode)
    x0, weight = space.sample(encoded.moments, key_z), encoded.weight
    x0 = constrain(x0, 'image') if x0.ndim == 4 else x0
    losses = self.losses_of(weights, x0, encoded, key_drop, key, carry)
    return losses if weight is None else losses._replace(loss=losses.loss * weight)

  def losses_of(
    self, weights: Weights, x0: jax.Array, encoded: Encoded, key_drop: jax.Array | None,
    key: jax.Array, carry: Carry,
  ) -> Losses:
    """Return the losses of z x0 [b ...] by the objective; keys for dropout, and for noise."""
    condition = self.condition(
      encoded.conditions, self.nulls(weights), key_drop, x0.shape, encoded.dropout
    )
    network = self.loss_model.network(weights)
    # Without a loss of its own a variance that published networks predict, too, is left out.
    extra = self.model.learned_variance and not self.config.objective.learned_variance
    kept = (lambda y: y[..., : x0.shape[-1]]) if extra else (lambda y: y)
    return self.objective.losses(
      lambda x, t: kept(network(x, t, condition)), x0, key, LossHistory(**carry) if carry else None
    )

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    """The loss, with metrics of the error by noise level."""
    losses = self.losses(params, frozen, carry, batch, key)
    bucket = jnp.floor(losses.level.position * TIME_BUCKETS).astype(int)
    which = jax.nn.one_hot(bucket, TIME_BUCKETS)
    metrics = {
      'loss': mean_metric(losses.loss),
      'loss_by_timestep': Average(losses.error @ which, which.sum(axis=0)),
    }
    observed = (losses.level.label, losses.error) if carry else ()
    return losses.loss.mean(), (metrics, observed)

  @property
  def sample_batch(self) -> dict[str, int]:
    """Images sampled at a time, if not the evaluators' number."""
    return {}

  def preview_inputs(self) -> Inputs:
    """Return what the conditioners make of images of the test split, one for each caption."""
    count = len(self.config.preview_captions)
    records = first_readable(self.test, count)
    images = np.stack([records[i % len(records)]['image'] for i in range(count)])
    found = [conditioner.examples(images) for conditioner in self.model.conditioners.values()]
    return Inputs(**{name: array for one in found for name, array in one.items()})

  def evaluators(self, mesh: Mesh) -> list[Any]:
    config, batch = self.config, self.sample_batch
    if config.with_images:
      about = next(c.about for c in self.model.conditioners.values() if c.about)
      batch |= {'inputs': self.preview_inputs, 'about': about}
    preview = load(EVALUATORS, 'caption_preview')(
      config.preview_captions, config.sample, mesh, sizes=config.preview_sizes, **batch
    )
    if config.with_images:
      return [preview]
    features = config.evaluation.features or (f'clip:{config.clip}',)
    return [preview, load(EVALUATORS, 'generated_images')(
      features, config.evaluation.metrics, config.sample, self.train, self.test, mesh, **batch
    )]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the whole model as a directory that `sample --model` reads."""
    config, texts = self.config, self.trainable.changed(params)
    _, denoiser = texts.pop(DENOISER)
    more = {'texts': texts} if texts else {}
    load(EXPORTS, 'model')(
      directory, self.model, denoiser, space=config.space, conditioners=config.conditioned,
      sample=config.sample, dtype=config.export_dtype, **more,
    )
