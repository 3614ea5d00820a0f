"""Seconds by phase, to the second, on a clock that the test moves."""

import pytest
from clu.metrics import Average

from diffusion_jax.train.meter import PHASES, Goodput, Meter


class Clock:
  """Seconds that pass when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _used(totals):
  return {name: seconds for name, seconds in totals.items() if seconds}


def test_phases_add_up_and_nested_ones_count_once():
  clock = Clock()
  goodput = Goodput(clock)
  clock.now += 5
  with goodput.phase('compile'):
    clock.now += 3
  goodput.enter('step')
  with goodput.phase('data'):
    clock.now += 1
  clock.now += 10
  with goodput.phase('evaluation'):
    clock.now += 2
    with goodput.phase('checkpoint'):
      clock.now += 4
    clock.now += 1
  totals = goodput.totals()
  assert tuple(totals) == PHASES
  assert _used(totals) == {
    'start': 5, 'compile': 3, 'data': 1, 'step': 10, 'evaluation': 3, 'checkpoint': 4,
  }
  assert goodput.seconds() == 26 and goodput.fraction() == pytest.approx(10 / 26)


def test_a_phase_ends_also_by_an_error():
  clock = Clock()
  goodput = Goodput(clock)
  with pytest.raises(ZeroDivisionError), goodput.phase('data'):
    clock.now += 1
    raise ZeroDivisionError
  clock.now += 2
  assert _used(goodput.totals()) == {'data': 1, 'start': 2}


@pytest.mark.parametrize(('saved', 'last', 'wanted'), [
  (None, None, {'down': 7}),
  ({'step': 20.0, 'start': 2.0}, {'step': 26.0, 'start': 2.0, 'data': 1.0},
   {'step': 20, 'start': 2, 'lost': 7, 'down': 7}),
  (None, {'step': 26.0}, {'lost': 26, 'down': 7}),
])
def test_work_after_the_last_checkpoint_is_lost(saved, last, wanted):
  goodput = Goodput(Clock())
  goodput.resume(saved, last, down=7.0)
  assert _used(goodput.totals()) == wanted
  assert goodput.seconds() == sum(wanted.values()) - 7


def test_speed_is_that_of_training_alone():
  clock = Clock()
  goodput = Goodput(clock)
  goodput.enter('step')
  meter = Meter(32, goodput)
  for _ in range(5):
    with goodput.phase('data'):
      clock.now += 1
    clock.now += 3
    meter.add({'loss': Average(2.0, 1.0)})
  with goodput.phase('evaluation'):
    clock.now += 1000
  totals, speed = meter.close_window()
  assert meter.read(totals) == {'loss': 2.0}
  assert speed['images_per_second'] == 5 * 32 / 20 and speed['seconds_per_step'] == 4
  assert speed['data_wait_fraction'] == 0.25 and meter.totals == {}
