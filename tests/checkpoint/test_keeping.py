"""Which checkpoints stay."""

import math

import pytest

from diffusion_jax.checkpoint.keeping import Keep, kept

STEPS = [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(('keep', 'stay'), [
  (Keep(last=1), {60}),
  (Keep(last=2), {50, 60}),
  (Keep(last=9), set(STEPS)),
  (Keep(last=1, every_steps=20), {20, 40, 60}),
  (Keep(last=1, every_steps=15), {30, 60}),
  (Keep(last=1, best='fid'), {20, 60}),
  (Keep(last=1, best='fid', best_is='highest'), {30, 60}),
  (Keep(last=2, every_steps=40, best='fid'), {20, 40, 50, 60}),
])
def test_what_stays(keep, stay):
  scores = {20: 3.0, 30: 8.0, 40: 5.0}
  assert kept(STEPS, scores, keep) == stay
  assert kept(reversed(STEPS), scores, keep) == stay


def test_the_best_of_each_number_of_samples_stays():
  """FID falls with their number, so those of 64 would always lose against those of 256."""
  keep, samples = Keep(last=1, best='fid'), {10: 256, 20: 256, 30: 64, 40: 64, 50: 64}
  scores = {10: 3.0, 20: 4.0, 30: 9.0, 40: 8.0, 50: 10.0}
  assert kept(STEPS, scores, keep, samples) == {10, 40, 60}
  assert kept(STEPS, scores, keep) == {10, 60}


def test_scores_that_say_nothing():
  keep = Keep(last=1, best='fid')
  assert kept(STEPS, {}, keep) == {60}
  assert kept(STEPS, {10: math.nan, 20: -math.inf, 30: 4.0}, keep) == {30, 60}
  assert kept(STEPS, {5: 0.0, 30: 4.0}, keep) == {30, 60}  # 5 is not on disk.
  assert kept(STEPS, {10: 4.0, 30: 4.0}, keep) == {30, 60}  # The newer of equal ones.
  assert kept([], {}, keep) == set()
