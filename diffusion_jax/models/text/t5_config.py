"""Config of T5's encoder; field names are the keys of transformers' config.json."""

import dataclasses

from diffusion_jax.models.checks import MOST_LAYERS, above_zero, positive, require

FEED_FORWARDS = ('relu', 'gated-gelu')


@dataclasses.dataclass(frozen=True)
class T5Config:
  """T5 (Raffel et al. 2020) has feed_forward_proj 'relu', T5 v1.1 'gated-gelu'; defaults: T5-small.

  `relative_attention_num_buckets` counts both directions; distances from
  `relative_attention_max_distance` on share the last bucket of theirs.
  """

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = 'relu'
  pad_token_id: int = 0
  eos_token_id: int = 1

  def __post_init__(self):
    positive(
      self, 'vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_heads',
      'relative_attention_num_buckets', 'relative_attention_max_distance',
    )
    positive(self, 'num_layers', most=MOST_LAYERS)
    above_zero(self, 'layer_norm_epsilon', most=1)
    buckets, longest = self.relative_attention_num_buckets, self.relative_attention_max_distance
    require(
      buckets % 4 == 0 and longest > buckets // 4,
      f'T5Config.relative_attention_num_buckets={buckets} must be a multiple of 4 whose quarter is '
      f'below relative_attention_max_distance={longest}.',
    )
    require(
      self.feed_forward_proj in FEED_FORWARDS,
      f'T5Config.feed_forward_proj={self.feed_forward_proj!r} is not known; use one of '
      f'{", ".join(FEED_FORWARDS)}.',
    )
