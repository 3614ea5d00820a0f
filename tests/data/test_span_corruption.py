"""Spans that are left out, against their definition and by hand."""

import numpy as np
import pytest

from diffusion_jax.data.span_corruption import (
  CorruptSpans,
  corrupted,
  lengths,
  noise_mask,
  packed,
  spans_of,
)

TEXT = np.arange(10, 22, dtype=np.int32)


def test_spans_by_hand():
  mask = np.array([0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1], bool)
  seen, said = corrupted(TEXT, mask, 99)
  np.testing.assert_array_equal(seen, [10, 11, 99, 15, 16, 17, 98, 19, 97])
  np.testing.assert_array_equal(said, [99, 12, 13, 14, 98, 18, 97, 20, 21])


@pytest.mark.parametrize('length', [2, 3, 7, 20, 96])
def test_what_is_left_out_is_a_fraction_in_spans_and_every_token_is_as_likely(length):
  rng = np.random.default_rng(0)
  masks = np.stack([noise_mask(length, 0.15, 3.0, rng) for _ in range(4000)])
  noise, spans = spans_of(length, 0.15, 3.0)
  assert (masks.sum(1) == noise).all()
  starts = (masks & ~np.roll(masks, 1, axis=1)).sum(1)  # On a ring.
  assert (starts == spans).all()
  wanted = noise / length
  assert np.abs(masks.mean(0) - wanted).max() < 5 * np.sqrt(wanted / 4000)


def test_paper_lengths():
  """512 tokens leave out 77 in 26 spans (Raffel et al. 2020, section 3.1.4)."""
  assert spans_of(512, 0.15, 3.0) == (77, 26)


@pytest.mark.parametrize('length', [2, 12, 40])
def test_nothing_is_lost(length):
  """What is said, put in the place of the sentinels, gives the text."""
  corrupt, rng = CorruptSpans(40, 99), np.random.default_rng(length)
  text = np.arange(100, 100 + length, dtype=np.int32)
  for _ in range(50):
    record = corrupt({'tokens': text}, rng)
    assert record['inputs'].shape + record['targets'].shape == lengths(40, 0.15, 3.0)
    inputs = record['inputs'][record['mask'] == 1].tolist()
    targets = record['targets'][record['targets'] != 0].tolist()
    assert inputs.pop() == targets.pop() == 1
    assert (record['inputs'][record['mask'] == 0] == 0).all()
    spans, name = {}, None
    for token in targets:
      if token < 100:
        name, spans[token] = token, []
      else:
        spans[name].append(token)
    again = [t for token in inputs for t in (spans.pop(token) if token < 100 else [token])]
    np.testing.assert_array_equal(again, text)
    assert not spans


def test_packing_keeps_texts_whole_and_in_order():
  texts = [np.full(n, n) for n in (3, 4, 5, 20, 2, 8)]
  found = packed(texts, 10)
  assert [len(each) for each in found] == [7, 5, 10, 10]
  np.testing.assert_array_equal(np.concatenate(found), np.concatenate([t[:10] for t in texts]))
  assert packed([], 10) == []
