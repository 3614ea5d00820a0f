"""Tables of parts: every row can be imported, an unknown name is told the nearest, more can be
added from outside."""

import pytest

from diffusion_jax import registry
from diffusion_jax.errors import UserError

TABLES = {one.kind: one for one in vars(registry).values() if isinstance(one, registry.Table)}
ROWS = [(kind, name) for kind, table in TABLES.items() for name in table]


@pytest.mark.parametrize('kind, name', ROWS)
def test_every_row_can_be_imported(kind, name):
  assert registry.load(TABLES[kind], name) is not None


def test_an_unknown_name_is_told_the_nearest_and_where_it_stands():
  with pytest.raises(UserError, match=r"config\.task is 'toi'; did you mean toy\?"):
    registry.load(registry.TASKS, 'toi', 'config.task')
  with pytest.raises(UserError, match="there is no transform 'xyz'; choose one of resize, "):
    registry.load(registry.TRANSFORMS, 'xyz')


def test_a_part_from_outside_is_one_row():
  table = registry.Table('metric', {})
  registry.register(table, 'pi', 'math:pi')
  assert 3.14 < registry.load(table, 'pi') < 3.15
  registry.register(table, 'pi', 'math:pi')  # The same again, such as by a reloaded config.
  with pytest.raises(ValueError, match="already a metric 'pi'"):
    registry.register(table, 'pi', 'math:e')


def test_a_module_named_by_the_environment_registers_before_a_name_is_refused(
  monkeypatch, tmp_path
):
  (tmp_path / 'my_parts.py').write_text(
    'from diffusion_jax import registry\n'
    "registry.register(registry.TRANSFORMS, 'mirror', 'my_parts:Mirror')\n"
    'class Mirror: pass\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setenv(registry.PLUGINS, 'my_parts')
  monkeypatch.setitem(registry.TRANSFORMS, 'mirror', '')
  del registry.TRANSFORMS['mirror']
  registry.import_plugins.cache_clear()
  assert registry.load(registry.TRANSFORMS, 'mirror').__name__ == 'Mirror'
  monkeypatch.setenv(registry.PLUGINS, 'not_there')
  registry.import_plugins.cache_clear()
  with pytest.raises(UserError, match='names not_there, which cannot be imported'):
    registry.load(registry.TRANSFORMS, 'other')
  registry.import_plugins.cache_clear()
