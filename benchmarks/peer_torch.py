"""The other side of benchmarks/peers.py: diffusers' U-Net in PyTorch, as its users train it."""

import contextlib
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file

GPU = torch.cuda.is_available()


def facts() -> dict[str, Any]:
  """Return the device and the software, in JAX's words."""
  return {
    'device': {'platform': 'gpu' if GPU else 'cpu'},
    # torch's is of a class of its own, for which the parent would import all of it.
    'versions': {'torch': str(torch.__version__), 'diffusers': diffusers.__version__},
  }


def set_up(cores: int) -> None:
  """As many threads as XLA takes on a CPU, and float32 multiplied as it does on a GPU."""
  if GPU:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  else:
    torch.set_num_threads(cores)


class Side:
  """One way of running the U-Net; arrays come and go as numpy, NHWC."""

  def __init__(self, compiled: bool, memory_format: str, config: dict, weights: str, dtype: str,
               cores: int):
    """compiled: by torch.compile. weights: a file of safetensors."""
    set_up(cores)
    self.format = getattr(torch, memory_format)
    self.device = torch.device('cuda' if GPU else 'cpu')
    self.dtype = getattr(torch, dtype)
    model = diffusers.UNet2DConditionModel(**config)
    model.load_state_dict(load_file(weights))
    self.model = model.to(self.device, memory_format=self.format)
    self.call = torch.compile(self.model) if compiled else self.model

  def _tensor(self, x: np.ndarray) -> torch.Tensor:
    tensor = torch.tensor(np.asarray(x), device=self.device)
    if tensor.ndim == 4:
      return tensor.permute(0, 3, 1, 2).contiguous(memory_format=self.format)
    return tensor

  def _precision(self):
    if self.dtype == torch.float32:
      return contextlib.nullcontext()
    return torch.autocast(self.device.type, self.dtype)

  def _predict(self, x, t, text, call=None) -> torch.Tensor:
    with self._precision():
      return (call or self.call)(x, t, encoder_hidden_states=text, return_dict=False)[0].float()

  def output(self, batch: dict) -> np.ndarray:
    """The U-Net's output."""
    with torch.no_grad():
      y = self._predict(*(self._tensor(batch[name]) for name in ('x', 't', 'text')), self.model)
    return y.permute(0, 2, 3, 1).cpu().numpy()

  def stepper(self, batch: dict):
    """A function that makes one training step and returns its loss, when all of it is done."""
    parameters = list(self.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in parameters]
    x, t, text, noise = (self._tensor(batch[name]) for name in ('x', 't', 'text', 'noise'))
    self.model.train()

    def run() -> float:
      optimizer.zero_grad(set_to_none=True)
      loss = torch.nn.functional.mse_loss(self._predict(x, t, text), noise)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(parameters, 1.0)
      optimizer.step()
      with torch.no_grad():
        torch._foreach_lerp_(average, parameters, 1e-3)
      self._wait()
      return loss.item()

    return run

  def drawer(self, noise: np.ndarray, text: np.ndarray, negative: np.ndarray, steps: int,
             guidance: float):
    """A function that draws latents from the noise by DDIM with guidance."""
    scheduler = diffusers.DDIMScheduler(
      beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', clip_sample=False,
      timestep_spacing='trailing',
    )
    scheduler.set_timesteps(steps)
    both = torch.cat([self._tensor(negative), self._tensor(text)])
    self.model.eval()

    def run() -> np.ndarray:
      x = self._tensor(noise)
      with torch.no_grad():
        for t in scheduler.timesteps:
          doubled = torch.cat([x, x]).contiguous(memory_format=self.format)
          free, told = self._predict(doubled, t.to(self.device), both).chunk(2)
          x = scheduler.step(free + guidance * (told - free), t, x).prev_sample
      self._wait()
      return x.permute(0, 2, 3, 1).cpu().numpy()

    return run

  def _wait(self) -> None:
    if self.device.type == 'cuda':
      torch.cuda.synchronize()
