"""Stable Diffusion in one safetensors file, in the names of CompVis and Stability.

One file for each family of names, one for what shapes do not tell (`families`), and `files`, which
reads and writes whole files.
"""
