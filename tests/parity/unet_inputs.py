"""Random inputs for a U-Net or ControlNet: for ours and, the same, for diffusers'."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from diffusion_jax.types import Condition

SIDES = (8, 12)  # Divisible by what the tests' networks halve.


def inputs(config, rng, size=SIDES):
  """Arguments of our call; positional and keyword arguments of diffusers'."""
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, t = draw(2, *size, config.in_channels), np.array([3, 700])
  text = draw(2, 5, config.cross_attention_dim)
  ours, theirs = {}, {}
  if 'labels' in config.conditions:
    projected = config.class_embed_type == 'projection'
    width = config.projection_class_embeddings_input_dim
    numbers = np.array([0, (config.num_class_embeds or 9) - 1])
    ours['labels'] = draw(2, width) if projected else numbers
    theirs['class_labels'] = torch.tensor(ours['labels'])
  if 'sizes' in config.conditions:
    ours['sizes'] = np.array([[64, 48, 0, 3, 128, 96], [512, 31, 7, 0, 1024, 768]])
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    ours['pooled'] = draw(2, width)
    theirs['added_cond_kwargs'] = {
      'text_embeds': torch.tensor(ours['pooled']), 'time_ids': torch.tensor(ours['sizes'])
    }
  if 'guidance' in config.conditions:
    ours['guidance'] = np.array([1.0, 7.3], np.float32)
    theirs['timestep_cond'] = StableDiffusionPipeline.get_guidance_scale_embedding(
      None, torch.tensor(ours['guidance'] - 1), config.time_cond_proj_dim
    )
  ours = x, t, Condition(text=text, **ours)
  return ours, ((nchw(x), torch.tensor(t), torch.tensor(text)), theirs)


def nchw(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)
