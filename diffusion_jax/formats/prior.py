"""config.json of DALL-E 2's prior, as diffusers writes it."""

from diffusion_jax.formats.published import ANY, NetworkFormat
from diffusion_jax.models.prior import PriorTransformer, PriorTransformerConfig

_WRITTEN = {
  'additional_embeddings': 4, 'time_embed_act_fn': 'silu', 'norm_in_type': None,
  'embedding_proj_norm_type': None, 'encoder_hid_proj_type': 'linear', 'added_emb_type': 'prd',
  'time_embed_dim': None, 'clip_embed_dim': None,
}

PRIOR = NetworkFormat(
  PriorTransformer, PriorTransformerConfig, ('PriorTransformer',),
  accepted={**_WRITTEN, 'dropout': ANY}, written=_WRITTEN,
)
