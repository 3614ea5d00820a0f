"""DALL-E (Ramesh et al. 2021) as a model: a caption's tokens, then an image's, then the picture.

A directory has the transformer, the autoencoder whose codes are its tokens, and CLIP, whose
vocabulary it reads and which chooses among several pictures of a caption (section 2.6).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.backend import xla
from diffusion_jax.config import typed
from diffusion_jax.errors import UserError, require
from diffusion_jax.files import INDEX, inside, reading
from diffusion_jax.formats.autoencoder import QUANTIZED
from diffusion_jax.formats.clip import pixel_statistics
from diffusion_jax.formats.networks import Part, read_part, resolve, save_params
from diffusion_jax.formats.pipeline import keep_folder, own_path
from diffusion_jax.formats.tensors import read_json, write_json
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import unit
from diffusion_jax.models.text.tokenizer import Tokenize, load_tokenizer
from diffusion_jax.models.token_transformer import Filter, sample_tokens
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pipelines.generator import CLASS, NumbersOnly, OfOneSize
from diffusion_jax.pipelines.options import FINITE, TokenOptions
from diffusion_jax.types import Images, Params, Weights

KIND = 'ImageTokens'
TRANSFORMER, AUTOENCODER, CLIP = 'transformer', 'autoencoder', 'clip'
"""The roles of its networks, and their folders."""


@dataclasses.dataclass(frozen=True)
class TokenSampleConfig(TokenOptions, NumbersOnly):
  """How tokens are drawn; guidance: classifier-free, on logits; 1 is none."""

  guidance: Annotated[float, FINITE] = 1.0


class Numbers(NamedTuple):
  """What the program is given besides prompts: changes compile nothing."""

  keep: Filter
  guidance: np.float32


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTokens(OfOneSize):
  """Captions -> tokens -> images. `mean` and `std`: of pixels in [0, 1], as CLIP sees them."""

  transformer: Network
  autoencoder: Network
  clip: Network
  tokenize: Tokenize
  mean: Sequence[float] = (0.5,) * 3
  std: Sequence[float] = (0.5,) * 3
  Sample: ClassVar = TokenSampleConfig
  drawn_by: ClassVar = (TRANSFORMER,)

  @property
  def networks(self) -> Mapping[str, Network]:
    return {TRANSFORMER: self.transformer, AUTOENCODER: self.autoencoder, CLIP: self.clip}

  @property
  def text(self) -> Tokenize:
    return self.tokenize

  @property
  def trained_size(self) -> tuple[int, int]:
    config, factor = self.transformer.config, self.autoencoder.config.factor
    return config.rows * factor, config.columns * factor

  def check_prompts(self, prompts, syntax=''):
    dataclasses.replace(self.tokenize, on_long='error').batch(prompts)

  def rows(self, prompts, *_, **__):
    """'text' [n l], the tokens of the prompts."""
    return {'text': self.tokenize.batch(prompts)}

  def encode(self, weights: Weights, images: Images) -> jax.Array:
    """Images [b h w 3] in [-1, 1] -> their tokens [b n]."""
    indices = self.autoencoder.bind(weights[AUTOENCODER]).encode_indices(images)
    return indices.reshape(len(images), -1)

  def decode(self, weights: Weights, tokens: jax.Array) -> Images:
    """Tokens [b n] -> images [b h w 3] in [-1, 1]."""
    config = self.transformer.config
    grid = tokens.reshape(-1, config.rows, config.columns)
    images = self.autoencoder.bind(weights[AUTOENCODER]).decode_indices(grid)
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)

  def embed(self, weights: Weights, images: Images) -> jax.Array:
    """Images [b h w 3] in [-1, 1] -> their embeddings by CLIP [b p], float32."""
    clip, edge = self.clip.bind(weights[CLIP]), self.clip.config.vision_config.image_size
    pixels = jax.image.resize((images + 1) / 2, (len(images), edge, edge, 3), 'cubic')
    pixels = (jnp.clip(pixels, 0, 1) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    return clip.encode_image(pixels.astype(jnp.float32)).astype(jnp.float32)

  def likeness(self, weights: Weights, images: Images, text: jax.Array) -> jax.Array:
    """CLIP's cosine of images [b h w 3] in [-1, 1] and captions [b l]: [b]."""
    return self.cosine(weights, self.embed(weights, images), text)

  def cosine(self, weights: Weights, embeddings: jax.Array, text: jax.Array) -> jax.Array:
    """The cosine of embeddings [b p] and those of captions [b l]: [b]."""
    told = self.clip.bind(weights[CLIP]).encode_text(text)[1].astype(jnp.float32)
    return (unit(embeddings) * unit(told)).sum(-1)

  @functools.partial(xla.jit, static_argnums=(0, 3, 4))
  def _sample(
    self, weights: Weights, rows: dict, guided: bool, candidates: int, numbers: Numbers
  ) -> Images:
    """Draw, decode, and of several candidates keep the one most like its caption."""
    several = lambda x: jnp.repeat(x, candidates, axis=0)
    text, b = several(rows['text']), len(rows['text'])
    keys = jax.random.wrap_key_data(rows['keys'])
    keys = jax.vmap(lambda key: jax.random.split(key, candidates))(keys).reshape(-1)
    null = several(rows['null']) if guided else None
    model = self.transformer.bind(weights[TRANSFORMER])
    tokens = sample_tokens(model, text, keys, numbers.keep, null, numbers.guidance)
    images = self.decode(weights, tokens)
    if candidates == 1:
      return images
    best = self.likeness(weights, images, text).reshape(b, candidates).argmax(-1)
    return images.reshape(b, candidates, *images.shape[1:])[jnp.arange(b), best]

  def sample(
    self, weights, prompts, config: TokenSampleConfig, *, seed, mesh, negative='', batch_size=16,
    first=0, inputs=None, height=None, width=None,
  ) -> Iterator[np.ndarray]:
    """Yield images, float32 [b h w 3] in [-1, 1], batch after batch; one compilation for all.

    Image i depends on the seed, its number first + i and its prompt alone.
    """
    keys = self.keys(
      config, len(prompts), seed=seed, first=first, negative=negative, height=height, width=width
    )
    text = self.rows(prompts)['text']
    null = np.broadcast_to(self.tokenize(''), text.shape)
    keep = Filter(
      np.float32(config.temperature), np.int32(config.top_k), np.float32(config.top_p)
    )
    numbers = Numbers(keep, np.float32(config.guidance))

    def draw(weights: Weights, text, null, keys) -> Images:
      rows = {'text': text, 'null': null, 'keys': keys}
      return self._sample(weights, rows, config.guidance != 1, config.candidates, numbers)

    yield from in_batches(draw, weights, text, null, keys, mesh=mesh, batch_size=batch_size)


