"""The card of a prepared set of pictures: README.md, and card.html, which loads nothing.

It says the same each time it is written of the same set: no dates, no names of machines.
"""

from __future__ import annotations

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.prepare.summary import Summary
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.sources.records import open_records
from diffusion_jax.data.unreadable import readable
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, printable
from diffusion_jax.viz import page
from diffusion_jax.viz.charts import histogram_chart
from diffusion_jax.viz.grids import make_grid

MOST_SHOWN, MOST_PAIRS, MOST_CLASSES, MOST_BAD = 48, 16, 40, 40
"""Pictures on the contact sheet, pairs, classes and unreadable pictures on a card."""
_CELL, _COLUMNS = 96, 8
_SHEET = 1_500_000
"""Letters of the contact sheet."""
_HOW_ALIKE = (
  'Found by a perceptual hash and a small copy of each picture: other sizes, formats, qualities '
  'and a little more or less light are found, mirrored, turned and cropped copies are not.'
)


def write_data_card(summary: Summary) -> None:
  """Write README.md and card.html beside the records, which are whole."""
  with atomic_write(summary.folder / 'README.md') as file:
    file.write(_markdown(summary).encode(errors='replace'))
  with atomic_write(summary.folder / 'card.html') as file:
    file.write(page.page(summary.folder.name, _html(summary)).encode(errors='replace'))


def _table(summary: Summary) -> tuple[list[str], list[tuple[str, list[str]]]]:
  """(columns, rows) of numbers by split."""
  found, rows = summary.duplicates, []
  for name, split in summary.splits.items():
    rows.append((name, [
      f'{split.records:,}', f'{split.shards:,}', f'{split.bytes / 1e6:,.1f}',
      f'{found.repeats[name]:,}', f'{found.alike[name]:,}',
    ]))
  return ['split', 'pictures', 'shards', 'MB', 'repeats', 'look like another'], rows


def _facts(summary: Summary) -> list[str]:
  kept = summary.kept['picture_format']
  edge = summary.kept['max_edge']
  how = 'as they were stored' if kept == 'stored' else f'as {kept}' + (
    f', the longer edge at most {edge} pixels' if edge else ''
  )
  facts = [f'Source: {summary.source}. Pictures are kept {how}.', f'Scores: {summary.measured}']
  return [*facts, *summary.warnings, *summary.notes]


def _markdown(summary: Summary) -> str:
  columns, rows = _table(summary)
  bad = sum(summary.causes.values())
  lines = [
    f'# {summary.folder.name}', '',
    f'{summary.records:,} pictures with captions, of `{_plain(summary.source)}`, as sharded '
    'ArrayRecord. To train on them: `--config.data.dataset=records:DIR`. More is in card.html.', '',
    f'| {" | ".join(columns)} |', f'|---|{"---:|" * (len(columns) - 1)}',
    *(f'| {name} | {" | ".join(cells)} |' for name, cells in rows), '',
    *(f'- {_plain(fact)}' for fact in _facts(summary)),
    f'- {_HOW_ALIKE}', '', '## Pictures that could not be read', '',
    f'{bad:,}; they are left out.' if bad else 'None.', '',
    *(f'- {cause}: {count:,}' for cause, count in summary.causes.items()), '',
    *(f'  - `{_plain(name)}` ({cause})' for cause, _, name in summary.bad[:MOST_BAD]), '',
    '## Captions', '', *(f'- {name}: {line}' for name, line in _caption_facts(summary).items()), '',
    '## Credit', '', _plain(summary.credit) or 'Nobody is named.', '',
    '## Made by', '', f'    {_in_one_line(summary.command)}', '',
    *(f'- {split}, {what}: `{value}`' for split, each in summary.fingerprints.items()
      for what, value in each.items()), '',
  ]
  return '\n'.join(lines)


def _plain(text: str) -> str:
  return _in_one_line(text).replace('`', "'").replace('|', '/')


def _in_one_line(text: str) -> str:
  return ''.join(letter if letter.isprintable() else ' ' for letter in text)


def _caption_facts(summary: Summary) -> dict[str, str]:
  counts = np.concatenate([split.captions for split in summary.splits.values()])
  lengths = np.concatenate([split.characters for split in summary.splits.values()])
  lengths = lengths[counts > 0] if counts.any() else np.zeros(1)
  low, middle, high = np.quantile(lengths, (0.05, 0.5, 0.95))
  examples = '; '.join(f'"{_plain(caption)}"' for _, caption in summary.samples)
  return {
    'for each picture': f'{counts.mean():.3g} on average, {int(counts.min())} to '
                        f'{int(counts.max())}',
    'characters of the first': f'{low:.0f} (5 %), {middle:.0f} (half), {high:.0f} (95 %)',
    'most frequent words': ', '.join(f'{_plain(w)} ({n:,})' for w, n in summary.words.items()),
    'examples': examples,
  }


