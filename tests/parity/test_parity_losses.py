"""LPIPS and the PatchGAN discriminator against references written here in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion_jax.formats.networks import load_lpips
from diffusion_jax.formats.published import from_published
from diffusion_jax.models import network
from diffusion_jax.models.perceptual import Discriminator, DiscriminatorConfig, _unit, lpips

torch = pytest.importorskip('torch')


class VGG(torch.nn.Module):
  """VGG16's features up to conv5_3, numbered as in torchvision, cut into the slices of `lpips`."""

  CUTS = (0, 4, 9, 16, 23, 30)

  def __init__(self):
    super().__init__()
    layers, i = [], 3
    for o in (64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M', 512, 512, 512):
      if o == 'M':
        layers.append(torch.nn.MaxPool2d(2))
      else:
        layers += [torch.nn.Conv2d(i, o, 3, padding=1), torch.nn.ReLU()]
        i = o
    for n, (start, stop) in enumerate(zip(self.CUTS, self.CUTS[1:], strict=False)):
      part = torch.nn.Sequential()
      for k in range(start, stop):
        part.add_module(str(k), layers[k])
      setattr(self, f'slice{n + 1}', part)

  def forward(self, x):
    out = []
    for n in range(1, 6):
      x = getattr(self, f'slice{n}')(x)
      out.append(x)
    return out


def reference_lpips(vgg, lins, a, b):
  shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
  scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
  total = 0
  for f, g, lin in zip(vgg((a - shift) / scale), vgg((b - shift) / scale), lins, strict=True):
    f = f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)
    g = g / (g.square().sum(1, keepdim=True).sqrt() + 1e-10)
    total = total + ((f - g).square() * lin).sum(1).mean((1, 2))
  return total


def test_lpips(tmp_path):
  vgg = VGG()
  with torch.no_grad():
    for parameter in vgg.parameters():  # Larger weights, or nothing is left after 13 layers.
      parameter.mul_(2.0)
  lins = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
  tensors = {f'net.{name}': value.numpy() for name, value in vgg.state_dict().items()}
  for n, lin in enumerate(lins):
    tensors[f'lin{n}.model.1.weight'] = tensors[f'lins.{n}.model.1.weight'] = lin.numpy()
  tensors['scaling_layer.shift'] = np.zeros((1, 3, 1, 1), np.float32)
  save_file(tensors, tmp_path / 'lpips.safetensors')
  params = load_lpips(tmp_path / 'lpips.safetensors')

  rng = np.random.default_rng(0)
  a, b = (rng.uniform(-1, 1, (2, 17, 16, 3)).astype(np.float32) for _ in range(2))
  a_torch = torch.tensor(a.transpose(0, 3, 1, 2), requires_grad=True)
  wanted = reference_lpips(vgg, lins, a_torch, torch.tensor(b.transpose(0, 3, 1, 2)))
  wanted.sum().backward()

  @jax.jit
  def value_and_gradient(params, a, b):
    value, pull = jax.vjp(lambda a: lpips(params, a, b), a)
    return value, pull(jnp.ones(2))[0]

  value, found = value_and_gradient(params, a, b)
  np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-4)
  gradient = a_torch.grad.numpy().transpose(0, 2, 3, 1)
  error = np.abs(found - gradient).max()
  assert error < 1e-3 * np.abs(gradient).max()
  assert np.all(np.asarray(value_and_gradient(params, a, a)[0]) == 0)


def test_lpips_gradient_is_finite_where_features_vanish():
  gradient = jax.grad(lambda x: _unit(x).sum())(jnp.zeros((1, 2, 2, 5)))
  assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('layers', [1, 3])
def test_discriminator(layers, randomized, quick_jit, assert_same_gradients):
  config = DiscriminatorConfig(base_channels=4, n_layers=layers, norm_num_groups=4)
  conv, parts = torch.nn.Conv2d, []
  parts += [conv(3, 4, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
  for n in range(1, layers + 1):
    i, o = 4 * min(2 ** (n - 1), 8), 4 * min(2**n, 8)
    parts += [conv(i, o, 4, 2 if n < layers else 1, 1, bias=False), torch.nn.GroupNorm(4, o)]
    parts += [torch.nn.LeakyReLU(0.2)]
  theirs = torch.nn.Module()
  theirs.main = torch.nn.Sequential(*parts, conv(o, 1, 4, 1, 1))
  randomized(theirs)

  graphdef, shapes = network.abstract(lambda rngs: Discriminator(config, rngs=rngs))
  state = {name: value.numpy() for name, value in theirs.state_dict().items()}
  params = {n: jnp.asarray(v) for n, v in from_published(state, shapes, 'reference').items()}
  x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 40, 3)).astype(np.float32)
  wanted = theirs.main(torch.tensor(x.transpose(0, 3, 1, 2)))
  wanted.square().mean().backward()

  def loss(params):
    y = network.merge(graphdef, params)(jnp.asarray(x))
    return jnp.square(y).mean(), y

  gradients, y = quick_jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(y, wanted.detach().numpy().transpose(0, 2, 3, 1), atol=1e-4)
  assert_same_gradients(theirs, gradients)
