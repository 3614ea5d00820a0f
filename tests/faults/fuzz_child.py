"""Loads damaged files of one kind after another, within limits of memory and time.

  python -m tests.faults.fuzz_child GROUP SEED FOLDER [TARGET NUMBER]

Writes a line of JSON for each mutant that was neither loaded nor refused in one sentence. With a
target and a number only that mutant is made, left in FOLDER, and its error is raised.
"""

import contextlib
import faulthandler
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.faults import fuzz_sources

TIMES = int(os.environ.get('FUZZ_TIMES', '1'))
"""As many mutants as usual, for a longer search."""
SECONDS = 10
"""For one mutant."""
MEGABYTES = 400
"""More than the sound file takes, for one mutant."""
ADDRESSES = 4 * 2**30
"""More than the process has when it begins."""


class TooSlow(BaseException):
  """Raised by the alarm."""


def _alarm(*_):
  raise TooSlow(f'it takes more than {SECONDS} s')


def _peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _addresses():
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  return pages * resource.getpagesize()


def _fault(target, folder):
  """Return what is wrong with how a mutant was taken, or an empty text."""
  from diffusion_jax.errors import UserError

  before = _peak()
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    target.load(folder)
  except UserError as error:
    text = str(error)
    if len(text.splitlines()) != 1 or len(text) > 5000:
      return f'its sentence has {len(text.splitlines())} lines, {len(text)} letters: {text[:300]!r}'
  except BaseException as error:
    place = traceback.extract_tb(error.__traceback__)
    ours = [f'{Path(f.filename).name}:{f.lineno}' for f in place if 'diffusion_jax' in f.filename]
    return f'{type(error).__name__}: {str(error)[:200]} at {" > ".join(ours[-3:])}'
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  grown = _peak() - before
  return f'it takes {grown} MB' if grown > MEGABYTES else ''


def mutate(target, folder, seed, number):
  """Damages one file of a sound target; (what was done, how to make it sound again)."""
  rng = random.Random(f'{seed} {target.name} {number}')
  name = rng.choice(sorted(target.files))
  path = folder / name
  sound = path.read_bytes()
  done, data = rng.choice(target.files[name])(rng, sound)
  path.write_bytes(data)
  return f'{name}: {done}', lambda: path.write_bytes(sound)


def main(group, seed, folder, only='', number=0):
  signal.signal(signal.SIGALRM, _alarm)
  warnings.simplefilter('ignore')
  targets = [make() for make in fuzz_sources.GROUPS[group]]
  out = os.fdopen(os.dup(1), 'w')
  log = folder / 'progress'
  for target in targets:
    if only and target.name != only:
      continue
    place = folder / target.name
    place.mkdir(parents=True)
    target.make(place)
    target.load(place)  # The sound one, which also imports what is needed.
    limit = _addresses() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    if only:
      print(mutate(target, place, seed, number)[0])
      target.load(place)
      return
    start = time.process_time()
    for i in range(target.count * TIMES):
      done, restore = mutate(target, place, seed, i)
      log.write_text(f'{target.name} {i} {done}')
      faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
      with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.redirect_stderr(nowhere):
          fault = _fault(target, place)
      faulthandler.cancel_dump_traceback_later()
      restore()
      if fault:
        print(json.dumps([target.name, i, done, fault]), file=out, flush=True)
    spent = time.process_time() - start
    print(json.dumps(['done', target.name, target.count, round(spent, 1)]), file=out, flush=True)


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:5], *map(int, sys.argv[5:6]))
