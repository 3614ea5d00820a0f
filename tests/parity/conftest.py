"""Fixtures that put a PyTorch reference with random weights and our network side by side."""

import functools

import jax
import numpy as np
import pytest

from diffusion_jax.formats.networks import load_params, network_format
from diffusion_jax.formats.published import from_published
from diffusion_jax.pipelines.directory import load_model

torch = pytest.importorskip('torch')


@pytest.fixture(autouse=True)
def small_and_repeatable():
  torch.set_num_threads(1)
  torch.manual_seed(0)


@pytest.fixture
def quick_jit():
  """jax.jit for programs that run once: compiled quickly rather than well."""
  options = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  return functools.partial(jax.jit, compiler_options=options)


@pytest.fixture
def randomized():
  """Disturbs every weight, so that no norm is the identity and no bias is zero."""

  def disturb(model):
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()

  return disturb


@pytest.fixture
def ported(tmp_path):
  """Saves a reference with its own library, loads it with ours: (config, graphdef, params)."""

  def port(kind, model):
    model.save_pretrained(tmp_path / 'reference')
    config, params = load_params(kind, tmp_path / 'reference')
    graphdef = network_format(kind).network(config).graphdef
    return config, graphdef, jax.tree.map(jax.numpy.asarray, params)

  return port


@pytest.fixture
def assert_same_gradients():
  """Within 1e-3 of each tensor's largest entry; 1e-6 of the largest of all where it vanishes."""

  def check(model, gradients):
    reference = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    reference = from_published(reference, gradients, 'the gradients')
    largest = max(np.abs(g).max() for g in reference.values())
    for name, wanted in reference.items():
      error = np.abs(np.asarray(gradients[name]) - wanted).max()
      assert error <= 1e-3 * np.abs(wanted).max() + 1e-6 * largest, name

  return check


@pytest.fixture
def assert_same_weights():
  def check(model, other):
    wanted, found = model.state_dict(), other.state_dict()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
      assert torch.equal(value, found[name]), name

  return check


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  """load(name): (theirs, folder, our model, its weights, how it samples)."""

  @functools.cache
  def run(name):
    from tests.parity import small_pipelines as small  # Needs diffusers.

    folder = tmp_path_factory.mktemp('pipelines') / name
    theirs = small.make(name)
    theirs.save_pretrained(folder)
    return theirs, folder, *load_model(str(folder))

  return run
