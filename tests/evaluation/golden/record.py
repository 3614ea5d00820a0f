"""Records what the reference packages say of `features.draw`, as figures.json beside this file.

Run where they are installed: torch-fidelity 0.4.0, pytorch-fid 0.3.0, clean-fid 0.1.35, prdc 0.2,
torch and scipy below 1.18. They import torchvision for reading images, which is not done here; an
empty module stands in for it where it is missing.

python tests/evaluation/golden/record.py
"""

import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).parent
PACKAGES = ('torch-fidelity', 'pytorch-fid', 'clean-fid', 'prdc', 'torch', 'numpy', 'scipy',
            'scikit-learn')
KID = {'kid_subsets': 20, 'kid_subset_size': 100, 'rng_seed': 2020, 'verbose': False}
CLEAN_KID = {'num_subsets': 20, 'max_subset_size': 100}
NEIGHBOURS = (1, 3, 5)


def absent_torchvision() -> None:
  if importlib.util.find_spec('torchvision') is None:
    for name in ('', '.transforms', '.models', '.datasets', '.transforms.functional', '.models.vgg',
                 '.models.inception'):
      sys.modules[f'torchvision{name}'] = mock.MagicMock(__version__='0', __spec__=None)


def record(reference, samples, logits) -> dict:
  absent_torchvision()
  import cleanfid.fid
  import prdc
  import pytorch_fid.fid_score
  from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
  from torch_fidelity.metric_isc import isc_features_to_metric
  from torch_fidelity.metric_kid import kid_features_to_metric
  from torch_fidelity.metric_prc import prc_features_to_metric

  a, b = torch.from_numpy(samples), torch.from_numpy(reference)
  statistics = [fid_features_to_statistics(x) for x in (a, b)]
  flat = [value for s in statistics for value in (s['mu'], s['sigma'])]
  np.random.seed(7)
  clean_kid = cleanfid.fid.kernel_distance(reference, samples, **CLEAN_KID)
  return {
    'torch-fidelity': {
      'fid': fid_statistics_to_metric(*statistics, False)['frechet_inception_distance'],
      'kid': list(kid_features_to_metric(a, b, **KID).values()),
      'kid_of_float32': list(kid_features_to_metric(a.float(), b.float(), **KID).values()),
      'inception_score': list(isc_features_to_metric(torch.from_numpy(logits)).values()),
      'inception_score_7_splits_unshuffled': list(
        isc_features_to_metric(torch.from_numpy(logits), 7, False).values()
      ),
      'precision_recall_f_score': {
        k: list(prc_features_to_metric(a, b, prc_neighborhood=k, verbose=False).values())
        for k in NEIGHBOURS
      },
    },
    'pytorch-fid': {'fid': float(pytorch_fid.fid_score.calculate_frechet_distance(*flat))},
    'clean-fid': {'fid': float(cleanfid.fid.frechet_distance(*flat)), 'kid_seed_7': clean_kid},
    'prdc': {
      k: {name: float(v) for name, v in prdc.compute_prdc(reference, samples, k).items()}
      for k in NEIGHBOURS
    },
  }


if __name__ == '__main__':
  sys.path.insert(0, str(HERE))
  from features import draw

  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  found = {'versions': {'python': platform.python_version(), **versions}, **record(**draw())}
  (HERE / 'figures.json').write_text(json.dumps(found, indent=2) + '\n')
