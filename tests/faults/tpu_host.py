"""One host of a TPU pod that no variable speaks of: python tpu_host.py INDEX PORT WORKDIR.

Its PCI bus shows a TPU, libtpu is there, and jax finds its peers as it does on Google's machines,
once it is imported. Prints what it knew before that, and its place in the end.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

from diffusion_jax.cli import train
from diffusion_jax.parallel import startup

COUNT = 2


def pci_bus(folder: Path) -> Path:
  """Write what the kernel shows of a network card and a TPU, both of Google's."""
  for name, kind in (('0000:00:03.0', '0x020000'), ('0000:00:04.0', '0x088000')):
    (folder / name).mkdir()
    (folder / name / 'vendor').write_text('0x1ae0\n')
    (folder / name / 'class').write_text(f'{kind}\n')
  return folder


def imitate_metadata_service(index: int, port: int) -> None:
  """Let jax, once imported, see what it sees on such a host."""
  from jax._src import clusters

  class Pod(clusters.ClusterEnv):
    name = 'simulated'
    is_env_present = classmethod(lambda cls: True)
    get_coordinator_address = classmethod(lambda cls, **_: f'127.0.0.1:{port}')
    get_process_count = classmethod(lambda cls: COUNT)
    get_process_id = classmethod(lambda cls: index)
    get_local_process_id = classmethod(lambda cls: None)

  os.environ.pop('TPU_SKIP_MDS_QUERY', None)
  os.environ['TPU_ML_PLATFORM'] = 'JAX'


def main(index: int, port: int, workdir: str) -> None:
  startup.PCI_DEVICES = pci_bus(Path(tempfile.mkdtemp()))
  with mock.patch('importlib.util.find_spec', return_value='libtpu'):
    start = train.opening(argparse.Namespace(workdir=workdir, overrides=[]))
  opened = start.status is not None
  imitate_metadata_service(index, port)
  with start:
    cluster = startup.start_distributed(say=lambda text: None)
    start.join()
    print(opened, cluster.kind, cluster.index, cluster.processes, start.lock is not None)


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
