"""Weights, BREAK and chunks of prompts, against the convention's own examples and by hand."""

import pytest

from diffusion_jax.pipelines.prompts import Piece, Token, chunks, parse


@pytest.mark.parametrize(('prompt', 'wanted'), [
  ('normal text', [('normal text', 1)]),
  ('an (important) word', [('an ', 1), ('important', 1.1), (' word', 1)]),
  ('(unbalanced', [('unbalanced', 1.1)]),
  ('[[open', [('open', 1 / 1.1**2)]),
  (r'\(literal\]', [('(literal]', 1)]),
  (r'a\\b', [('a\\b', 1)]),
  ('(unnecessary)(parens)', [('unnecessaryparens', 1.1)]),
  ('a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).', [
    ('a ', 1), ('house', 1.3 * 1.1**2), (' ', 1.1), ('on', 1), (' a ', 1.1), ('hill', 0.55),
    (', sun, ', 1.1), ('sky', 1.1**4), ('.', 1.1),
  ]),
  ('no) pair] here', [('no) pair] here', 1)]),
  ('a: b (c:d)', [('a: b ', 1), ('c:d', 1.1)]),
  ('(x:1.2.3)', [('x:1.2.3)', 1.1)]),
  ('x:1.3)', [('x:1.3)', 1)]),
  ('(far:-0.5) (none:0)', [('far', -0.5), (' ', 1), ('none', 0)]),
  ('(spaced : 1.5 )', [('spaced ', 1.5)]),
  ('', []),
])
def test_weights(prompt, wanted):
  section, = parse(prompt)
  assert [piece.text for piece in section] == [text for text, _ in wanted]
  assert [piece.weight for piece in section] == pytest.approx([weight for _, weight in wanted])


def test_break_divides_sections():
  assert parse('a BREAK b') == [[Piece('a')], [Piece('b')]]
  assert parse('(a BREAK b:2)') == [[Piece('a', 2)], [Piece('b', 2)]]
  assert parse('BREAKFAST, break') == [[Piece('BREAKFAST, break')]]
  assert parse('a BREAK BREAK b')[1] == []


def numbers(text):
  """Every word is a token: its number; ',' is 0."""
  return [0 if word == ',' else int(word) for word in text.split()]


def ids(found):
  return [[token.id for token in chunk] for chunk in found]


def test_chunks_hold_so_many_tokens_and_their_weights():
  found = chunks([[Piece('1 2 3', 2.0), Piece('4 5')]], numbers, 4)
  assert ids(found) == [[1, 2, 3, 4], [5]]
  assert found[0][2:] == [Token(3, 2.0), Token(4, 1.0)]
  assert ids(chunks([[Piece('1')], [], [Piece('2 3')]], numbers, 2)) == [[1], [], [2, 3]]
  assert ids(chunks([[]], numbers, 2)) == [[]]
  assert ids(chunks([[Piece('1 2 3 4')]], numbers, 2)) == [[1, 2], [3, 4]]


def test_a_full_chunk_ends_after_its_last_comma():
  found = lambda text, room=4: ids(chunks([[Piece(text)]], numbers, room, comma=0))
  assert found('1 , 2 3 4 5') == [[1, 0], [2, 3, 4, 5]]
  assert found('1 , 2 , 3 4') == [[1, 0, 2, 0], [3, 4]]
  assert found('1 2 3 4 , 5') == [[1, 2, 3, 4], [0, 5]]
  far = '1 , ' + ' '.join(map(str, range(2, 30)))
  assert [len(chunk) for chunk in found(far, 22)] == [22, 8]
  assert [len(chunk) for chunk in found(far, 21)] == [2, 21, 7]
