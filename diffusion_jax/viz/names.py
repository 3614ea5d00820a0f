"""Titles of metrics and columns on pages; an arrow says which way is better."""

from diffusion_jax.evaluation.scores import value_of

COLUMNS = {
  'generated': 'this model', 'reconstructed': 'this model', 'test': 'this model',
  'samples': 'samples', 'real': 'real test images', 'untrained': 'untrained model',
  'commonest': 'always the commonest class',
}
"""In the order in which they are shown."""
OWN = ('generated', 'reconstructed', 'test', 'samples')
"""Columns that are of what is scored; all others are there to compare it with."""

_METRICS = {
  'images_per_second': 'Images per second ↑',
  'data_wait_fraction': 'Fraction of the time spent waiting for data ↓',
  'learning_rate': 'Learning rate',
  'gradient_norm': 'Norm of the gradient',
  'logit_scale': 'Factor on cosines (inverse temperature)',
}
"""Of training; those of evaluations say their titles themselves."""


def metric_title(name: str, task: str = '') -> str:
  """Return what a metric is called; its name where nothing else is known of it.

  Args:
    task: of the run that it is of, '' where that is not known.
  """
  if name.startswith('accuracy') and task not in ('', 'classifier'):
    return name  # Of what, only its task knows.
  if name == 'images_per_second' and task == 'toy':
    return 'Records per second ↑'
  if name in _METRICS:
    return _METRICS[name]
  known = value_of(name)
  return known[0].titled(name, known[1]) if known else name


def column_title(name: str, task: str = '') -> str:
  """What a column of scores is called."""
  if name == 'real' and task == 'toy':
    return 'real test points'
  return COLUMNS.get(name, name)


def ordered(columns: list[str]) -> list[str]:
  """What is scored first, then what it is compared with; unknown columns last."""
  known = list(COLUMNS)
  return sorted(columns, key=lambda name: known.index(name) if name in known else len(known))
