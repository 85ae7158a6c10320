"""What every command shares: its argument parser and how errors leave it."""

import argparse
import logging
import sys
from collections.abc import Callable

from okd_jax.errors import UserError


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are one line, with exit status 2."""

  def __init__(self, **kwargs):
    super().__init__(
      formatter_class=argparse.ArgumentDefaultsHelpFormatter,
      allow_abbrev=False,
      **kwargs,
    )

  def error(self, message: str):
    self.exit(2, f"{self.prog}: {message} (see --help)\n")


def run(main: Callable[[list[str]], None]) -> None:
  """Calls `main(arguments)`; a `UserError` becomes one line and exit status 2."""
  logging.basicConfig(
    level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True
  )
  logging.getLogger("okd_jax").setLevel(logging.INFO)
  try:
    main(sys.argv[1:])
  except UserError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
  except BrokenPipeError:  # the reader of our output has gone: not our error
    sys.stderr.close()
    sys.exit(141)
