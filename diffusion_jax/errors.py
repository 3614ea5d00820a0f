"""Exceptions that are meant for a person rather than for a stack trace."""


class UserError(Exception):
  """A mistake in what the user gave: config, path, data, checkpoint, prompt.

  The message is one sentence that names the thing and the remedy. The command line prints it
  without a stack trace and exits with code 2.
  """


class Unreadable(UserError):
  """A picture, or another record of a data set, that cannot be read; others of the set may be."""
