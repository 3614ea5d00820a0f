"""Real processes of one toy run on this machine, for tests of what befalls them."""

import json
import signal
import subprocess
import time
from pathlib import Path

from tests import tiny

LOOP = {'total_steps': 40, 'checkpoint_every_steps': 1000, 'evaluate_samples': 64}
SAFETY = {'peer_timeout_seconds': 5.0}


class Ranks:
  """`count` processes that train one toy, each with `devices` simulated devices."""

  def __init__(
    self, workdir: Path, count: int = 2, devices: int = 1, more: dict | None = None, **sections
  ):
    """sections: changes to LOOP, SAFETY and the rest of `tiny.toy_config`; more: environment."""
    self.workdir = workdir
    sections = {
      **sections, 'loop': LOOP | sections.get('loop', {}),
      'safety': SAFETY | sections.get('safety', {}),
    }
    recipe = tiny.write_config(workdir.with_suffix('.py'), tiny.toy_config(**sections))
    self.arguments = ['train', '--config', recipe, '--workdir', str(workdir), '--quiet']
    more = {'TF_CPP_MIN_LOG_LEVEL': '2', **(more or {})}
    if count > 1:
      address = f'127.0.0.1:{tiny.free_port()}'
      more |= {'COORDINATOR_ADDRESS': address, 'PROCESS_COUNT': str(count)}
    self.processes = [
      tiny.start(self.arguments, tiny.environment('', devices, **more, PROCESS_INDEX=str(i))
                 if count > 1 else tiny.environment('', devices, **more))
      for i in range(count)
    ]

  def __enter__(self) -> 'Ranks':
    return self

  def __exit__(self, *_) -> None:
    for process in self.processes:
      process.kill()  # Only has an effect where one hangs.
      process.wait()

  def status(self) -> dict:
    """status.json, or an empty state before there is one of this start."""
    try:
      found = json.loads((self.workdir / 'status.json').read_text())
    except FileNotFoundError:
      return {'state': ''}
    return found if found['pid'] in [p.pid for p in self.processes] else {'state': ''}

  def wait_for(self, *states: str, step: int = 0, seconds: float = 300) -> dict:
    """The status once it is one of `states` at `step` or later, by itself or by the metrics.

    Lines of metrics are written a step late, and the status at most once a second.
    """
    end = time.monotonic() + seconds
    while True:
      status = self.status()
      if status['state'] in states and max(status['step'], self.logged()) >= step:
        return status
      codes = [process.poll() for process in self.processes]
      if time.monotonic() > end or None not in codes or any(codes):
        raise AssertionError((status, self.results(5)))
      time.sleep(0.01)  # Less would take the processes' time.

  def logged(self) -> int:
    """The last step in metrics.jsonl."""
    file = self.workdir / 'metrics.jsonl'
    return max(tiny.metrics(self.workdir), default=0) if file.exists() else 0

  def signal(self, rank: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to one process."""
    self.processes[rank].send_signal(number)

  def results(self, seconds: float = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; -1 for one that does not end in time."""
    found, end = [], time.monotonic() + seconds
    for process in self.processes:
      try:
        out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        found.append((process.returncode, out, err[-3000:]))
      except subprocess.TimeoutExpired as error:
        found.append((-1, '', str(error)))
    return found

  def codes(self, seconds: float = 300) -> list[int]:
    """The exit codes; shows what was said where a test compares them in vain."""
    results = self.results(seconds)
    for code, out, err in results:
      print(code, out, err)
    return [code for code, _, _ in results]
