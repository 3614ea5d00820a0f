"""T5's encoder: config.json and published configs."""

from typing import Any

from diffusion_jax.formats.published import ANY, GENERAL, NetworkFormat
from diffusion_jax.models.text.t5 import T5Config, T5EncoderModel

# What only the decoder of T5 reads, and what follows from feed_forward_proj.
_ACCEPTED = GENERAL | dict.fromkeys((
  'classifier_dropout', 'dense_act_fn', 'dropout_rate', 'is_encoder_decoder', 'is_gated_act',
  'n_positions', 'num_decoder_layers', 'output_past', 'scale_decoder_outputs', 'use_cache',
), ANY)


def _encoder(name: str) -> str | None:
  """The token table has two names; a whole T5 also has a decoder, left out."""
  if name.startswith(('decoder.', 'lm_head.')):
    return None
  return 'shared.weight' if name == 'encoder.embed_tokens.weight' else name


class _T5Format(NetworkFormat):
  """Any of transformers' T5 models, of which the encoder is taken."""

  def describe(self, config: T5Config) -> dict[str, Any]:
    gated = config.feed_forward_proj == 'gated-gelu'
    return super().describe(config) | {
      'is_gated_act': gated, 'dense_act_fn': 'gelu_new' if gated else 'relu'
    }


T5 = _T5Format(
  T5EncoderModel, T5Config, ('t5',), 'model_type', accepted=_ACCEPTED,
  written={'architectures': ['T5EncoderModel'], 'is_encoder_decoder': False}, rename=_encoder,
)

T5_ENCODERS = {
  't5_v1_1_small': T5Config(d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj='gated-gelu'),
  # Stable Diffusion 3, PixArt, Imagen.
  't5_v1_1_xxl': T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj='gated-gelu'
  ),
}
"""The published encoders by name."""
