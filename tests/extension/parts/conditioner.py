"""A conditioner: the letters of a caption, each as one row of an identity, in place of a text."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion_jax.pipelines.conditioners import Guided
from diffusion_jax.registry import CONDITIONERS, register

WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Letters(Guided):
  """'text' [b length WIDTH]; its null is zero."""

  length: int = 8
  fields: ClassVar = ('letters',)
  kept: ClassVar = ('text',)

  def embed(self, text):
    """A text as an array [length WIDTH]."""
    numbers = [ord(letter) % WIDTH for letter in text[: self.length]]
    rows = np.eye(WIDTH, dtype=np.float32)[numbers]
    return np.pad(rows, [(0, self.length - len(rows)), (0, 0)])

  def prompt(self, record):
    return record['captions'][0]

  def rows(self, request):
    return {'letters': np.stack([self.embed(prompt) for prompt in request.prompts])}

  def encode(self, weights, rows):
    return {'text': rows['letters']}

  def null(self, weights):
    return {'text': jnp.zeros((self.length, WIDTH))}


register(CONDITIONERS, 'letters', f'{__name__}:Letters')
