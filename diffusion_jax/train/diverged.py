"""Raised where training can go no further; apart, so that the command line loads fast."""


class Diverged(RuntimeError):
  """The loss is not finite."""
