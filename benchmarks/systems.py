"""The systems of the field's notes that `benchmarks.notes` trains and scores: a row for each."""

from typing import NamedTuple

DRAWN = ('fd', 'kid', 'clip_score', 'retrieval', 'class_accuracy')
CAPTIONS = (
  'grinning face', 'red heart', 'man farmer medium-light skin tone', 'cat face', 'flag of Japan',
  'red apple', 'sun', 'house',
)
"""Of the sheet; chosen before any was drawn."""


class System(NamedTuple):
  """A row of the table.

  number: of the note. title: how the table names it. recipe: its config, under configs/.
  paper: the paper's figure at full scale, and where it stands there.
  before: names of the systems whose runs the recipe reads; they must be run first.
  parts: the same, of systems whose networks it draws with, too, so that their training and
  parameters count as its own.
  pictures: whether it draws pictures, which `metrics` score; others have the scores of their task.
  metrics: of `evaluate model`; empty for a system that is scored only as a part of another.
  likelihood: whether `evaluate likelihood` is run, too.
  prompts: captions or classes of the pictures on the sheet.
  cascade: whether it is a cascade, of the models of `parts` and its own as the last.
  weights: the system whose run it draws with, or a model; nothing else is trained.
  options: of sampling, in place of the model's own.
  steps: how many it draws in, where it stands in the second table alone; such a row needs no
  untrained value beside it.
  """

  number: int
  title: str
  recipe: str
  paper: str
  before: tuple[str, ...] = ()
  pictures: bool = True
  metrics: tuple[str, ...] = DRAWN
  likelihood: bool = False
  prompts: tuple[str, ...] = CAPTIONS
  parts: tuple[str, ...] = ()
  cascade: bool = False
  weights: str = ''
  options: tuple[str, ...] = ()
  steps: int = 0


PICTURES = ('fd', 'kid')
"""Metrics of a model that reads no captions."""
SYSTEMS = {
  'ddpm': System(
    1, 'DDPM on pixels', 'notes/ddpm.py',
    'CIFAR-10: FID 3.17, at most 3.75 bits per dimension (Ho et al. 2020, table 1)',
    likelihood=True,
  ),
  'ddpm_unconditional': System(
    1, 'DDPM without a condition, a U-Net', 'notes/ddpm_unconditional.py', 'the same',
    metrics=PICTURES, likelihood=True, prompts=('',) * len(CAPTIONS),
  ),
  'ddim': System(
    2, 'DDIM, 50 steps with the weights of DDPM', 'notes/ddpm.py',
    'CIFAR-10: FID 4.67 in 50 steps, eta 0 (Song, Meng & Ermon 2021, table 1)', before=('ddpm',),
    weights='ddpm', options=('--sampler', 'ddim', '--eta', '0', '--steps', '50'),
  ),
  'iddpm': System(
    1, 'Improved DDPM: a learned variance', 'notes/iddpm.py',
    'CIFAR-10: 2.94, ImageNet-64: 3.53 bits per dimension (Nichol & Dhariwal 2021)',
    likelihood=True,
  ),
  'ncsn': System(
    3, 'NCSN, annealed Langevin dynamics', 'notes/ncsn.py',
    'CIFAR-10: FID 25.32 (Song & Ermon 2019, table 1)',
  ),
  'score_ve': System(
    3, 'VE SDE, predictor-corrector', 'notes/score_ve.py',
    'CIFAR-10: FID 2.20 (NCSN++ cont., deep; Song et al. 2021, table 3)',
  ),
  'score_vp': System(
    3, 'VP SDE, Euler-Maruyama', 'notes/score_vp.py',
    'CIFAR-10: FID 2.41, predictor-corrector (DDPM++ cont., deep; Song et al. 2021, table 3)',
    likelihood=True,
  ),
  'score_subvp': System(
    3, 'Sub-VP SDE, probability flow', 'notes/score_subvp.py',
    'CIFAR-10: 2.99 bits per dimension (DDPM++ cont., deep; Song et al. 2021, table 2)',
    likelihood=True,
  ),
  'vae': System(
    4, 'VAE as a generator (one vector of 64)', 'notes/vae.py',
    'CIFAR-10: 4.51 bits per dimension (van den Oord et al. 2017, section 4.1)',
    metrics=PICTURES, likelihood=True, prompts=('',) * len(CAPTIONS),
  ),
  'vq': System(
    4, 'VQ-VAE, 512 codes', 'notes/vq.py',
    'CIFAR-10: 4.67 bits per dimension (van den Oord et al. 2017, section 4.1)', pictures=False,
  ),
  'fsq': System(
    4, 'FSQ, 512 codes', 'notes/fsq.py',
    'ImageNet 256: FID 4.53 of MaskGIT on its codes, 4.51 on those of VQ (Mentzer et al. 2023, '
    'figure 4)', pictures=False,
  ),
  'dvae': System(
    4, 'Discrete VAE, 256 codes', 'notes/dvae.py',
    '8192 codes, 32 x 32 of 256 x 256 pixels (Ramesh et al. 2021, section 2.1)', pictures=False,
  ),
  'dalle': System(
    7, 'DALL-E', 'notes/dalle.py',
    'MS-COCO 256: FID about 28, zero-shot (Ramesh et al. 2022, table 2)', parts=('dvae',),
  ),
  'dalle2_decoder': System(
    7, 'DALL-E 2, its decoder of embeddings', 'notes/dalle2_decoder.py', 'not given by itself',
    metrics=(),
  ),
  'dalle2_prior': System(
    7, 'DALL-E 2, diffusion prior and decoder', 'notes/dalle2_prior.py',
    'MS-COCO 256: FID 10.39, zero-shot (Ramesh et al. 2022, table 2)',
    parts=('dalle2_decoder',),
  ),
  'dalle2_prior_tokens': System(
    7, 'DALL-E 2, autoregressive prior and decoder', 'notes/dalle2_prior_tokens.py',
    'MS-COCO 256: FID 10.63, zero-shot (Ramesh et al. 2022, table 2)',
    parts=('dalle2_decoder',),
  ),
  'latent_diffusion': System(
    5, 'Latent diffusion (DiT, rectified flow)', 'openmoji/dit_flow.py',
    'MS-COCO 256: FID 12.63, guided, 250 steps (LDM-KL-8-G; Rombach et al. 2022, table 2)',
  ),
  'imagen_base': System(
    6, 'Imagen, its base at 16 pixels', 'notes/imagen_base.py', 'not given by itself',
  ),
  'imagen_32': System(
    6, 'Imagen, 16 to 32', 'notes/imagen_32.py', 'not given by itself', metrics=(),
  ),
  'imagen': System(
    6, 'Imagen, the cascade 16 to 32 to 64', 'notes/imagen_64.py',
    'MS-COCO 256: FID 7.27, zero-shot (Saharia et al. 2022, table 1)',
    parts=('imagen_base', 'imagen_32'), cascade=True,
  ),
  'enlarger': System(
    6, 'A network that enlarges, without diffusion', 'notes/enlarger.py', 'none', metrics=(),
  ),
  'clip': System(
    8, 'CLIP', 'openmoji/clip.py',
    'ImageNet: 76.2 %, zero-shot (ViT-L/14 at 336 pixels; Radford et al. 2021, table 1)',
    pictures=False,
  ),
  'siglip': System(
    8, 'SigLIP', 'notes/siglip.py',
    'ImageNet: 84.5 %, zero-shot, beside a locked image tower (Zhai et al. 2023, abstract)',
    pictures=False,
  ),
  'sequences': System(
    9, 'A transformer on signals', 'notes/sequences.py', 'none: the spectrum is known',
    pictures=False,
  ),
  'lcm': System(
    10, 'Consistency distillation, 4 steps', 'notes/lcm.py',
    'CIFAR-10: FID 2.93 in two steps (Song et al. 2023, table 1)',
  ),
  'progressive': System(
    10, 'Progressive distillation, 4 steps', 'notes/progressive.py',
    'CIFAR-10: FID 3.00 in four steps (Salimans & Ho 2022, table 2)',
  ),
  'progressive2': System(
    10, 'the same, 2 steps', 'notes/progressive2.py', 'FID 4.51 in two', before=('progressive',)
  ),
  'progressive1': System(
    10, 'the same, 1 step', 'notes/progressive1.py', 'FID 9.12 in one', before=('progressive2',)
  ),
  'mean_flow': System(
    10, 'Mean flow, 1 step', 'notes/mean_flow.py',
    'ImageNet 256: FID 3.43 in one step, by class (MeanFlow-XL/2; Geng et al. 2025, table 2)',
    before=('latent_diffusion',),
  ),
  'noisy_classifier': System(
    11, 'A classifier of noised latents, which guides', 'notes/noisy_classifier.py',
    'ImageNet 256: FID 4.59 guided, 10.94 without (ADM-G, ADM; Dhariwal & Nichol 2021, table 5)',
    pictures=False,
  ),
}
"""Systems by name, each after those that it takes something from."""


