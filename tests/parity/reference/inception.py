"""The FID Inception in PyTorch, block by block, with the names of the published files.

Szegedy et al. 2016, figures 5 to 7, with the peculiarities of the network of 2015-12-05: means
without padding, a maximum in the last block, 1008 classes. `random_inception` gives weights and
statistics of norms under which activations keep their scale.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Unit(nn.Module):
  """Convolution without bias, batch norm, rectifier."""

  def __init__(self, i, o, k=1, stride=1, padding=0):
    super().__init__()
    self.conv = nn.Conv2d(i, o, k, stride, padding, bias=False)
    self.bn = nn.BatchNorm2d(o, eps=1e-3)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)))


def mean3(x):
  return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max3(x):
  return F.max_pool2d(x, 3, 1, 1)


def halve(x):
  return F.max_pool2d(x, 3, 2)


class A(nn.Module):
  def __init__(self, i, pool):
    super().__init__()
    self.branch1x1 = Unit(i, 64)
    self.branch5x5_1, self.branch5x5_2 = Unit(i, 48), Unit(48, 64, 5, 1, 2)
    self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 64), Unit(64, 96, 3, 1, 1)
    self.branch3x3dbl_3 = Unit(96, 96, 3, 1, 1)
    self.branch_pool = Unit(i, pool)

  def forward(self, x):
    five = self.branch5x5_2(self.branch5x5_1(x))
    three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
    return torch.cat([self.branch1x1(x), five, three, self.branch_pool(mean3(x))], 1)


class B(nn.Module):
  def __init__(self, i):
    super().__init__()
    self.branch3x3 = Unit(i, 384, 3, 2)
    self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 64), Unit(64, 96, 3, 1, 1)
    self.branch3x3dbl_3 = Unit(96, 96, 3, 2)

  def forward(self, x):
    double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
    return torch.cat([self.branch3x3(x), double, halve(x)], 1)


ROW, COLUMN = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))


class C(nn.Module):
  def __init__(self, i, c):
    super().__init__()
    self.branch1x1 = Unit(i, 192)
    self.branch7x7_1, self.branch7x7_2 = Unit(i, c), Unit(c, c, *ROW)
    self.branch7x7_3 = Unit(c, 192, *COLUMN)
    self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(i, c), Unit(c, c, *COLUMN)
    self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit(c, c, *ROW), Unit(c, c, *COLUMN)
    self.branch7x7dbl_5 = Unit(c, 192, *ROW)
    self.branch_pool = Unit(i, 192)

  def forward(self, x):
    seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
    double = x
    for n in range(1, 6):
      double = getattr(self, f'branch7x7dbl_{n}')(double)
    return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(mean3(x))], 1)


class D(nn.Module):
  def __init__(self, i):
    super().__init__()
    self.branch3x3_1, self.branch3x3_2 = Unit(i, 192), Unit(192, 320, 3, 2)
    self.branch7x7x3_1, self.branch7x7x3_2 = Unit(i, 192), Unit(192, 192, *ROW)
    self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, *COLUMN), Unit(192, 192, 3, 2)

  def forward(self, x):
    seven = x
    for n in range(1, 5):
      seven = getattr(self, f'branch7x7x3_{n}')(seven)
    return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, halve(x)], 1)


class E(nn.Module):
  def __init__(self, i, pool):
    super().__init__()
    self.pool = pool
    self.branch1x1 = Unit(i, 320)
    self.branch3x3_1 = Unit(i, 384)
    self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 448), Unit(448, 384, 3, 1, 1)
    for name in ('branch3x3_2', 'branch3x3dbl_3'):
      setattr(self, f'{name}a', Unit(384, 384, (1, 3), 1, (0, 1)))
      setattr(self, f'{name}b', Unit(384, 384, (3, 1), 1, (1, 0)))
    self.branch_pool = Unit(i, 192)

  def forward(self, x):
    three = self.branch3x3_1(x)
    double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return torch.cat([
      self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three),
      self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x)),
    ], 1)


class Inception(nn.Module):
  def __init__(self):
    super().__init__()
    self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, 3, 2), Unit(32, 32, 3)
    self.Conv2d_2b_3x3 = Unit(32, 64, 3, 1, 1)
    self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80), Unit(80, 192, 3)
    self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
    self.Mixed_6a = B(288)
    self.Mixed_6b, self.Mixed_6c = C(768, 128), C(768, 160)
    self.Mixed_6d, self.Mixed_6e = C(768, 160), C(768, 192)
    self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = D(768), E(1280, mean3), E(2048, max3)
    self.fc = nn.Linear(2048, 1008)

  def stem(self, x):
    """Up to the first maximum."""
    return halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))

  def forward(self, x):
    """Normalised images [b 3 299 299] -> every feature by name."""
    pooled = lambda x: x.mean((2, 3))
    out = {}
    x = self.stem(x)
    out['64'] = pooled(x)
    x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
    out['192'] = pooled(x)
    x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
    x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
    out['spatial'] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
    x = self.Mixed_6e(x)
    out['768'] = pooled(x)
    x = pooled(self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))))
    out['pool3'] = x
    out['logits_unbiased'] = x @ self.fc.weight.T
    out['logits'] = self.fc(x)
    return out


@torch.no_grad()
def random_inception(seed=0):
  """Random weights; each norm's statistics are near what it sees, its scale and bias random."""
  generator = torch.Generator().manual_seed(seed)
  uniform = lambda like, low, high: low + (high - low) * torch.rand(like.shape, generator=generator)
  model = Inception()

  def settle(norm, inputs):
    seen = inputs[0]
    norm.running_mean.copy_(seen.mean((0, 2, 3)) + uniform(norm.weight, -0.2, 0.2))
    norm.running_var.copy_(seen.var((0, 2, 3)) * uniform(norm.weight, 0.7, 1.4) + 1e-3)

  hooks = []
  for module in model.modules():
    if isinstance(module, nn.Conv2d):
      fan = module.weight[0].numel()
      module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / fan**0.5)
    if isinstance(module, nn.BatchNorm2d):
      module.weight.copy_(uniform(module.weight, 0.7, 1.4))
      module.bias.copy_(uniform(module.bias, -0.3, 0.5))
      hooks.append(module.register_forward_pre_hook(settle))
  model.eval()(torch.rand(1, 3, 299, 299, generator=generator) * 2 - 1)
  for hook in hooks:
    hook.remove()
  return model
