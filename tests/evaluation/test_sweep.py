"""Sweeps: which combinations there are, what each costs, which one is best."""

import dataclasses

import pytest

from diffusion_jax.diffusion.noise import NoiseSchedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.sweep import applied, best, combinations, network_calls
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import VectorSpace


def test_every_combination_once_the_last_name_fastest():
  assert combinations(['guidance=1,4', 'steps=2,3', 'sampler=ddim']) == [
    {'guidance': g, 'steps': n, 'sampler': 'ddim'} for g in (1.0, 4.0) for n in (2, 3)
  ]


def test_sweeps_are_taken_together_and_what_they_share_once():
  found = combinations([
    'guidance=1,2', 'or', 'guidance=2', 'or', 'guidance=2', 'guidance_interval=0.5:4,0:inf',
    'or', 'guidance_kind=zero_star', 'guidance=2',
  ])
  assert found == [
    {'guidance': 1.0}, {'guidance': 2.0}, {'guidance': 2.0, 'guidance_interval': (0.5, 4.0)},
    {'guidance': 2.0, 'guidance_interval': (0.0, None)},
    {'guidance_kind': 'zero_star', 'guidance': 2.0},
  ]
  plain = SampleConfig()
  assert applied(plain, found[3]) == dataclasses.replace(plain, guidance=2.0)
  assert not applied(plain, found[2]).program.everywhere


@pytest.mark.parametrize(('texts', 'named'), [
  (['or'], 'has no values'),
  (['guidance_interval=1'], 'takes values like 0.2:5'),
  (['guidance'], 'not of the form NAME=A,B'),
  (['seed=1,2'], 'with a NAME of guidance, steps'),
  (['steps=2,x'], 'steps takes values like 4'),
  (['steps=2.5'], 'steps takes values like 4'),
  (['steps=2,2'], 'has a value twice'),
  (['steps=2', 'steps=3'], 'names steps twice'),
])
def test_what_is_no_sweep_is_named(texts, named):
  with pytest.raises(UserError, match=named):
    combinations(texts)


def _model():
  """A model of so much as decides how often its network is called."""
  noise = NoiseSchedule.of(ScheduleConfig())
  return Diffusion(VectorSpace(), None, {}, noise, Parameterization())


@pytest.mark.parametrize(('sampler', 'guidance', 'calls'), [
  ('ddim', 1.0, 10), ('ddim', 3.0, 20), ('dpmpp_2m', 3.0, 20),
  # Two calls a step, one where it ends clean.
  ('heun', 1.0, 19), ('heun', 3.0, 38),
  # Four calls in each of the first three steps.
  ('pndm', 1.0, 19), ('dpm_adaptive', 1.0, None),
])
def test_network_calls(sampler, guidance, calls):
  config = SampleConfig(sampler=sampler, steps=10, guidance=guidance, spacing='linspace')
  assert network_calls(_model(), config) == calls


def test_each_other_network_that_guidance_leads_away_from_counts():
  calls = lambda **changes: network_calls(_model(), SampleConfig('ddim', 10, **changes))
  assert calls(guidance=1.0, perturbed_attention=2.0) == 20
  assert calls(guidance=1.0, autoguidance=2.0) == 20
  assert calls(guidance=3.0, autoguidance=2.0, perturbed_attention=2.0) == 40


def test_only_steps_within_the_interval_are_guided():
  model = _model()
  config = SampleConfig('ddim', steps=10, guidance=3.0)
  grid = config.numbers(model.noise).grid
  levels = sorted(float(s / a) for a, s in zip(*grid, strict=True) if s > 0)[:10]
  between = lambda i: (levels[i] + levels[i + 1]) / 2
  inside = dataclasses.replace(config, guidance_interval=(between(1), between(5)))
  assert network_calls(model, inside) == 10 + 4


def test_the_best_has_the_lowest_distance():
  figures = {'a': {'kid_clip': 0.0, 'fd_clip': 3.0}, 'b': {'kid_clip': 1.0, 'fd_clip': 2.0}}
  assert best(figures) == 'b'
  assert best({'a': {'clip_score': 3.0}, 'b': {'clip_score': 4.0}}) == 'b'


def test_a_combination_changes_the_settings_that_it_names():
  one = {'steps': 7, 'ema_halflife_images': 3.0}
  assert applied(SampleConfig(), one) == SampleConfig(steps=7)
