"""A process that takes the lock of a folder: python lock_holder.py FOLDER HOST BOOT LEASE.

HOST and BOOT are what it takes its machine for, - for the real one. It tells what becomes of the
lock, holds it until its input ends, and lets it go.
"""

import socket
import sys
from pathlib import Path

from diffusion_jax.errors import UserError
from diffusion_jax.runs import lock as run_lock


def tell(text: str) -> None:
  print(text, flush=True)


def main(folder: str, host: str, boot: str, lease: str) -> None:
  run_lock.LEASE_SECONDS = float(lease)
  run_lock.HEARTBEAT_SECONDS = float(lease) / 10
  if host != '-':
    socket.gethostname = lambda: host
  if boot != '-':
    run_lock._boot = lambda: boot
  lock = run_lock.RunLock(
    Path(folder), on_lost=lambda text: tell(f'lost: {text}'), say=lambda text: tell(f'said: {text}')
  )
  try:
    lock.take()
  except UserError as error:
    tell(f'refused: {error}')
    return
  tell('taken')
  sys.stdin.read()
  lock.release()


if __name__ == '__main__':
  main(*sys.argv[1:])