def _in_steps(of: str, steps: int, *more: str, model: str = '') -> System:
  """Return a system in another number of steps; model: in place of its own weights."""
  options = (*SYSTEMS[of].options[:-2], *more)
  weights = model or SYSTEMS[of].weights or of
  before = () if model else (weights,)
  return SYSTEMS[of]._replace(before=before, weights=weights, options=options, steps=steps)


EULER = ('--sampler', 'flow_euler', '--guidance', '2')
COMPARED = {
  **{f'ddim_{steps}': _in_steps('ddim', steps) for steps in (100, 20, 10)},
  'unet_50': _in_steps(
    'lcm', 50, '--sampler', 'ddim', '--guidance', '2', model='asset:text-to-image-openmoji-64'
  ),
  'lcm_2': _in_steps('lcm', 2),
  'lcm_1': _in_steps('lcm', 1),
  'dit_50': _in_steps('latent_diffusion', 50, *EULER),
  'mean_flow_4': _in_steps('mean_flow', 4),
  'mean_flow_2': _in_steps('mean_flow', 2),
}
"""Of the second table alone."""
ALL = SYSTEMS | COMPARED
MANY = 50
BY_STEPS = {
  'ddim': ('DDIM, eta 0', MANY), 'ddim_100': ('the same', 100), 'ddim_20': ('the same', 20),
  'ddim_10': ('the same', 10),
  'unet_50': ('U-Net of the package by DDIM, guidance 2', MANY),
  'lcm': ('consistency distillation of it', 4), 'lcm_2': ('the same', 2), 'lcm_1': ('the same', 1),
  'progressive': ('progressive distillation of it', 4), 'progressive2': ('its next round', 2),
  'progressive1': ('its last round', 1),
  'dit_50': ("DiT by Euler's method, guidance 2", MANY),
  'mean_flow_4': ('mean flow of it', 4), 'mean_flow_2': ('the same', 2),
  'mean_flow': ('the same', 1),
}
"""Rows of the second table: words and steps; those after one of MANY steps are held to it."""
