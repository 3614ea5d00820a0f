"""sample --invert and --interpolate: pictures to noise and back, and strips between two."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from diffusion_jax.cli.options import with_values
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Help, Range

if TYPE_CHECKING:
  import numpy as np

STEPS, MOST = 50, 1000
"""Steps if nothing is said, and most frames of a strip."""
LATENTS = 'inverted.npy'
NOISE = 'noise'
"""One of `Generator.interpolates`."""


@dataclasses.dataclass(frozen=True)
class InvertOptions:
  """What is done with the noise of pictures."""

  invert: Annotated[bool, Help(
    f'find the noise from which the model draws --image, write it as {LATENTS}, draw it again and '
    'say how far the result is off; by DDIM without noise and, if nothing else is said, without '
    f'guidance, in {STEPS} steps'
  )] = False
  to: Annotated[str, Help(
    'with --interpolate: the picture at the other end from --image', 'FILE'
  )] = ''
  interpolate: Annotated[Annotated[int, Range(2, MOST)] | None, Help(
    'so many pictures on the way from --image to --to, or between the first two prompts; their '
    "noises, or of a model of CLIP's embeddings these, lie on a great circle, and a strip of them "
    'is grid.png', 'N'
  )] = None
  inversion_calls: Annotated[Annotated[int, Range(1, 100)] | None, Help(
    'with --invert or --image and --to: network calls that undo a step, the more the nearer '
    '(default: 3)', 'N'
  )] = None

  def __post_init__(self):
    if self.to and self.interpolate is None:
      raise UserError('--to is the end of a way; give --interpolate N, too.')

  @property
  def wanted(self) -> bool:
    """True if there is anything to do."""
    return bool(self.invert or self.interpolate)

  def check(self, image: str, others: Sequence[Any], prompts: Sequence[str]) -> None:
    """Raise UserError for options that mean nothing together; others: dataclasses of such."""
    if self.inversion_calls is not None and not (self.invert or self.to):
      raise UserError('--inversion_calls are of --invert or --to; leave it out.')
    if not self.wanted:
      return
    given = {n for one in others for n, v in vars(one).items() if v != getattr(type(one)(), n)}
    if beyond := sorted(given - {'image'}):
      raise UserError(f'--{beyond[0]} has no part in --invert and --interpolate; leave it out.')
    if self.interpolate and bool(self.to) != bool(image):
      raise UserError('a way between pictures has two ends; give both --image and --to.')
    if self.invert and self.interpolate:
      raise UserError('--invert and --interpolate are two things; leave one out.')
    if self.invert and not image:
      raise UserError('--invert is of a picture; give --image FILE.')
    if len(prompts) not in ((1,) if self.invert else (1, 2) if self.to else (2,)):
      raise UserError(
        f'there are {len(prompts)} prompts; give '
        + ('one, of the picture.' if self.invert else 'one for both pictures, or one for each.'
           if self.to else 'two to go between.')
      )

  def check_model(self, model) -> None:
    """Raise UserError for a model that has no such way."""
    if not self.wanted or model.interpolates == NOISE:
      return
    if not model.interpolates:
      raise UserError('the model draws from no one noise; leave --invert and --interpolate out.')
    if self.invert or self.inversion_calls is not None:
      raise UserError(
        'the model draws by embeddings, which are not inverted; leave --invert and '
        '--inversion_calls out.'
      )

  def settings(self, model, config, values: Mapping[str, Any]):
    """Return the settings to invert with: what was given, else DDIM's in many steps, unguided."""
    if model.interpolates != NOISE or not (self.invert or self.to):
      return config
    from diffusion_jax.pipelines.inversion import SAMPLER, check

    found = with_values(config, {'sampler': SAMPLER, 'steps': STEPS, 'guidance': 1.0} | values)
    check(found)
    return found

  def named(self) -> dict[str, str]:
    """Return what a picture's metadata say of it."""
    names = ('invert', 'to', 'interpolate', 'inversion_calls')
    return {name: str(getattr(self, name)) for name in names if getattr(self, name)}

  def run(
    self, model, weights, prompts: Sequence[str], config, image: str, out: Path,
    drawn: tuple[int, int], *, mesh, negative: str, **sized: int,
  ) -> tuple[Iterator[np.ndarray], list[str]]:
    """Return (batches of pictures, uint8, the prompt of each) of --invert or --interpolate.

    drawn: the size that is drawn. sized: seed, height, width and batch_size.
    """
    if model.interpolates != NOISE:
      how = {'mesh': mesh, 'seed': sized['seed'], 'batch_size': sized['batch_size']}
      return self._embedded(model, weights, prompts, config, image, drawn, negative, **how)
    import numpy as np

    from diffusion_jax.diffusion.samplers import initial_noise
    from diffusion_jax.pipelines import inversion
    from diffusion_jax.pixels import to_uint8

    how = {'mesh': mesh, 'negative': negative}
    ends = [prompts[0], prompts[-1]] if self.interpolate else list(prompts)
    if not image:
      shape = model.space.shape(*drawn)
      noise = np.asarray(initial_noise(sized['seed'], 0, 2, shape)[0])
    else:
      pictures = read([image, *filter(None, [self.to])], sized['height'], sized['width'])
      calls = self.inversion_calls or inversion.ITERATIONS
      noise = inversion.invert(
        model, weights, pictures, ends, config, iterations=calls,
        batch_size=sized['batch_size'], **how,
      )
    if self.invert:
      from diffusion_jax.files import atomic_write

      with atomic_write(out / LATENTS) as file:
        np.save(file, noise, allow_pickle=False)
      again = model.generate(weights, ends, config, noise=noise, **how, **sized)
      return _measured(again, pictures), ends
    frames = inversion.strip(
      model, weights, noise, ends, self.interpolate, config, **how, **sized
    )
    return map(to_uint8, frames), self._nearer(ends)

  def _nearer(self, ends: Sequence[str]) -> list[str]:
    """Return the prompt of the nearer end for each of a strip."""
    return [ends[2 * i >= self.interpolate] for i in range(self.interpolate)]

  def _embedded(
    self, model, weights, prompts: Sequence[str], config, image: str, drawn: tuple[int, int],
    negative: str, **how,
  ) -> tuple[Iterator[np.ndarray], list[str]]:
    """As `run`, of a strip between the embeddings of pictures, or of those drawn for prompts."""
    from diffusion_jax.pixels import to_uint8

    ends = [prompts[0], prompts[-1]]
    if image:
      found = model.embed(weights, read([image, self.to], *drawn))
    else:
      found = model.embeddings(weights, ends, config, negative=negative, **how)
    return map(to_uint8, model.strip(weights, found, self.interpolate, **how)), self._nearer(ends)


def read(files: Sequence[str], height: int, width: int) -> np.ndarray:
  """Return pictures as uint8 [n height width 3], scaled until they cover that, and cut."""
  import numpy as np

  from diffusion_jax.data.pictures import read_pictures

  sizes = {'image': (height, width)}
  return np.concatenate([read_pictures({'image': f}, sizes).arrays['images'] for f in files])


def _measured(batches, pictures: np.ndarray) -> Iterator[np.ndarray]:
  """Yield the batches, then say how far they are from the pictures."""
  import numpy as np

  found = []
  for batch in batches:
    found.append(batch)
    yield batch
  off = np.concatenate(found).astype(float) - pictures
  error = float((off**2).mean())
  psnr = 10 * np.log10(255**2 / error) if error else np.inf
  print(f'there and back: root mean square error {error**0.5:.2f} of 255, PSNR {psnr:.1f} dB')
