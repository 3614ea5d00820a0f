"""The benchmark of reading, on few small pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import reading
from benchmarks.command import run_command
from diffusion_jax.data.images import read_square


def test_both_sides_read_the_same_pixels(tmp_path):
  size = reading.make_pictures(tmp_path, 4, 32)
  assert 500 < size < 5000 and len(list(tmp_path.glob('*.jpg'))) == 4
  loader = reading._ours(tmp_path, 24, 4, 0)
  assert next(loader)['image'].shape == (4, 24, 24, 3)
  with Image.open(tmp_path / '000001.jpg') as image:
    theirs = reading.transformed(image, 24).numpy().transpose(1, 2, 0)
  ours = read_square(tmp_path / '000001.jpg', 24)[0] / 127.5 - 1
  errors = [np.abs(theirs - each).max() for each in (ours, ours[:, ::-1])]
  assert min(errors) < 1e-6


def test_the_command_compares_in_processes(tmp_path, capsys):
  out = tmp_path / 'reading.json'
  code = run_command('benchmarks.reading', reading, [
    '--edge', '16', '--pictures', '8', '--batch', '2', '--cores', '1', '--rounds', '1', '--seconds',
    '0.2', '--json', str(out),
  ])
  found = json.loads(out.read_text())
  assert code == 0 and set(found['pictures_per_second_by_stage']) == set(reading.STAGES)
  rates = found['pictures_per_second']
  assert rates['ours, 1']['median'] > 0 and rates['torch DataLoader, 1']['median'] > 0
  assert found['ratios']['ours to torch DataLoader']['median'] == pytest.approx(
    rates['ours, 1']['median'] / rates['torch DataLoader, 1']['median'], rel=1e-3
  )
  assert 'python -m benchmarks.reading' in found['command'] and 'ratios' in capsys.readouterr().out


def test_a_set_of_many_records_takes_no_longer_to_start_than_one_of_few():
  few, many = (reading.measure_many(n, 8, 4) for n in (100, 1_000_000))
  assert many['first_batch_seconds'] < 5
  assert many['added_bytes'] - few['added_bytes'] < 60e6
