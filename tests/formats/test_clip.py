"""preprocessor_config.json of CLIP: what is absurd is one sentence."""

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.clip import pixel_statistics

NAN, LONG = float('nan'), 'x' * 10**5


@pytest.mark.parametrize('values', [
  {'image_mean': bad} for bad in (3, [1, 2], ['a'] * 3, [NAN] * 3, [[1]] * 3, LONG, [1e300] * 3)
] + [{'image_std': [0, 1, 1]}, {'image_std': [-1, 1, 1]}, {'image_std': [True, 1, 1]}])
def test_pixels(values):
  with pytest.raises(UserError, match=r'x.json: .* must be three finite numbers'):
    pixel_statistics(values, 'x.json')
