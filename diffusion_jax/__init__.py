"""diffusion_jax: train, sample and score text-to-image latent diffusion models in JAX."""

__version__ = '0.1.0'
