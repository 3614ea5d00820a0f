"""What is fuzzed of files of adapters, of all kinds."""

import numpy as np

from tests.faults import mutants
from tests.faults.fuzz_targets import Target


def lora():
  from diffusion_jax.formats.adapter_weights import AdapterWeights
  from diffusion_jax.formats.adapters import LoRAWeights, read_lora, write_lora
  from diffusion_jax.models.adapters import Rank

  dense, conv = np.zeros((4, 6)), np.zeros((3, 3, 4, 4))
  names = {'to_q': dense, 'to_k': dense, 'to_v': dense, 'to_out': dense, 'conv': conv}
  shapes = {f'mid.{name}.kernel': value for name, value in names.items()}

  def make(folder):
    rng = np.random.default_rng(0)
    draw = lambda **shapes: {part: rng.normal(size=shape) for part, shape in shapes.items()}
    lokr = draw(w1=(2, 2), w2_a=(3, 1), w2_b=(1, 2), magnitude=(6, 1))
    loha = draw(w1_a=(6, 2), w1_b=(2, 4), w2_a=(6, 2), w2_b=(2, 4))
    weights = {
      'mid.to_q': LoRAWeights(rng.normal(size=(4, 2)), rng.normal(size=(2, 6)), 2.0),
      'mid.conv': LoRAWeights(rng.normal(size=(3, 3, 4, 2)), rng.normal(size=(1, 1, 2, 4)), 2.0),
      'mid.to_k': AdapterWeights(lokr, Rank(1, 1.0, 'lokr', dora=True)),
      'mid.to_v': AdapterWeights(loha, Rank(2, 1.0, 'loha')),
      'mid.to_out': AdapterWeights(draw(blocks=(3, 2, 2)), Rank(1, 0.0, 'diag_oft')),
    }
    write_lora(folder / 'x.safetensors', {'unet': weights})

  return Target(
    'lora', make, lambda folder: read_lora(folder / 'x.safetensors', {'unet': shapes}),
    {'x.safetensors': [mutants.safetensors]}, 200,
  )
