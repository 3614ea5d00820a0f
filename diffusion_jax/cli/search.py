"""search: pictures of a folder by a text or by a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from diffusion_jax.cli.options import add_options, read_options, writing
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.options import CLIP
from diffusion_jax.limits import Help, Range

if TYPE_CHECKING:
  import numpy as np

  from diffusion_jax.evaluation.embeddings import PictureFiles
  from diffusion_jax.viz.search import Result

HELP = 'find pictures of a folder by a text or a picture'
DESCRIPTION = """Prints the pictures whose CLIP embeddings are nearest to that of each text or
picture, writes FILE.html, a page that shows them, and FILE.json. Embeddings are kept on the disk
by what is in the files: a second search embeds only what is new, whatever it is called.

examples:
  python -m diffusion_jax search pictures --text 'red apple' --text 'a cat' --out found.html
  python -m diffusion_jax search pictures --picture cat.png --top 8 --out alike.html"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
  """Queries, and where the results go."""

  paths: tuple[str, ...]
  text: Annotated[tuple[str, ...], Help('a text to search for; repeat for several', 'TEXT')] = ()
  picture: Annotated[tuple[str, ...], Help(
    'a picture, the like of which to search for; repeat for several', 'FILE'
  )] = ()
  top: Annotated[int, Range(1, 1000), Help('pictures for each query (default: 20)', 'N')] = 20
  clip: Annotated[str, Help(f'a CLIP with both towers (default: {CLIP})', 'DIR')] = CLIP
  cache: Annotated[str, Help(
    'where embeddings are kept (default: ~/.cache/diffusion_jax/embeddings)', 'DIR'
  )] = ''
  out: Annotated[str, Help('where the page goes, with FILE.json beside it', 'FILE.html')]

  def __post_init__(self):
    if not self.text and not self.picture:
      raise UserError('there is nothing to search for; give --text TEXT or --picture FILE.')
    if not self.out.endswith('.html'):
      raise UserError(f'--out {self.out} is no name of a page; call it {self.out}.html.')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Where to search, and what for."""
  parser.add_argument('paths', nargs='+', metavar='PATH', help='folders of pictures, or pictures')
  add_options(parser, SearchOptions)


def run(args: argparse.Namespace) -> int:
  """Embed what is new, rank, print and write."""
  options = read_options(SearchOptions, args)
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.data.images import read_pixels
  from diffusion_jax.evaluation.comparison import local_mesh
  from diffusion_jax.evaluation.embeddings import CACHE, Cache, PictureFiles, embed
  from diffusion_jax.evaluation.extractors.clip import load_features
  from diffusion_jax.files import atomic_write
  from diffusion_jax.models.text.clip import unit
  from diffusion_jax.viz.search import write_search_page

  enable_compile_cache()
  images, asked = PictureFiles(options.paths), [read_pixels(path) for path in options.picture]
  features = load_features(options.clip, local_mesh())
  queries = [*unit(features.texts(options.text))] if options.text else []
  if asked:
    queries += [*embed(PictureFiles(options.picture), features).embeddings]
  cache = Cache(features, Path(options.cache) if options.cache else CACHE)
  embedded = embed(images, features, cache)
  results = [
    ranked(query, name, picture, images, embedded, options.top)
    for query, name, picture in zip(
      queries, [*options.text, *options.picture], [None] * len(options.text) + asked, strict=True
    )
  ]
  about = [
    f'{len(embedded.rows):,} pictures of {images.name} by {features.extractor.name}; '
    f'{embedded.computed:,} of them were new and are embedded now.',
    *images.notes, *embedded.errors,
  ]
  with writing(options.out) as out:
    write_search_page(out, results, about)
    found = [
      {'query': result.query, 'found': [
        {'picture': hit.name, 'similarity': hit.similarity} for hit in result.hits
      ]} for result in results
    ]
    with atomic_write(out.with_suffix('.json')) as file:
      file.write((json.dumps(found, indent=2, ensure_ascii=False) + '\n').encode())
  show(results, about)
  print(f'written to {out} and {out.with_suffix(".json").name}')
  return 0


def ranked(
  query: np.ndarray, name: str, picture: np.ndarray | None, images: PictureFiles, embedded,
  top: int,
) -> Result:
  """Return the pictures nearest to a query, best first; of equal ones the first by name."""
  import numpy as np

  from diffusion_jax.viz.search import Hit, Result

  similarities = embedded.embeddings @ np.asarray(query)
  best = np.argsort(-similarities, kind='stable')[:top]
  hits = [
    Hit(images.names[row], round(float(similarities[i]), 6), images[int(row)].pixels)
    for i, row in zip(best, embedded.rows[best], strict=True)
  ]
  return Result(name, hits, picture)


def show(results: list[Result], about: list[str]) -> None:
  """Print what was found."""
  for text in about:
    print(text)
  for result in results:
    print(f'{result.query}:')
    for hit in result.hits:
      print(f'  {hit.similarity:.3f}  {hit.name}')
