"""Files of textual inversion: both layouts both ways, and errors. Libraries: tests/parity."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.formats.textual_inversion import (
  FILES,
  TextualInversion,
  bundled_inversions,
  read_textual_inversion,
  write_textual_inversion,
)

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)
WIDE = np.arange(10, dtype=np.float16).reshape(2, 5)
WIDTHS = {'text_encoder': 3, 'text_encoder_2': 5}


def assert_same(found, wanted):
  assert found.token == wanted.token and found.embeddings.keys() == wanted.embeddings.keys()
  for role, rows in wanted.embeddings.items():
    np.testing.assert_array_equal(found.embeddings[role], rows)
    assert found.embeddings[role].dtype == rows.dtype


@pytest.mark.parametrize(('layout', 'embeddings', 'names'), [
  ('diffusers', {'text_encoder': ROWS}, {'<cat>'}),
  ('diffusers', {'text_encoder_2': WIDE}, {'<cat>'}),
  ('a1111', {'text_encoder': ROWS}, {'emb_params'}),
  ('a1111', {'text_encoder': ROWS, 'text_encoder_2': WIDE}, {'clip_l', 'clip_g'}),
])
def test_round_trip(layout, embeddings, names, tmp_path):
  path, learned = tmp_path / '<cat>.safetensors', TextualInversion('<cat>', embeddings)
  write_textual_inversion(path, learned, layout)
  assert set(load_file(path)) == names
  assert_same(read_textual_inversion(path, WIDTHS), learned)


def test_one_row_without_its_axis_and_the_name_in_a_directory(tmp_path):
  save_file({'<cat>': ROWS[0]}, tmp_path / 'learned_embeds.safetensors')
  found = read_textual_inversion(tmp_path)
  assert found.embeddings['text_encoder'].shape == (1, 3)
  assert_same(found, TextualInversion('<cat>', {'text_encoder': ROWS[:1]}))


@pytest.mark.parametrize(('tensors', 'words'), [
  ({'a': ROWS, 'b': ROWS}, 'holds a, b: neither'),
  ({'clip_l': ROWS, 'clip_g': WIDE[:1]}, r'as many for each encoder, not \[2, 3\] and \[1, 5\]'),
  ({'<cat>': WIDE[:, :4]}, r'embeddings \[2, 4\] for the text_encoder, whose table is 3 wide'),
  ({'emb_params': WIDE}, 'whose table is 3 wide'),
  ({'<cat>': ROWS[None]}, r'rows \[n d\]'),
  ({'<cat>': ROWS[:0]}, r'not \[0, 3\]'),
  ({'<cat>': np.zeros((1001, 3), np.float32)}, r'1 to 1000 rows .* not \[1001, 3\]'),
  ({'<cat>': np.where(ROWS > 4, np.nan, ROWS)}, 'finite floating numbers'),
  ({'emb_params': ROWS.astype(np.int32)}, 'finite floating numbers'),
  ({'x' * 201: ROWS}, 'in 1 to 200 characters'),
  ({'clip_l': ROWS, 'emb_params': ROWS}, 'two of one text encoder'),
  ({f'{n}.lora_A.weight': ROWS for n in 'abcd'}, 'is a LoRA .* --lora'),
  ({f't{n}': ROWS for n in range(5)}, 'holds t0, t1, t2 and 2 more: neither'),
])
def test_files_that_do_not_fit(tensors, words, tmp_path):
  save_file(tensors, tmp_path / 'x.safetensors')
  with pytest.raises(UserError, match=words):
    read_textual_inversion(tmp_path / 'x.safetensors', WIDTHS)


def test_words_beside_a_lora(tmp_path):
  """As AUTOMATIC1111, kohya and OneTrainer bundle them, and as they are."""
  path = tmp_path / 'file.safetensors'
  matrices = {'lora_unet_conv_in.lora_down.weight': ROWS, 'lora_unet_conv_in.alpha': ROWS[0, :1]}
  words = {
    'bundle_emb.cat.emb_params': ROWS, 'bundle_emb.a.b.string_to_param.*': ROWS[:1],
    'bundle_emb.both.clip_l': ROWS, 'bundle_emb.both.clip_g': WIDE, '<dog>': WIDE,
    'text_encoders_0': ROWS, 'text_encoders_1': WIDE,
  }
  save_file(matrices | words, path)
  found = {word.token: word for word in bundled_inversions(path, WIDTHS)}
  both = {'text_encoder': ROWS, 'text_encoder_2': WIDE}
  wanted = {
    'cat': {'text_encoder': ROWS}, 'a.b': {'text_encoder': ROWS[:1]}, 'both': both,
    '<dog>': {'text_encoder_2': WIDE}, 'file': both,
  }
  assert found.keys() == wanted.keys()
  for token, embeddings in wanted.items():
    assert_same(found[token], TextualInversion(token, embeddings))
  save_file(matrices, path)
  assert bundled_inversions(path, WIDTHS) == []
  save_file({'bundle_emb.cat.emb_params': ROWS}, path)
  assert_same(read_textual_inversion(path, WIDTHS), TextualInversion('cat', wanted['cat']))
  save_file({f'bundle_emb.{name}.emb_params': ROWS for name in 'ab'}, path)
  with pytest.raises(UserError, match='holds 2 words'):
    read_textual_inversion(path, WIDTHS)
  for name, value in (('cat.t5', ROWS), ('cat.emb_params', WIDE)):
    save_file({f'bundle_emb.{name}': value}, path)
    with pytest.raises(UserError, match=r'inversion that is not known|whose table is 3 wide'):
      bundled_inversions(path, WIDTHS)


def test_two_encoders_for_a_model_of_one(tmp_path):
  save_file({'clip_l': ROWS, 'clip_g': WIDE}, tmp_path / 'x.safetensors')
  with pytest.raises(UserError, match='text_encoder_2, whose table is not there; they are of'):
    read_textual_inversion(tmp_path / 'x.safetensors', {'text_encoder': 3})


def test_pickles_are_read_as_data_only(tmp_path):
  torch = pytest.importorskip('torch')
  rows = torch.tensor(ROWS)
  for values, wanted in (
    ({'string_to_token': {'*': 265}, 'string_to_param': {'*': rows}, 'name': 'cat'}, 'cat'),
    ({'<cat>': rows.requires_grad_()}, '<cat>'),
    ({'emb_params': rows}, 'x'), ({'string_to_param': {'*': rows}}, 'x'),
  ):
    torch.save(values, tmp_path / 'x.pt')
    found = read_textual_inversion(tmp_path / 'x.pt', {'text_encoder': 3})
    assert_same(found, TextualInversion(wanted, {'text_encoder': ROWS}))

  for values, words in (
    ({'string_to_param': {}}, 'no rows'), ({'string_to_param': rows}, 'no rows'),
    ({'string_to_param': {'*': rows}, 'name': 7}, 'characters'), ({3: rows}, 'by name'),
    ({}, 'holds nothing'), ([rows], 'no tensors by name'),
  ):
    torch.save(values, tmp_path / 'x.pt')
    with pytest.raises(UserError, match=words):
      read_textual_inversion(tmp_path / 'x.pt')

  class Evil:
    def __reduce__(self):
      return open, (str(tmp_path / 'made'), 'w')

  torch.save({'<cat>': Evil()}, tmp_path / 'x.pt')
  with pytest.raises(UserError, match='without running code'):
    read_textual_inversion(tmp_path / 'x.pt')
  assert not (tmp_path / 'made').exists()
  with pytest.raises(UserError, match='no file'):
    read_textual_inversion(tmp_path / 'y.pt')


def test_what_cannot_be_written(tmp_path):
  both = TextualInversion('<cat>', {'text_encoder': ROWS, 'text_encoder_2': WIDE})
  path = tmp_path / 'x.safetensors'
  with pytest.raises(UserError, match='holds one text encoder, not 2'):
    write_textual_inversion(path, both)
  with pytest.raises(UserError, match=r'call it <cat>\.safetensors'):
    write_textual_inversion(path, both, 'a1111')
  with pytest.raises(UserError, match='layout must be'):
    write_textual_inversion(path, both, 'kohya')
  assert not path.exists()


def test_a_directory_with_a_file_for_each_encoder(tmp_path):
  embeddings = {role: np.full((2, width), i, np.float32) for i, (role, width) in
                enumerate(WIDTHS.items())}
  for role, value in embeddings.items():
    write_textual_inversion(tmp_path / FILES[role], TextualInversion('<cat>', {role: value}))
  assert_same(read_textual_inversion(tmp_path, WIDTHS), TextualInversion('<cat>', embeddings))
  # The name tells the second one's role even where nothing is known of the encoders.
  assert set(read_textual_inversion(tmp_path / FILES['text_encoder_2']).embeddings) == {
    'text_encoder_2'
  }
  (tmp_path / FILES['text_encoder']).unlink()
  other = TextualInversion('<dog>', {'text_encoder': embeddings['text_encoder']})
  write_textual_inversion(tmp_path / FILES['text_encoder'], other)
  with pytest.raises(UserError, match='several words, <cat>, <dog>'):
    read_textual_inversion(tmp_path, WIDTHS)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='holds no learned_embeds'):
    read_textual_inversion(tmp_path / 'empty')
