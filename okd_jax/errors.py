"""The one exception that a user's mistake raises."""


class UserError(ValueError):
  """Bad input or configuration: one sentence saying what, where and what to do.

  Commands print it on one line of stderr and exit with status 2 (`cli.run`);
  any other exception is a bug of ours and keeps its traceback.
  """
