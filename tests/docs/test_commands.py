"""Every command of README.md and docs is read as the program that it starts reads it.

Ours go through the parser, their values through the options' limits, configs are loaded with what
is changed in them; launchers run dry; what a command reads is in the repository, made by another
command on the pages, or declared here.
"""

import argparse
import dataclasses
import importlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from benchmarks import systems
from diffusion_jax.cli.main import CHANGE_CONFIGS, COMMANDS, make_parser
from diffusion_jax.cli.options import read_options
from diffusion_jax.config import parse
from diffusion_jax.errors import UserError
from diffusion_jax.recipe import load_config
from tests.docs.pages import PAGES, commands, simple_commands, spans
from tests.tiny import ROOT

OURS = (('python', '-m', 'diffusion_jax'), ('diffusion-jax',))
BENCHMARK, LAUNCHER = ('python', '-m', 'benchmarks.'), 'launch/'
TUNED = ('openmoji/quickstart', 'finetune/lora', 'finetune/dreambooth')
"""Recipes, one of which takes each change that a page speaks of."""
LEFT_OUT = {
  'mkdocs': 'tests/docs/test_site.py builds the site', 'ruff': '.ci/run checks the repository',
}
"""Programs whose commands nothing here reads, and why."""
READER = {
  'car.png': 'a picture', 'cat.png': 'a picture', 'dog.png': 'a picture', 'cow.png': 'a picture',
  'hat.png': 'a mask', 'tiny.png': 'a picture', 'photo.png': 'a picture', 'room.png': 'a picture',
  'mask.png': 'a mask', 'edges.png': 'edges', 'photos': 'a folder of pictures',
  'data': 'folders of pictures', 'models': 'pipelines that others have published',
  'stable-diffusion-v1-5': 'a published pipeline', 'canny': 'a published ControlNet',
  'ink.safetensors': 'a LoRA', 'lpips_vgg.safetensors': 'published weights',
  'pt_inception-2015-12-05-6726825d.pth': 'published weights',
  '/usr/share/openclipart/png': 'the package openclipart-png of Debian',
}
"""What the reader of the pages brings along."""
PLACES = {'FILE', 'DIR', 'PATH', 'FILE[:SCALE]', 'FILE.json', 'FILE.html'}
"""How options that name a file show their value."""
WRITTEN = {
  'out', 'save_statistics', 'json', 'cache', 'train.workdir', 'compare.workdir',
  'convert.target', 'configs.to'
}
"""Options that name what is written, some of one command alone."""
SYSTEMS = {f'runs/notes/{name}' for name in systems.ALL}
"""What `python -m benchmarks.notes run NAME` makes, as the pages say."""
ALL = commands()
COPIED = {
  words[words.index('--to') + 1]: words[words.index('--copy') + 1]
  for _, words in ALL if '--copy' in words
}
"""Files that `configs --copy` makes on the pages -> of which recipe."""


def _ours(words):
  """The arguments of a command of ours, or None."""
  return next((words[len(head):] for head in OURS if words[:len(head)] == head), None)


def _read(arguments):
  """(name, values) of a command of ours, after the parser and the limits of its options."""
  parsed, rest = make_parser().parse_known_args(arguments)
  name = parsed.command
  assert all(other.startswith('--config.') for other in rest), rest
  assert not rest or name in CHANGE_CONFIGS, rest
  values, read = vars(parsed), []
  for cls in vars(COMMANDS[name]).values():
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
      fields = dataclasses.fields(cls)
      needed = [field.name for field in fields
                if field.default is field.default_factory is dataclasses.MISSING]
      if {field.name for field in fields} <= values.keys() and all(
        values[field] is not None for field in needed
      ):
        read.append(read_options(cls, parsed))
  assert read, name
  if config := values.get('config'):
    made = ['--config.settings.cache=disk'] * (name == 'prepare')  # It makes nothing else.
    parse(load_config(COPIED.get(config, config), [*rest, *made]))
  return name, values, rest


def _benchmark(words):
  """(name, values) of a script of benchmarks."""
  script = importlib.import_module(words[2])
  if not hasattr(script, 'add_arguments'):
    script = importlib.import_module(f'{words[2]}.__main__')
  parser = argparse.ArgumentParser(allow_abbrev=False)
  script.add_arguments(parser)
  parsed, rest = parser.parse_known_args(words[3:])
  assert all(other.startswith('--config.') for other in rest), rest
  if config := getattr(parsed, 'config', None):
    parse(load_config(config, rest))
  return words[2], vars(parsed), rest


