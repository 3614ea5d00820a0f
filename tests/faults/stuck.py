"""A process that stops moving: python stuck.py DIRECTORY HOW."""

import ctypes
import sys
import threading
import time
from pathlib import Path

from diffusion_jax.train import watchdog
from diffusion_jax.train.watchdog import Watchdog


def main(directory: Path, how: str) -> None:
  if how == 'holding the interpreter':
    watchdog.GRACE_SECONDS = 1.0  # Of the second line of defence, so that the test is short.
  dog = Watchdog(
    1.0, directory=directory, on_stall=lambda sentence: print(f'told: {sentence}', flush=True),
    exit_code=75,
  )
  for _ in range(10):
    time.sleep(0.2)  # Longer than the limit in all, but never without a beat.
    dog.beat()
  with dog.allow(30.0, 'compilation'):
    time.sleep(1.5)
  print('still here', flush=True)
  if how == 'waiting for data':
    threading.Event().wait()  # A data source that never answers.
  elif how == 'holding the interpreter':
    ctypes.PyDLL(None).sleep(60)  # Unlike CDLL, it keeps the lock of the interpreter.
  dog.close()
  time.sleep(1.5)
  print('done', flush=True)


if __name__ == '__main__':
  main(Path(sys.argv[1]), sys.argv[2])
