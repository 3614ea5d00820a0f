"""What a model takes beside the prompt: pictures to start from or to follow, masks, controls.

What the U-Net is told beside the latents follows from how many channels it takes: none; one, a
depth map; 1 + c, a mask and the latents of the masked picture (inpainting); c, the latents of the
picture to edit (InstructPix2Pix, Brooks et al. 2023); 3, a small picture to enlarge (Rombach et al.
2022, sec. 4.5) with a noise level. c are the channels of the latents.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.image_encoder import ImageEncoder
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Condition, Latents, Weights

OPTIONS = {
  'images': '--image', 'masks': '--mask', 'control': '--control', 'depth': '--depth',
  'small': '--small', 'reference': '--reference',
}
"""The pictures among `Inputs`, and how the command `sample` is given them."""
STRENGTH = 0.8
TOP_LEVEL = 350
"""The largest noise level that the x4 upscaler was trained with."""


def kind_of_input(model) -> str:
  """'none', 'depth', 'inpaint', 'edit' or 'upscale'. UserError for another number of channels."""
  kinds = {0: 'none', 1: 'depth', 1 + model.channels: 'inpaint', model.channels: 'edit',
           3: 'upscale'}
  if model.beside not in kinds:
    raise UserError(
      f'the U-Net takes {model.beside} channels beside {model.channels} of latents; known are '
      f'{", ".join(f"{n} ({kind})" for n, kind in kinds.items())}.'
    )
  return kinds[model.beside]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Arrays of one picture for each prompt, or of one for all.

  images: uint8 [n H W 3]: what to start from (Meng et al. 2022, SDEdit), to repaint or to edit.
  strength: share of the steps in (0, 1] that starting from an image takes; None: 1 for a U-Net
  that is shown the image itself, else STRENGTH.
  masks: bool [n H W], true where an inpainting model paints.
  control: uint8 [n H W 3], what a ControlNet sees, with control_strength.
  depth: float32 [n h w] in [-1, 1], near is 1, at the latents' size.
  small: uint8 [n h w 3], to enlarge, at the latents' size, with noise_level in [0, 350].
  reference: uint8 [n s s 3], to vary, at the size of the model's image encoder.
  small_noise: float32 [n h w 3], what the small picture is noised with; None: noise of the seed.
  """

  images: np.ndarray | None = None
  strength: float | None = None
  masks: np.ndarray | None = None
  control: np.ndarray | None = None
  control_strength: float = 1.0
  depth: np.ndarray | None = None
  small: np.ndarray | None = None
  noise_level: int = 20
  small_noise: np.ndarray | None = None
  reference: np.ndarray | None = None

  def share(self, model) -> float:
    """Share of the steps that are taken."""
    if self.strength is not None:
      return self.strength
    return 1.0 if self.images is None or 'images' in _needs(model) else STRENGTH

  def rows(self, model, n: int) -> dict[str, np.ndarray]:
    """Columns [n ...] for the compiled program; UserError where they do not fit the model."""
    needs = _needs(model)
    given = {
      name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None
    }
    for name in sorted(needs - given.keys()):
      raise UserError(
        f'the model needs {name} beside the prompts; give {OPTIONS[name]}, in code '
        f'Inputs({name}=...).'
      )
    for name in given.keys() - needs - {'images'}:
      raise UserError(
        f'the model takes no {name}; leave {OPTIONS[name]} out, or use a model that does.'
      )
    edge, latent = model.image_size, model.latent_shape[0]
    seen = model.text.size if isinstance(model.text, ImageEncoder) else 0
    shapes = {
      'images': (edge, edge, 3), 'masks': (edge, edge), 'control': (edge, edge, 3),
      'depth': (latent, latent), 'small': (latent, latent, 3),
      'reference': (seen, seen, 3),
    }
    out = {name: _fitting(name, value, shapes[name], n) for name, value in given.items()}
    if 'images' in out and (not needs & {'images'} or self.share(model) < 1):
      out['start'] = out['images']
    if 'control' in given:
      out['strength'] = np.full(n, self.control_strength, np.float32)
    if 'small' in given:
      if not 0 <= self.noise_level <= TOP_LEVEL:
        raise UserError(f'noise_level is {self.noise_level}; give one from 0 to {TOP_LEVEL}.')
      out['level'] = np.full(n, self.noise_level, np.int32)
      if self.small_noise is not None:
        out['small_noise'] = _fitting('small_noise', self.small_noise, shapes['small'], n)
    return out


