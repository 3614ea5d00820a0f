"""The other side of benchmarks/peers.py: diffusers' U-Net in PyTorch, as its users train it."""

import contextlib

import diffusers
import numpy as np
import torch

KINDS = {
  'eager': (False, torch.contiguous_format),
  'eager_channels_last': (False, torch.channels_last),
  'compiled': (True, torch.contiguous_format),
  'compiled_channels_last': (True, torch.channels_last),
}
"""name: (whether torch.compile is used, memory format)."""


class Theirs:
  """One of KINDS; arrays come and go as numpy, NHWC."""

  def __init__(self, kind: str, config: dict, weights: dict[str, np.ndarray], dtype: str):
    self.name = kind
    compiled, self.format = KINDS[kind]
    self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    self.dtype = getattr(torch, dtype)
    model = diffusers.UNet2DConditionModel(**config)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
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