def _launched(words):
  """(name, values) of the training that a launcher starts, by its own account."""
  words = [word for word in words if word != '--dry-run']
  words.insert(1 if words[0].endswith('retry.sh') else len(words), '--dry-run')
  clean = {name: value for name, value in os.environ.items() if name != 'PYTHON'}
  done = subprocess.run(
    words, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 0, done.stderr
  last = simple_commands(done.stdout.splitlines()[-1])[-1]
  if last[0] == 'exec':
    return _read(last[last.index('diffusion_jax') + 1:])
  return 'launch', {}, []


def _installed(words):
  """What pip installs: the package itself with extras that it has, or another's."""
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  for word in words[2:]:
    if found := re.fullmatch(r'(?:\.|diffusion_jax)\[([\w,]+)\]', word):
      assert set(found[1].split(',')) <= extras.keys(), word
  return 'pip', {}, []


def _tested(words):
  """What pytest is given: options of its own, and files and folders that are there."""
  for word in words[1:]:
    assert word.startswith('-') or word.isdecimal() or (ROOT / word).exists(), word
  return 'pytest', {}, []


def _kind(words):
  """The function that reads a command, or None."""
  if (arguments := _ours(words)) is not None:
    return lambda words: _read(arguments)
  if words[:2] == BENCHMARK[:2] and words[2].startswith(BENCHMARK[2]):
    return _benchmark
  if words[0].startswith(LAUNCHER):
    return _launched
  return {('pip', 'install'): _installed}.get(words[:2]) or {'pytest': _tested}.get(words[0])


def _metavars():
  """(command, option) -> how it shows its value."""
  found = {}

  def walk(parser, name):
    for action in parser._actions:
      if isinstance(action, argparse._SubParsersAction):
        for sub, inner in action.choices.items():
          walk(inner, name or sub)
      else:
        found[name, action.dest] = action.metavar

  walk(make_parser(), '')
  return found


@pytest.fixture(scope='module')
def read():
  """[(command, name, values, changes)] of all that is read; the first failure names its command."""
  found = []
  for command in ALL:
    if kind := _kind(command.words):
      try:
        found.append((command, *kind(command.words)))
      except (Exception, SystemExit) as error:
        raise AssertionError(f'{command}: {error}') from error
  return found


def test_every_command_is_read_but_for_those_left_out_by_name(read):
  left = {command.words[0] for command in ALL if not _kind(command.words)}
  assert left == LEFT_OUT.keys(), left
  assert len(read) >= 70 and {name for _, name, _, _ in read} >= {
    'train', 'sample', 'evaluate', 'prepare', 'convert', 'classify', 'search', 'pip', 'pytest',
    'launch', 'benchmarks.run', 'benchmarks.gallery',
  }


def test_what_a_command_reads_is_there_or_is_made_or_declared(read):
  metavars = _metavars()
  made, wanted = set(), []
  for command, name, values, changes in read:
    for option, value in values.items():
      if value and metavars.get((name, option)) in PLACES:
        if option in WRITTEN or f'{name}.{option}' in WRITTEN:
          made.add(value)
        else:
          several = value if isinstance(value, list) else [value]
          wanted += [(command, one.partition(':')[0] if option == 'lora' else one)
                     for one in several]
    for change in changes:
      key, _, value = change.partition('=')
      if key in ('--config.settings.model', '--config.settings.prior.folder'):
        wanted.append((command, value))
      elif key == '--config.data.dataset' and value.startswith('folder:'):
        wanted.append((command, value.removeprefix('folder:')))
    if (source := values.get('source') or '').startswith('folder:'):
      wanted.append((command, source.removeprefix('folder:')))
  used = set()
  for command, file in wanted:
    above = {file, *map(str, Path(file).parents)} - {'.', '/'}
    used |= above & READER.keys()
    assert (
      file.startswith('asset:') or above & (made | READER.keys() | SYSTEMS)
      or (ROOT / file).exists()
      or (ROOT / 'configs' / f'{file}.py').exists()
    ), f'{command}: nothing on the pages makes {file}'
  assert used == READER.keys(), f'no command reads {READER.keys() - used}'


@pytest.mark.parametrize('name', PAGES)
def test_changes_of_configs_in_the_text_are_keys(name):
  """Spans such as `--config.loop.batch_size=256`: a recipe takes the key, and the value, too."""
  for span in spans(PAGES[name].read_text()):
    if not span.startswith('--config.') or '=' not in span or 'KEY' in span:
      continue
    given = [
      word for word in simple_commands(span)[0] if word.partition('=')[2] not in ('N', 'NAME')
    ]
    # A mixture takes the place of the one data set.
    given += ['--config.data.dataset='] * any('data.mixture' in word for word in given)
    refusals = [reason for recipe in TUNED if (reason := _refusal(recipe, given))]
    assert len(refusals) < len(TUNED), f'{span}: {refusals}'


def _refusal(recipe, changes):
  """Why a recipe does not take the changes, or ''."""
  try:
    parse(load_config(recipe, changes))
  except UserError as error:
    return str(error)
  return ''
