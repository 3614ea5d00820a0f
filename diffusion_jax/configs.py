"""The recipes in the folder `configs` of a checkout, as a package.

A wheel holds that folder as `diffusion_jax/configs`, which Python finds before this file. So any
recipe can import `diffusion_jax.configs.base`, wherever it lies itself.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / 'configs')]
