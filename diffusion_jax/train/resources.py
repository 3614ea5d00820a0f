"""What a process holds, so that a leak shows as a curve before it ends the run."""

import os
import threading
from pathlib import Path

import jax
from jax import monitoring

_PROC = Path('/proc/self')


def resources() -> dict[str, float]:
  """Numbers for a line of metrics: host memory and peak in bytes, open files, threads.

  And of the fullest device of this process its memory in use and peak, where devices tell (CPUs do
  not). Outside of Linux the files and the memory of the host are left out.
  """
  found: dict[str, float] = {'threads': threading.active_count()}
  if _PROC.is_dir():
    status = (_PROC / 'status').read_text(encoding='utf-8', errors='replace')
    lines = dict(line.split(':', 1) for line in status.splitlines())
    kilobytes = lambda name: int(lines[name].split()[0]) * 1024
    found |= {
      'host_memory': kilobytes('VmRSS'), 'host_memory_peak': kilobytes('VmHWM'),
      'threads': int(lines['Threads']), 'open_files': len(os.listdir(_PROC / 'fd')),
    }
  stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
  for name, key in (('device_memory', 'bytes_in_use'), ('device_memory_peak', 'peak_bytes_in_use')):
    values = [one[key] for one in stats if key in one]
    if values:
      found[name] = max(values)
  return found


class Compilations:
  """Counts the programs that XLA has compiled, or fetched from its cache, since it was made.

  After the first step there should be none for training: each is a shape or a type that changed.
  """

  _EVENT = '/jax/core/compile/backend_compile_duration'

  def __init__(self):
    self.count = 0
    monitoring.register_event_duration_secs_listener(self._heard)

  def _heard(self, event: str, seconds: float, **more) -> None:
    del seconds, more
    self.count += event == self._EVENT

  def close(self) -> None:
    """Stops counting."""
    monitoring.unregister_event_duration_listener(self._heard)
