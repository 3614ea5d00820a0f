"""Noise levels of rectified flows, shifted by the size of the image, against diffusers."""

import dataclasses
import json

import diffusers
import numpy as np
import pytest

from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.errors import UserError
from diffusion_jax.formats.scheduler import read_scheduler, write_scheduler
from diffusion_jax.pipelines.directory import sample_config

STEPS = 7
FLUX_DEV = dict(
  shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
  max_image_seq_len=4096,
)
CONFIGS = {
  'sd3': dict(shift=3.0), 'plain': {}, 'dynamic': FLUX_DEV,
  'linear': FLUX_DEV | dict(time_shift_type='linear'),
  'terminal': FLUX_DEV | dict(shift_terminal=0.1),
  'shifted_terminal': dict(shift=3.0, shift_terminal=0.02),
}


def mu(tokens, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
       **_):
  """As the pipelines of diffusers compute it."""
  slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
  return tokens * slope + base_shift - slope * base_image_seq_len


@pytest.mark.parametrize(('name', 'spacing'), [
  *((name, 'linspace') for name in CONFIGS),
  *((name, 'trailing') for name, config in CONFIGS.items() if config.get('shift', 1) == 1),
  ('dynamic', 'trailing'), ('terminal', 'trailing'),
])
def test_levels(name, spacing):
  """linspace is the scheduler's own spacing, trailing the one that Flux's pipeline hands it."""
  config = CONFIGS[name]
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
  values = json.loads(theirs.to_json_string())
  scheduler = read_scheduler(values, 'scheduler_config.json')
  noise = NoiseSchedule.of(scheduler.schedule)
  scheduler = dataclasses.replace(scheduler, spacing=spacing)
  ours, found = dataclasses.replace(sample_config(scheduler), steps=STEPS), {}
  for tokens in (256, 1000, 4096):
    sigmas = np.linspace(1, 1 / STEPS, STEPS) if spacing == 'trailing' else None
    by_size = {'mu': mu(tokens, **config)} if 'use_dynamic_shifting' in config else {}
    theirs.set_timesteps(STEPS if sigmas is None else None, sigmas=sigmas, **by_size)
    numbers = ours.numbers(noise, tokens=tokens)
    alphas, found[tokens] = (np.asarray(part)[: STEPS + 1] for part in numbers.grid)
    np.testing.assert_allclose(found[tokens], theirs.sigmas.numpy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(alphas + found[tokens], 1, rtol=0, atol=1e-6)
  differ = bool(np.abs(found[256] - found[4096]).max() > 0.05)
  assert differ == ('use_dynamic_shifting' in config)


@pytest.mark.parametrize('name', CONFIGS)
def test_written_as_it_was_read(name):
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
  values = json.loads(theirs.to_json_string())
  scheduler = read_scheduler(values, 'scheduler_config.json')
  written = write_scheduler(scheduler)
  assert read_scheduler(written, 'again') == scheduler
  again = diffusers.FlowMatchEulerDiscreteScheduler.from_config(written)
  for key in CONFIGS[name].keys() - {'shift'}:
    assert again.config[key] == CONFIGS[name][key]
  by_size = {'mu': 0.7} if 'use_dynamic_shifting' in CONFIGS[name] else {}
  for one in (theirs, again):
    one.set_timesteps(STEPS, **by_size)
  np.testing.assert_array_equal(again.sigmas, theirs.sigmas)


@pytest.mark.parametrize(('changes', 'says'), [
  (dict(max_image_seq_len=256), 'max_image_seq_len=256'),
  (dict(time_shift_type='cubic'), 'time_shift_type'), (dict(shift_terminal=1.5), 'shift_terminal'),
  (dict(max_shift='much'), 'max_shift'), (dict(use_karras_sigmas=True), 'use_karras_sigmas'),
])
def test_what_cannot_be_read_is_named(changes, says):
  values = {'_class_name': 'FlowMatchEulerDiscreteScheduler', **FLUX_DEV, **changes}
  with pytest.raises(UserError, match=says):
    read_scheduler(values, 'scheduler_config.json')


def test_one_step_cannot_be_stretched():
  values = {'_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift_terminal': 0.1}
  scheduler = read_scheduler(values, 'scheduler_config.json')
  sample = dataclasses.replace(sample_config(scheduler), steps=1)
  with pytest.raises(UserError, match='two sampling steps'):
    sample.numbers(NoiseSchedule.of(scheduler.schedule))


def test_networks_are_told_sigma():
  """In training as in sampling, by whatever sampler: a shifted table has it at other indices."""
  values = {'_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift': 3.0}
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
  config = read_scheduler(values, 'scheduler_config.json').schedule
  noise = NoiseSchedule.of(config)
  levels = noise.at_timestep(np.array([999, 500, 0]))
  wanted = theirs.timesteps.numpy()[[0, 499, 999]]
  np.testing.assert_allclose(levels.label, wanted, rtol=1e-6)
  np.testing.assert_allclose(noise.label(levels.alpha, levels.sigma), wanted, rtol=1e-6)
  np.testing.assert_allclose(noise.at_label(levels.label), levels[:2], rtol=0, atol=1e-6)
  nearest = noise.at_ratio(levels.sigma[1:] / levels.alpha[1:])
  np.testing.assert_allclose(nearest.label, wanted[1:], rtol=1e-6)
  assert NoiseConfig(**config.saved()) == config
  with pytest.raises(UserError, match='label'):
    NoiseConfig(label='sigma')
