"""What bounds and flow give for a diagonal Gaussian model and its ideal denoiser, in closed form.

The baseline of a likelihood: what is reached by knowing mean and variance of every entry alone.
Expectations over the noise, one value per example, in bits per dimension; NumPy, float64.
"""

import numpy as np


def gaussian_bits(
  x0: np.ndarray, mean: np.ndarray, variance: np.ndarray, alphas: np.ndarray, sigmas: np.ndarray
) -> dict[str, np.ndarray]:
  """Expected -log2 p(x_0) per dimension, [b] each, of the model N(mean, diag(variance)).

  With s the SNR and r^2 = (x_0 - mean)^2, the ideal denoiser's expected squared error is
  (r^2 + s variance^2) / (1 + s variance)^2 per entry. 'discrete' is `bounds.discrete_bound` over
  all steps, 'continuous' is `bounds.continuous_bound` between the ends of the table, 'flow' is
  `likelihood.flow_likelihood` with start_noise. The last two agree where the last step holds no
  signal: -log2 of the density of x_0 + sigma / alpha eps.

  Args:
    x0: [b ...]. mean, variance: [...].
    alphas, sigmas: [T], from data to noise.
  """
  x0, mean, variance = (np.asarray(part, np.float64) for part in (x0, mean, variance))
  snr = (np.asarray(alphas) / np.asarray(sigmas)) ** 2
  first, last, square = snr[0], snr[-1], (x0 - mean) ** 2
  spread = alphas[-1] ** 2 + sigmas[-1] ** 2  # variance of the Gaussian that sampling starts from
  share = sigmas[-1] ** 2 / spread
  prior = ((alphas[-1] * x0) ** 2 / spread + share - 1 - np.log(share)) / 2
  ends = prior + (np.log(2 * np.pi / first) + 1) / 2
  below = lambda s: 1 + s * variance
  steps = list(zip(snr[:-1] - snr[1:], snr[1:], strict=True))
  of_square = sum(gain / below(s) ** 2 for gain, s in steps)
  rest = sum(gain * s * (variance / below(s)) ** 2 for gain, s in steps)
  integral = square * (first - last) / (below(first) * below(last))
  integral = integral + np.log(below(first) / below(last)) + 1 / below(first) - 1 / below(last)
  nats = {
    'discrete': ends + (square * of_square + rest) / 2,
    'continuous': ends + integral / 2,
    'flow': _flow(x0, mean, variance, alphas, sigmas, spread),
  }
  axes = tuple(range(1, x0.ndim))
  return {name: value.mean(axis=axes) / np.log(2) for name, value in nats.items()}


def _flow(x0, mean, variance, alphas, sigmas, spread):
  """Nats per entry: the flow stretches each entry's deviation from the mean by one number."""
  at = lambda i: alphas[i] ** 2 * variance + sigmas[i] ** 2
  stretch = np.sqrt(at(-1) / at(0))
  end = alphas[-1] * mean + stretch * alphas[0] * (x0 - mean)
  square = end**2 + (stretch * sigmas[0]) ** 2
  return (np.log(2 * np.pi * spread) + square / spread) / 2 - np.log(stretch * alphas[0])
