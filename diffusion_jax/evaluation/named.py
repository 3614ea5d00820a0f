"""Features by the names that commands and configs give them: KIND:PATH."""

from collections.abc import Sequence

from jax.sharding import Mesh

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extraction import column
from diffusion_jax.evaluation.extractors import NAMES, Extractor, load_extractor
from diffusion_jax.evaluation.features import CLIPFeatures
from diffusion_jax.evaluation.scores import outputs_of
from diffusion_jax.formats.networks import resolve
from diffusion_jax.models.features.inception import InceptionConfig
from diffusion_jax.models.text.tokenizer import load_tokenizer


def check_named(named: Sequence[str], option: str = '--features') -> None:
  """UserError, naming the option, for a name that is not KIND:PATH with a kind of NAMES."""
  for text in named:
    kind, colon, _ = text.partition(':')
    if not colon or kind not in NAMES:
      raise UserError(
        f'{option} {text} is not of the form KIND:PATH with a kind of {", ".join(NAMES)}.'
      )


def load_named(
  named: Sequence[str], metrics: Sequence[str], mesh: Mesh, option: str = '--features'
) -> list[Extractor]:
  """An extractor for each KIND:PATH, on the mesh; Inception computes what the metrics need.

  UserError for a name of another form, an unknown metric, or weights that cannot be read.
  """
  check_named(named, option)
  found = []
  for text in named:
    kind, _, path = text.partition(':')
    inception = kind.startswith('inception')
    # ImageNet's logits know nothing of the classes of one's own.
    widths = {k: v for k, v in InceptionConfig().widths.items() if k != 'logits'}
    outputs = outputs_of(metrics, widths) if inception else ()
    found.append(load_extractor(kind, path, outputs=outputs, mesh=mesh))
  return found


def text_towers(
  named: Sequence[str], extractors: Sequence[Extractor], mesh: Mesh
) -> dict[str, CLIPFeatures]:
  """Column -> what embeds captions for it, of every CLIP with a text tower among them."""
  found = {}
  for text, extractor in zip(named, extractors, strict=True):
    kind, _, path = text.partition(':')
    if kind == 'clip' and extractor.has_texts:
      found[column(extractor, 'embedding')] = CLIPFeatures(
        extractor, load_tokenizer(resolve(path)), mesh
      )
  return found
