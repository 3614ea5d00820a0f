"""What pages and tables call figures and columns; an arrow says which way is better."""

import re

COLUMNS = {
  'generated': 'this model', 'reconstructed': 'this model', 'test': 'this model',
  'samples': 'samples', 'real': 'real test images', 'untrained': 'untrained model',
  'commonest': 'always the commonest class',
}
"""In the order in which they are shown."""
OWN = ('generated', 'reconstructed', 'test', 'samples')
"""Columns that are of what is scored; all others are there to compare it with."""

_FEATURES = {'clip': 'CLIP', 'dinov2': 'DINOv2', 'classifier': "the classifier's"}
_FIGURES = {
  'accuracy': 'Fraction of images given their own class ↑',
  'accuracy_per_class': 'Mean over classes of the fraction given its own class ↑',
  'bits_per_dim': 'Bits per dimension ↓',
  'class_accuracy': 'Fraction found to be of their class ↑',
  'clip_score': 'CLIP score ↑',
  'energy_distance': 'Energy distance to the test points ↓',
  'fid': 'FID ↓', 'sfid': 'sFID ↓', 'rfid': 'rFID ↓',
  'images': 'Number of images',
  'images_per_second': 'Images per second ↑',
  'data_wait_fraction': 'Fraction of the time spent waiting for data ↓',
  'kid': 'KID ↓', 'kid_std': 'KID, deviation over subsets',
  'l1': 'L1 distance, pixels in [-1, 1] ↓',
  'latent_mean': 'Mean of the latents', 'latent_std': 'Deviation of the latents',
  'learning_rate': 'Learning rate',
  'gradient_norm': 'Norm of the gradient',
  'logit_scale': 'Factor on cosines (inverse temperature)',
  'lpips': 'LPIPS ↓',
  'psnr': 'PSNR, dB ↑',
  'retrieval_r1': 'Own caption ranked first ↑',
  'ssim': 'SSIM ↑',
}
_PATTERNS = (
  (r'r?fd_(.+?)(_infinity)?', lambda m: f'Fréchet distance, {_of(m[1])} features ↓'
   + (', for infinitely many' if m[2] else '')),
  (r'kid_(.+)_std', lambda m: f'Kernel distance, {_of(m[1])} features, deviation over subsets'),
  (r'kid_(.+)', lambda m: f'Kernel distance, {_of(m[1])} features ↓'),
  (r'retrieval_r(\d+)_of_(\d+)', lambda m: _retrieval(int(m[1]), int(m[2]))),
)


def figure_title(name: str, task: str = '') -> str:
  """What a figure or metric is called; itself where nothing else is known of it.

  Args:
    task: of the run that it is of, '' where that is not known.
  """
  if name.startswith('accuracy') and task not in ('', 'classifier'):
    return name  # Of what, only its task knows.
  if name == 'images_per_second' and task == 'toy':
    return 'Records per second ↑'
  if name in _FIGURES:
    return _FIGURES[name]
  for pattern, title in _PATTERNS:
    if match := re.fullmatch(pattern, name):
      return title(match)
  return name


def column_title(name: str, task: str = '') -> str:
  """What a column of scores is called."""
  if name == 'real' and task == 'toy':
    return 'real test points'
  return COLUMNS.get(name, name)


def ordered(columns: list[str]) -> list[str]:
  """What is scored first, then what it is compared with; unknown columns last."""
  known = list(COLUMNS)
  return sorted(columns, key=lambda name: known.index(name) if name in known else len(known))


def _of(family: str) -> str:
  return _FEATURES.get(family, family)


def _retrieval(k: int, n: int) -> str:
  return f'Own caption {"ranked first" if k == 1 else f"among the first {k}"} of {n:,} ↑'
