"""The guidance that a distilled denoiser imitates."""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.conditioners import Request
from diffusion_jax.pipelines.distilled import DistilledGuidance


def test_what_is_told():
  told, _ = DistilledGuidance.build({'scale': 2}, None)
  given = lambda **how: told.encode({}, told.rows(Request(['a', 'b', 'c'], **how)))['guidance']
  np.testing.assert_array_equal(given(), [2, 2, 2])
  np.testing.assert_array_equal(given(guidance=0.0), [0, 0, 0])
  assert DistilledGuidance().scale == 3.5
  np.testing.assert_array_equal(told.of_size(4, 8, 8)['guidance'], [2] * 4)


@pytest.mark.parametrize('options', [{'scale': float('nan')}, {'scale': '3'}, {'strength': 1}])
def test_a_section_that_says_something_else(options):
  with pytest.raises(UserError, match='distilled_guidance'):
    DistilledGuidance.build(options, None)
