"""One of several processes that keep in touch: python peer.py INDEX COUNT PORT WHAT."""

import os
import signal
import sys
import time

import jax

from diffusion_jax.parallel.processes import Peers

TIMEOUT = 2.0


def main(index: int, count: int, port: str, what: str) -> None:
  jax.distributed.initialize(f'127.0.0.1:{port}', count, index, initialization_timeout=60)

  def lost(sentence):
    print(f'gone {peers.gone[0]} {peers.gone[1]!r} {sentence}', flush=True)
    os._exit(75)

  peers = Peers(TIMEOUT, lost)
  start = time.monotonic()
  for step in range(1, 2000):
    if peers.poll():
      print(f'stopped at {step}', flush=True)
      break
    # No two processes are equally far at any time.
    time.sleep(0.004 * (index + 1))
    if time.monotonic() - start < 1.5:
      continue
    if what == 'stop' and index == 1:
      peers.ask_to_stop()
    elif what == 'leave' and index == 2:
      peers.leave('failed')
      os._exit(1)
    elif what == 'silent' and index == 1:
      os.kill(os.getpid(), signal.SIGSTOP)
  peers.close()


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
