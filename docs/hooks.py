"""Pages of the site that are no files under docs: README.md, CONTRIBUTING.md, and the reference.

MkDocs calls these functions while it builds (mkdocs.yml). The reference has a page for each package
and one for the modules beside them, made of the docstrings by mkdocstrings, which imports nothing.
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'diffusion_jax'
BESIDE = {'README.md': 'overview.md', 'CONTRIBUTING.md': 'contributing.md'}
"""Pages of the repository's first folder -> their names on the site."""
FOLDERS = 'benchmarks|colabs|configs|diffusion_jax|launch|tests'
_OF_REPOSITORY = re.compile(rf'\[([^]]+)\]\((?:{FOLDERS})\b[^)]*\)')
"""Links to what is no page: their words are shown as names."""
_FROM_NETWORK = re.compile(r'!\[([^]]*)\]\(https?://[^)]+\)')
"""Pictures that a reader without a network would miss, such as badges: their words are shown."""
TOP = 'modules'
"""The page of the modules that are in no package."""


def modules() -> dict[str, list[str]]:
  """Name of a page of the reference -> modules on it that say what they are, in order."""
  found = {TOP: []}
  for path in sorted(PACKAGE.rglob('*.py')):
    *folders, name = path.relative_to(PACKAGE).with_suffix('').parts
    if name.startswith('__') or not ast.get_docstring(ast.parse(path.read_bytes())):
      continue
    dotted = '.'.join((PACKAGE.name, *folders, name))
    found.setdefault(folders[0] if folders else TOP, []).append(dotted)
  return found


def reference_pages() -> dict[str, str]:
  """File of the site -> its Markdown."""
  title = lambda name: f'{PACKAGE.name}.{name}' if name != TOP else f'Modules of {PACKAGE.name}'
  return {
    f'reference/{name}.md': f'# {title(name)}\n\n' + ''.join(f'::: {one}\n\n' for one in known)
    for name, known in modules().items()
  }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Add the reference to the navigation."""
  pages = [{Path(file).stem: file} for file in reference_pages()]
  config.nav.append({'Reference': pages})
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Add the pages."""
  texts = {site: (ROOT / name).read_text() for name, site in BESIDE.items()}
  for name, text in (texts | reference_pages()).items():
    files.append(File.generated(config, name, content=text))
  return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
  """Lead links to where pages are on the site; in the repository they lead to files."""
  name = page.file.src_uri
  if name in BESIDE.values():
    markdown = re.sub(r'\]\(docs/', '](', markdown)
    markdown = _OF_REPOSITORY.sub(r'`\1`', markdown)
  markdown = _FROM_NETWORK.sub(r'\1', markdown)
  for file, site in BESIDE.items():
    markdown = re.sub(rf'\]\((?:\.\./)?{re.escape(file)}', f']({site}', markdown)
  return markdown
