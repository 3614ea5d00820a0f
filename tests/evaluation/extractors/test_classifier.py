"""The packaged classifier names the groups of emoji that it has never seen."""

import io

import jax
import numpy as np
from PIL import Image

from diffusion_jax.data.sources.openmoji import builder, glyphs
from diffusion_jax.data.sources.openmoji.builder import group
from diffusion_jax.evaluation.extractors import load_extractor


def test_held_out_emoji_are_given_their_groups():
  drawn = [(glyphs.glyph(hexcode), path) for hexcode, path in builder.drawings()]
  unseen = [(one, path) for one, path in drawn if one and glyphs.is_unseen_concept(one.concept)]
  unseen = unseen[::3]
  images = np.stack([
    np.asarray(Image.open(io.BytesIO(builder.render(path, 64)[0])).convert('RGB'))
    for _, path in unseen
  ])
  extractor = load_extractor('classifier', 'asset:classifier-openmoji-64')
  assert extractor.name == 'classifier/classifier-openmoji-64/clean'
  found = jax.jit(extractor.apply)(extractor.params, images)
  assert found['penultimate'].shape == (len(images), extractor.widths['penultimate'])
  names = [extractor.class_names[i] for i in found['logits'].argmax(axis=1)]
  wanted = [group(one) for one, _ in unseen]
  right = np.mean([a == b for a, b in zip(names, wanted, strict=True)])
  commonest = max(wanted.count(name) for name in set(wanted)) / len(wanted)
  assert len(wanted) > 30 and right > 0.8 > commonest + 0.15
