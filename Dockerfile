# The image that launch/gke_jobset.sh --image asks for: this repository, installed.
#
#   docker build --build-arg PLATFORM=cuda13 --tag IMAGE .
#   docker build --build-arg PLATFORM=tpu --tag IMAGE .
#
# PLATFORM: an extra of JAX, such as cuda13, cuda12 or tpu. EXTRAS: of pyproject.toml.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

ARG PLATFORM=cuda13
ARG EXTRAS=openmoji,data,cloud,tensorboard

# The driver of NVIDIA: mounted there by GKE, and put in place by Docker if it is asked for.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /diffusion_jax

# By itself, so that a change of the code does not fetch gigabytes again.
COPY pyproject.toml README.md LICENSE ./
COPY diffusion_jax/__init__.py diffusion_jax/
RUN python -m pip install "jax[${PLATFORM}]" -e ".[${EXTRAS}]"

COPY diffusion_jax diffusion_jax
COPY configs configs
COPY launch launch

CMD ["python", "-m", "diffusion_jax", "--help"]