def _needs(model) -> set[str]:
  needs = {'none': set(), 'depth': {'depth'}, 'inpaint': {'images', 'masks'}, 'edit': {'images'},
           'upscale': {'small'}}[kind_of_input(model)]
  needs |= {'reference'} if isinstance(model.text, ImageEncoder) else set()
  return needs | ({'control'} if model.controlnet else set())


def _fitting(name: str, value: np.ndarray, shape: tuple[int, ...], n: int) -> np.ndarray:
  dtype = {'masks': np.bool_, 'depth': np.float32, 'small_noise': np.float32}.get(name, np.uint8)
  if value.dtype != dtype or value.shape[1:] != shape or len(value) not in (1, n):
    raise UserError(
      f'{name} are {value.dtype} {list(value.shape)}; give {np.dtype(dtype)} [1 or {n}, '
      f'{", ".join(map(str, shape))}].'
    )
  return np.broadcast_to(value, (n, *shape))


def prepared(
  model, weights: Weights, condition: Condition, negative: Condition, rows: dict, grid
) -> tuple[Condition, Condition, Latents]:
  """The conditions with what `Inputs.rows` has, and x at the first noise level of the grid.

  With and without the prompt, the model is told the same beside it. The start is noise for a model
  that is shown the picture itself and takes all steps, else the noised picture.
  """
  kind, x, told = kind_of_input(model), rows['x'], {}
  autoencoder = weights['autoencoder']
  if kind == 'inpaint':
    told['image'] = inpainting_image(model, autoencoder, to_float(rows['images']), rows['masks'])
  elif kind == 'edit':
    told['image'] = edited_image(model, autoencoder, to_float(rows['images']))
  elif kind == 'depth':
    told['image'] = rows['depth'][..., None]
  elif kind == 'upscale':
    noise = rows['small_noise'] if 'small_noise' in rows else small_noise(rows)
    told['image'] = noised_small(model, to_float(rows['small']), rows['level'], noise)
    told['labels'] = rows['level']
  if 'reference' in rows:
    condition = condition._replace(text=model.text.see(weights, rows['reference']))
  if 'control' in rows:
    told |= {'control': rows['control'] / jnp.float32(255), 'strength': rows['strength']}
  if 'start' in rows:
    alpha, sigma = grid[0][0], grid[1][0]
    x = alpha * model.encode(autoencoder, to_float(rows['start'])) + sigma * x
  return condition._replace(**told), negative._replace(**told), x


def inpainting_image(model, autoencoder, images: jax.Array, masks: jax.Array) -> jax.Array:
  """Images [b H W 3] in [-1, 1] and masks [b H W], true where to paint -> [b h w 1 + c]."""
  masked = jnp.where(masks[..., None], 0.0, images)
  latents = model.encode(autoencoder, masked)
  step = masks.shape[1] // latents.shape[1]
  return jnp.concatenate([masks[:, ::step, ::step, None].astype(jnp.float32), latents], axis=-1)


def edited_image(model, autoencoder, images: jax.Array) -> jax.Array:
  """Images [b H W 3] in [-1, 1] -> [b h w c]; InstructPix2Pix sees latents that are not scaled."""
  mean, _ = model.autoencoder.bind(autoencoder).encode(images)
  return mean.astype(jnp.float32)


def noised_small(model, images: jax.Array, level: jax.Array, noise: jax.Array) -> jax.Array:
  """Images [b h w 3] in [-1, 1], noised to step level [b] of the schedule for small pictures."""
  alpha, sigma = (part[:, None, None, None] for part in model.small_schedule(level))
  return (alpha * images + sigma * noise).astype(jnp.float32)


def small_noise(rows: dict) -> jax.Array:
  """Unit noise [b h w 3] for the small pictures, from each image's key."""
  one = lambda key: jax.random.normal(
    jax.random.fold_in(jax.random.wrap_key_data(key), 2**31 - 1), rows['small'].shape[1:]
  )
  return jax.vmap(one)(rows['keys'])


def check_edited(model, image_guidance: float) -> None:
  """UserError for guidance by a picture in a model that edits none."""
  if image_guidance != 1 and kind_of_input(model) != 'edit':
    raise UserError(
      f'image_guidance is {image_guidance:g}, but the model edits no picture; leave it at 1.'
    )
