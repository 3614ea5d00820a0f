"""A tiny process that outlives training and tells the truth where training no longer can.

A process that is killed, runs out of memory or is aborted by its runtime writes no last word, and
its status file would say 'training' for ever. This program is started beside it with the path of
the status file; it reads each status as a line from its standard input. At the end of the input
the other process is gone: unless its last status was a final one, this writes that it was killed.
It needs the standard library alone, so it costs a few megabytes and no start-up time.
"""

import json
import os
import sys
import time

FINAL = ('finished', 'interrupted', 'peer_lost', 'stalled', 'failed', 'diverged')


def main(path: str) -> None:
  """Reads until the end of the input, then writes `path` if the last status was not final."""
  last = None
  for line in sys.stdin:
    last = json.loads(line)
  if last is None or last['state'] in FINAL or _was_said(path, last):
    return
  what = last.pop('what')
  phase = last['state']
  last |= {
    'state': 'killed', 'retry': True, 'updated': time.time(),
    'message': f'{what} ended without a word while {phase}: killed, out of memory, or aborted '
               'because it lost its coordinator; start again to go on from the last checkpoint',
  }
  temporary = f'{path}.{os.getpid()}'
  with open(temporary, 'w') as file:
    file.write(json.dumps(last, indent=2) + '\n')
  os.replace(temporary, path)


def _was_said(path: str, last: dict) -> bool:
  """Whether the file has a final word of the same process: the end came before it was heard."""
  try:
    with open(path) as file:
      found = json.load(file)
  except (OSError, ValueError):
    return False
  return found.get('state') in FINAL and all(found.get(k) == last[k] for k in ('pid', 'host'))


if __name__ == '__main__':
  main(sys.argv[1])
