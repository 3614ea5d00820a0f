"""Where in a condition on text each of several text encoders stands."""

from diffusion_jax.pipelines.text_conditioners import TextEncoders


def places_of(text: TextEncoders, role: str) -> dict[str, tuple[slice, ...]]:
  """Return where what an encoder gives stands in each field, as indices of [l d], [l] and [p].

  A mask that it shares with others is none of its own.
  """
  found, row = {}, 0
  for group in text.text:
    end = row + max(text.readers[each].length for each in group)
    if role in group:
      before = sum(text.shape(each).width for each in group[: group.index(role)])
      rows, columns = slice(row, end), slice(before, before + text.shape(role).width)
      found['text'] = rows, columns
      if text.masked and group == (role,):
        found['mask'] = (rows,)
    row = end
  if role in text.pooled:
    before = sum(text.shape(each).pooled for each in text.pooled[: text.pooled.index(role)])
    found['pooled'] = (slice(before, before + text.shape(role).pooled),)
  return found
