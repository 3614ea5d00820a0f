"""A small process that outlives training and writes the last status where training cannot.

A killed or aborted process would stay 'training' in its status file. This program, started with the
file's path, reads each status as a line of standard input; if that ends without a final status, it
writes 'killed'. It imports the standard library alone: a few megabytes, no start-up time.
"""

import contextlib
import json
import os
import sys
import time

FINAL = (
  'finished', 'interrupted', 'peer_lost', 'stalled', 'failed', 'diverged', 'unsaved', 'refused',
)


def main(path: str) -> None:
  """Read until the end of the input, then write `path` if the last status was not final."""
  last = None
  for line in sys.stdin:
    with contextlib.suppress(ValueError):  # The line in which the other process was killed.
      last = json.loads(line)
  if last is None or last['state'] in FINAL:
    return
  what, before = last.pop('what'), last.pop('before')
  if not _may_be_replaced(path, last['start'], before):
    return
  phase = last['state']
  last |= {
    'state': 'killed', 'retry': True, 'updated': time.time(),
    'message': f'{what} ended without a word while {phase}: killed, out of memory, or aborted '
               'because it lost its coordinator; start again to go on from the last checkpoint',
  }
  temporary = f'{path}.{os.getpid()}'
  try:
    with open(temporary, 'w', encoding='utf-8') as file:
      file.write(json.dumps(last, indent=2) + '\n')
    os.replace(temporary, path)
  except OSError:  # A full disk, say. What is there goes on saying that the run goes on.
    with contextlib.suppress(OSError):
      os.unlink(temporary)


def _may_be_replaced(path: str, start: str, before: str) -> bool:
  """Say no for the file of a later start, and for the final word of any process of this one."""
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
    state, of = found['state'], found.get('start', '')
  except FileNotFoundError:
    return True
  except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
    return True  # Whatever it is, it says nothing.
  return state not in FINAL if of == start else of == before


if __name__ == '__main__':
  main(sys.argv[1])
