"""Processes that meet over real sockets, here as threads."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.parallel.startup import roll_call


@pytest.fixture
def port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def call(port, places, timeout=10.0):
  """Result or message of each (index, processes), started in this order, 0.1 s apart."""

  def one(place):
    time.sleep(0.1 * places.index(place))
    index, processes = place
    try:
      return roll_call(f'127.0.0.1:{port}', processes, index, timeout)
    except UserError as error:
      return str(error)

  with ThreadPoolExecutor(len(places)) as pool:
    return list(pool.map(one, places))


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0)])
def test_all_meet_in_any_order_and_the_port_is_free_again(port, order):
  for _ in range(2):
    assert all(8 <= left <= 10 for left in call(port, [(i, 3) for i in order]))


def test_nobody_goes_on_before_the_last_has_come(port):
  start = time.monotonic()
  with ThreadPoolExecutor(3) as pool:
    early = [pool.submit(roll_call, f'127.0.0.1:{port}', 3, i, 10) for i in (0, 1)]
    time.sleep(0.7)
    assert not any(future.done() for future in early)
    roll_call(f'127.0.0.1:{port}', 3, 2, 10)
    assert [future.result() > 0 for future in early] == [True, True]
  assert time.monotonic() - start < 5


def test_those_that_did_not_come_are_named_to_all(port):
  messages = call(port, [(0, 4), (2, 4)], timeout=0.6)
  for message in messages:
    assert message.startswith(
      f'process 0 waited 0.6 s at 127.0.0.1:{port}, but process 1, 3 of 4 did not come'
    )


def test_different_counts(port):
  for message in call(port, [(0, 2), (1, 3)]):
    assert message.startswith('process 1 was told of 3 processes and process 0 of 2')


def test_the_same_number_twice(port):
  with ThreadPoolExecutor(3) as pool:
    futures = [pool.submit(roll_call, f'127.0.0.1:{port}', 3, i, 10) for i in (0, 1, 1)]
    for future in futures:
      with pytest.raises(UserError, match='two processes have the number 1'):
        future.result()


@pytest.mark.parametrize('last_is_other', [True, False])
def test_a_process_that_came_left_and_came_again(port, last_is_other):
  with ThreadPoolExecutor(2) as pool:
    zero = pool.submit(roll_call, f'127.0.0.1:{port}', 3, 0, 10)
    end = time.monotonic() + 5
    while True:
      try:
        first = socket.create_connection(('127.0.0.1', port))
        break
      except OSError:
        assert time.monotonic() < end
        time.sleep(0.02)
    first.sendall(b'diffusion_jax 3 1\n')
    time.sleep(0.1)
    first.close()
    time.sleep(0.1)
    last, again = (2, 1) if last_is_other else (1, 2)
    later = pool.submit(roll_call, f'127.0.0.1:{port}', 3, again, 10)
    time.sleep(0.2)
    assert not zero.done()
    roll_call(f'127.0.0.1:{port}', 3, last, 10)
    assert zero.result() >= 0 and later.result() >= 0


def test_a_stranger_is_not_counted(port):
  with ThreadPoolExecutor(1) as pool:
    zero = pool.submit(roll_call, f'127.0.0.1:{port}', 2, 0, 10)
    time.sleep(0.2)
    with socket.create_connection(('127.0.0.1', port)) as stranger:
      stranger.sendall(b'GET / HTTP/1.1\r\n\r\n')
    time.sleep(0.1)
    assert not zero.done()
    roll_call(f'127.0.0.1:{port}', 2, 1, 10)
    assert zero.result() >= 0


def test_a_port_that_another_program_uses():
  with socket.create_server(('', 0)) as server:
    used = server.getsockname()[1]
    zero, one = call(used, [(0, 2), (1, 2)], timeout=0.5)
  assert zero.startswith(f'process 0 cannot listen at port {used} (Address already in use)')
  assert one.startswith(f'process 1 of 2 could not reach process 0 at 127.0.0.1:{used} within 0.5')
