"""evaluate steps: whether pictures settle as steps grow."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.settling import changes, drawn_by
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pixels import to_uint8

if TYPE_CHECKING:
  from diffusion_jax.cli.evaluate import StepsEvaluation

SHOWN = 4
"""Captions whose pictures the page shows."""


def steps(options: StepsEvaluation, sample: dict[str, Any], shown: dict) -> dict[str, Any]:
  """Draw the same noise by more and more steps of several samplers."""
  from diffusion_jax.cli.subject import Subject, own_prompts

  for name in ('sampler', 'steps'):
    if name in sample:
      raise UserError(f'--{name} does nothing beside --samplers and --counts; leave it out.')
  subject = Subject(options, sample, make_mesh(MeshConfig()))
  if not hasattr(subject.sample, 'sampler'):
    raise UserError(f'{subject.name} does not draw by a sampler, whose steps could grow.')
  prompts = own_prompts(options).captions if options.captions else [
    subject.model.prompt(record) for record in shuffled(subject.test, options.samples)
  ]
  weights = subject.weights(options.ema_halflife_images)()
  drawn = drawn_by(
    subject.model, weights, prompts, subject.sample, options.names, options.numbers,
    seed=options.seed, mesh=subject.mesh, batch_size=options.batch,
  )
  found = {name: changes(images) for name, images in drawn.items()}
  shown['settling'] = {
    name: np.stack([to_uint8(part[:SHOWN]) for part in images.values()], axis=1)
    for name, images in drawn.items()
  }
  return {
    **{name: {f'change_at_{n}_steps': x for n, x in of.items()} for name, of in found.items()},
    'settling': {
      'steps': options.numbers, 'changes': {name: list(of.items()) for name, of in found.items()}
    },
    'settings': {'model': subject.identity(options.ema_halflife_images), 'seed': options.seed,
                 'samples': len(prompts), **dataclasses.asdict(subject.sample)},
    'measured': subject.about,
  }