def _html(summary: Summary) -> str:
  columns, rows = _table(summary)
  warnings = page.bullets(summary.warnings)
  shown = open_records(DataConfig(f'records:{summary.folder}', _CELL, test_fraction=0))
  classes = [(name, [f'{split.labels.get(name, 0):,}' for split in summary.splits.values()])
             for name in _classes(summary)]
  parts = [
    f'<header>\n<h1>{page.escape(summary.folder.name)}</h1>\n<p class="muted">'
    f'{page.escape(f"{summary.records:,} pictures of {summary.source}")}</p>\n</header>\n',
    page.section('beware', 'What to beware of', '', warnings),
    page.section('figures', 'Splits', ' '.join(_facts(summary)), page.number_table(columns, rows)),
    page.section('pictures', 'Pictures', 'Chosen by their place among the records; the middle of '
                 'each.', _sheet(shown[0])),
    page.section('sizes', 'Sizes', 'Upright, in pixels.', page.chart_grid(_sizes(summary))),
    _captions(summary),
    page.section('classes', 'Classes', f'The {MOST_CLASSES} largest.' if classes else '',
                 classes and page.number_table(['', *summary.splits], classes)),
    page.section('alike', 'Pictures that look the same', _HOW_ALIKE, _pairs(summary)),
    _unreadable(summary),
    page.section('credit', 'Credit', '', page.bullets([summary.credit] if summary.credit else [])),
    page.section('made', 'Made by', '', page.details('Command, options, fingerprints', (
      f'<p><code>{page.escape(summary.command)}</code></p>'
      + page.settings_table({'options': summary.kept, 'fingerprints': summary.fingerprints})
    ), is_open=True)),
  ]
  return ''.join(parts)


def _classes(summary: Summary) -> list[str]:
  counts: dict[str, int] = {}
  for split in summary.splits.values():
    for name, count in split.labels.items():
      counts[name] = counts.get(name, 0) + count
  return sorted(counts, key=lambda name: (-counts[name], name))[:MOST_CLASSES]


def _chosen(count: int, most: int) -> list[int]:
  """Up to `most` numbers below `count`, in order: those whose hash is lowest, so that a set that
  grows keeps most of them."""
  numbers = np.arange(count, dtype=np.uint64)
  mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
  mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  mixed ^= mixed >> np.uint64(27)
  return sorted(np.argsort(mixed, kind='stable')[:most].tolist())


def _sheet(source: PictureSource) -> str:
  records = list(readable(source, _chosen(len(source), MOST_SHOWN)))
  if not records:
    return ''
  captions = [printable((record['captions'] or [''])[0]) for record in records]
  grid = make_grid(np.stack([record['image'] for record in records]), _COLUMNS, captions)
  return (
    f'<div class="latest"><img src="{page.embed_image(grid, _SHEET)}" alt="pictures with their '
    'first captions"></div>'
  )


def _sizes(summary: Summary) -> list[tuple[str, str]]:
  by = lambda f: {name: f(split.sizes.astype(np.float64)) for name, split in summary.splits.items()}
  drawn = [
    ('Width', by(lambda sizes: sizes[:, 1]), 'pixels', True),
    ('Height', by(lambda sizes: sizes[:, 0]), 'pixels', True),
    ('Width / height', by(lambda sizes: sizes[:, 1] / np.maximum(sizes[:, 0], 1)), 'ratio', True),
  ]
  return [
    (title, histogram_chart(values, title=title, xlabel=unit, ratio=ratio))
    for title, values, unit, ratio in drawn
  ]


def _captions(summary: Summary) -> str:
  lengths = {name: split.characters.astype(np.float64) for name, split in summary.splits.items()}
  facts = {name: f'<tr><th scope="row">{page.escape(name)}</th><td>{page.escape(line)}</td></tr>'
           for name, line in _caption_facts(summary).items()}
  table = f'<div class="card scroll"><table><tbody>{"".join(facts.values())}</tbody></table></div>'
  chart = histogram_chart(lengths, title='Length of the first caption', xlabel='characters')
  return page.section('captions', 'Captions', '', table + page.chart_grid([
    ('Length of the first caption', chart)
  ]))


def _pairs(summary: Summary) -> str:
  """The first pairs, side by side, each with the names of both."""
  starts, sources = 0, []
  parts = open_records(DataConfig(f'records:{summary.folder}', _CELL, test_fraction=0))
  for name, source in zip(summary.splits, parts, strict=False):
    sources.append((starts, name, source))
    starts += summary.splits[name].records
  shown = []
  for pair in summary.duplicates.pairs[:MOST_PAIRS].tolist():
    try:
      found = [_record(sources, number) for number in pair]
    except UserError:
      continue
    names = ' · '.join(page.escape(printable(name)) for _, name in found)
    shown.append((found, names))
  return page.strip(shown)


def _record(sources: list, number: int) -> tuple[np.ndarray, str]:
  first, split, source = next(each for each in reversed(sources) if each[0] <= number)
  record = source[number - first]
  return record['image'], f'{split}: {record["id"]}'


def _unreadable(summary: Summary) -> str:
  counts = page.number_table(['cause', 'pictures'], [
    (cause, [f'{count:,}']) for cause, count in summary.causes.items()
  ]) if summary.causes else ''
  named = page.bullets([f'{name}: {cause}' for cause, _, name in summary.bad])
  body = counts + (page.details(f'The first {len(summary.bad):,}', named) if named else '')
  return page.section('unreadable', 'Pictures that could not be read', 'They are left out.', body)
