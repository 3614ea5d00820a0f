"""The sizes that a network can take, which its config tells before any weight is read."""

import dataclasses
import types

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.limits import EdgeRule, check_edges
from diffusion_jax.models.dit import DiTConfig
from diffusion_jax.models.flux import FluxConfig
from diffusion_jax.models.mmdit import MMDiTConfig
from diffusion_jax.models.pixart import PixArtConfig
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.rules import edge_rule
from diffusion_jax.pipelines.spaces import PixelSpace
from diffusion_jax.pixels import size_like

RULES = {
  'unet': (UNetConfig(), EdgeRule(64)),
  'dit': (DiTConfig(patch_size=4), EdgeRule(32)),
  'dit, learned': (DiTConfig(positions='learned'), EdgeRule(16)),
  'dit, rotary': (DiTConfig(positions='rotary'), EdgeRule(16)),
  'mmdit': (MMDiTConfig(pos_embed_max_size=96), EdgeRule(16, 1536)),
  'mmdit, learned': (MMDiTConfig(positions='learned'), EdgeRule(16)),
  'flux': (FluxConfig(), EdgeRule(16)),
  'pixart': (PixArtConfig(), EdgeRule(16)),
}


@pytest.mark.parametrize('name', RULES)
def test_every_denoiser_s_config_tells_what_it_can_take(name):
  """Of latents of 1/8 of the pixels."""
  config, wanted = RULES[name]
  assert edge_rule(8, config) == wanted


def test_one_sentence_names_the_nearest_size_that_fits():
  small = MMDiTConfig(pos_embed_max_size=7, sample_size=8)
  rule = edge_rule(4, small, UNetConfig(block_out_channels=(8,) * 3, norm_num_groups=4,
                                        down_block_types=('DownBlock2D',) * 3,
                                        up_block_types=('UpBlock2D',) * 3))
  assert rule == EdgeRule(16, 48)  # 7 patches of 2 are 56 pixels, 3 whole steps of 16.
  for size, near in (((40, 16), '(32, 16)'), ((64, 48), '(48, 48)'), (400, '48'), ((0, 9), '(16')):
    with pytest.raises(UserError) as error:
      check_edges(size, rule)
    assert f'multiples of 16 up to 48; the nearest such size is {near}' in str(error.value)
  check_edges((48, 16), rule)
  check_edges(32, rule)


def test_a_model_is_asked_before_its_weights(monkeypatch):
  """By the size that is wanted, and by a picture's, whose area is taken where its edges are not."""
  config = MMDiTConfig(in_channels=3, out_channels=3, sample_size=64, pos_embed_max_size=40)
  model = Diffusion(PixelSpace(), types.SimpleNamespace(config=config), {}, None, None)
  assert model.size_of(None, None) == (64, 64) and model.size_of(80, 16) == (80, 16)
  for size, near in (((82, 64), '80x64'), ((64, 63), '64x64'), ((1000, 9), '80x8')):
    with pytest.raises(UserError, match=f'multiples of 2 up to 80; the nearest .* is {near}'):
      model.size_of(*size)
  assert model.size_like(10, 10) == (64, 64) and model.size_like(30, 10) == (78, 26)
  worse = dataclasses.replace(config, patch_size=4, pos_embed_max_size=18)
  both = dataclasses.replace(model, worse=types.SimpleNamespace(config=worse))
  assert both.edges == EdgeRule(4, 72)


@pytest.mark.parametrize('picture', [(1, 1), (3, 1), (1, 9), (97, 100)])
@pytest.mark.parametrize('most', [8, 64, 72])
def test_a_picture_s_size_keeps_within_the_bounds(picture, most):
  height, width = size_like(*picture, 64**2, 8, most)
  assert height % 8 == width % 8 == 0 and max(height, width) <= most
