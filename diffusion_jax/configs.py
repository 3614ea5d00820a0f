"""The recipes in a checkout's folder `configs`, as a package.

A wheel has that folder as `diffusion_jax/configs`, which Python finds before this file, so recipes
anywhere can import `diffusion_jax.configs.base`.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / 'configs')]
