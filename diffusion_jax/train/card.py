"""The model card of a run: what was trained, on what, how, and how well (Mitchell et al. 2019)."""

from typing import Any

import jax

TITLES = {
  'autoencoder': 'KL autoencoder',
  'classifier': 'Classifier of images',
  'clip': 'CLIP, text and image encoder',
  'diffusion': 'Text-to-image latent diffusion model',
  'finetune': 'Fine-tuned text-to-image model',
  'toy': 'Denoiser of points in the plane',
}


def model_card(
  config: dict[str, Any], *, parameters: int, steps: int, seconds: float, command: str,
  scores: dict[str, dict[str, Any]], credit: str, measured: str,
) -> str:
  """Markdown. `seconds` is the time spent training, with drawing and scoring; `measured` says
  what the scores are measured on."""
  data, loop = config['data'], config['loop']
  records = steps * loop['batch_size']
  one, edge = 'images', f'{data["size"]} x {data["size"]} pixels'
  if config['task'] == 'toy':
    one, edge = f'records of {data["size"]} points', 'points in the plane'
  lines = [
    f'# {TITLES[config["task"]]} ({data["dataset"]}, {edge})', '',
    f'Trained with diffusion_jax by `{command}`.', '',
    f'- Trained parameters: {parameters:,}',
    f'- Steps: {steps:,} of {loop["total_steps"]:,}, {records:,} {one}, '
    f'batch {loop["batch_size"]}',
    f'- Time: {seconds / 3600:.2f} hours on {jax.device_count()} x {jax.devices()[0].device_kind}',
    f'- Data: {data["dataset"]}, {edge}, training split',
    '- Settings: see config.json of the run', '',
  ]
  if scores:
    lines += ['## Scores', '', measured, '']
    lines += _table(scores)
  if credit:
    lines += ['## Credit', '', credit, '']
  return '\n'.join(lines)


def _table(scores: dict[str, dict[str, Any]]) -> list[str]:
  columns = [name for name in scores if name != 'settings']
  rows = list(dict.fromkeys(metric for name in columns for metric in scores[name]))
  lines = [f'| metric | {" | ".join(columns)} |', f'|---|{"---|" * len(columns)}']
  for row in rows:
    cells = [f'{scores[c][row]:.4g}' if row in scores[c] else '' for c in columns]
    lines.append(f'| {row} | {" | ".join(cells)} |')
  settings = scores.get('settings', {})
  if settings:
    lines += ['', 'Sampled with ' + ', '.join(f'{k} {v}' for k, v in settings.items()) + '.']
  return [*lines, '']