def make(
  parts: Mapping[str, Part | Network], dtype=jnp.float32, kind: type[ImageTokens] = ImageTokens
) -> ImageTokens:
  """Return the model of its parts, of which all but CLIP may be given as networks.

  UserError where they do not fit together.
  """
  made = lambda part: part if isinstance(part, Network) else part.network(dtype=dtype)
  clip, network, autoencoder = parts[CLIP], made(parts[TRANSFORMER]), made(parts[AUTOENCODER])
  config = network.config
  tokenizer = load_tokenizer(resolve(clip.path))
  for name, given, wanted in (
    ('image_vocab_size', config.image_vocab_size, autoencoder.config.vocabulary),
    ('vocab_size', config.vocab_size, len(tokenizer)),
    ('text_length', config.text_length, clip.config.text_config.max_position_embeddings),
  ):
    require(
      given == wanted, f'the transformer has {name} {given}, but its other parts have {wanted}; '
      'use those that it was trained with.',
    )
  pixels = pixel_statistics(*clip.json('preprocessor_config.json'))
  tokenize = Tokenize(tokenizer, config.text_length)
  return kind(network, autoencoder, clip.network(dtype=dtype), tokenize, **pixels)


def read(
  path: str, dtype=jnp.float32, kind: type[ImageTokens] = ImageTokens,
  codes: Sequence[str] = QUANTIZED,
) -> tuple[ImageTokens, dict[str, Part], TokenSampleConfig]:
  """As `pipelines.generator.read_generator`, of a directory that `save` wrote.

  codes: kinds of what makes tokens.
  """
  directory = resolve(path)
  where = directory / INDEX
  index = read_json(inside(where, directory))
  with reading(where, 'describes no model', 'export it again'):
    place = lambda role: own_path(str(index[role]), directory)
    kinds = {TRANSFORMER: ('token_transformer',), AUTOENCODER: codes, CLIP: ('clip',)}
    parts = {role: read_part(place(role)).expect(kinds[role]) for role in kinds}
    given = dict(index.get('sample', {}))
  known = {field.name for field in dataclasses.fields(TokenSampleConfig)}
  try:  # Later versions may say more.
    sample = typed(TokenSampleConfig, {n: v for n, v in given.items() if n in known}, 'sample.')
  except UserError as error:
    raise UserError(f'{path} cannot be sampled: {error}') from error
  return make(parts, dtype, kind), parts, sample


def save(
  directory: Path, config: Any, params: Params, *, autoencoder: str, clip: str,
  sample: TokenSampleConfig, dtype: str, kind: str = KIND,
) -> None:
  """Write the transformer with copies of the other parts, or the assets' names, as `read` reads.

  autoencoder: '' where it is in the directory already.
  """
  save_params(directory / TRANSFORMER, config, params, dtype=dtype)
  write_json(directory / INDEX, {
    CLASS: kind, TRANSFORMER: TRANSFORMER, 'sample': dataclasses.asdict(sample),
    AUTOENCODER: keep_folder(autoencoder, directory, AUTOENCODER) if autoencoder else AUTOENCODER,
    CLIP: keep_folder(clip, directory, CLIP),
  })
