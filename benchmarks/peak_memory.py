"""Peak of a process's anonymous memory: what it holds beside the pages of files.

Linux keeps no peak of it (VmHWM counts mapped files, too), so another process reads it once a
millisecond; a thread would have to wait while this one copies.
"""

import os
import subprocess
import sys

_WATCH = """
import select, sys
peak = 0
print(flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
  with open(f'/proc/{sys.argv[1]}/status') as file:
    line = next(line for line in file if line.startswith('RssAnon'))
  peak = max(peak, int(line.split()[1]) * 1024)
print(peak)
"""


def anonymous_bytes() -> int:
  """This process's anonymous memory now."""
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith('RssAnon'))


class PeakMemory:
  """with PeakMemory() as peak: ...; then peak.bytes is the peak beyond what there was before."""

  def __enter__(self) -> 'PeakMemory':
    self._watcher = subprocess.Popen(
      [sys.executable, '-S', '-c', _WATCH, str(os.getpid())], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True,
    )
    self._watcher.stdout.readline()
    self._before, self.bytes = anonymous_bytes(), 0
    return self

  def __exit__(self, *error) -> None:
    printed, _ = self._watcher.communicate()  # Closes its input, which ends it.
    self.bytes = int(printed) - self._before
