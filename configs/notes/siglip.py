"""SigLIP (Zhai et al. 2023): CLIP in which each pair is a question of its own.

CLIP (Radford et al. 2021) asks for each image which of the batch's texts is its own, and for each
text which image: a softmax over a row and over a column of all pairs, normalised over the whole
batch. SigLIP asks of every pair alone whether it belongs together,

  -1/b sum_ij log sigmoid(z_ij (t x_i . y_j + b)),   z_ij = 1 for i = j, else -1,

so no sum over the batch stands in a logarithm, and devices exchange embeddings without waiting for
a normaliser (section 3.3; here both losses go round a ring, `train/contrastive.py`). Of b^2 pairs b
are right, so at the start a bias of -10 says no to all of them, with t = 10 (section 3.2); both are
learned. The paper finds the gain largest at small batches, and large ones steadier with b2 of 0.95.

All else is the package's CLIP, `configs/openmoji/clip.py`, which has the loss of the first paper.
With `settings.locked=image settings.locked_from=DIR` it is the paper's SigLiT.
"""

from diffusion_jax.configs.openmoji import clip
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = clip.get_config()
  config.settings.update({'loss': 'sigmoid', 'label_smoothing': 0.0})
  config.optimizer.update({'b2': 0.95})
  return config
