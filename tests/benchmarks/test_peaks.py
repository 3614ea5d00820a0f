"""Peaks by the names that JAX gives to chips, and one that is measured."""

import jax
import pytest

from benchmarks.peaks import listed_peak, measured_peak, peak_of
from diffusion_jax.planning.chips import CHIPS


@pytest.mark.parametrize(('kind', 'half', 'single'), [
  ('NVIDIA H100 80GB HBM3', 989.4, 494.7), ('NVIDIA H100 PCIe', 756, 378),
  ('NVIDIA H100 NVL', 835.5, 417.5), ('NVIDIA H200', 989.4, 494.7),
  ('NVIDIA A100-SXM4-80GB', 312, 156), ('NVIDIA L4', 121, 60), ('Tesla T4', 65, 8.1),
  ('TPU v4', 275, 275), ('TPU v5 lite', 197, 197), ('TPU v5p', 459, 459), ('TPU v5', 459, 459),
  ('TPU v6 lite', 918, 918), ('TPU v6e', 918, 918),
])
def test_teraflops_by_name(kind, half, single):
  assert listed_peak(kind, 'bfloat16').flops == pytest.approx(half * 1e12)
  assert listed_peak(kind, 'float32').flops == pytest.approx(single * 1e12)


@pytest.mark.parametrize('kind', ['NVIDIA L40S', 'NVIDIA T400', 'cpu', 'AMD'])
def test_what_is_not_in_the_table_is_not_guessed(kind):
  assert listed_peak(kind, 'bfloat16') is None


def test_every_chip_has_a_source():
  assert all(len(chip.source) > 20 and chip.bfloat16 >= chip.float32 for chip in CHIPS)


def test_a_cpu_is_measured_and_simulated_devices_share_it():
  peak = measured_peak('float32', edge=256, repeats=3)
  assert 1e8 < peak.flops < 1e14 and 'measured' in peak.source
  shared = peak_of(jax.devices()[0], 'float32', edge=256)
  assert f'of {jax.local_device_count()} on one CPU' in shared.source
  assert 1e7 < shared.flops < 1e14
