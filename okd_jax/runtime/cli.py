"""What every command shares: its argument parser and how errors leave it."""

import argparse
import contextlib
import glob
import importlib.util
import logging
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from okd_jax.errors import UserError
from okd_jax.runtime.files import cache_folder

_log = logging.getLogger(__name__)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
  """Shows defaults, but neither None nor an empty one, nor that of a switch."""

  def _get_help_string(self, action: argparse.Action) -> str | None:
    shown = action.default not in (None, "") and action.default is not False
    return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are one line, with exit status 2."""

  def __init__(self, **kwargs: Any) -> None:  # argparse's own
    super().__init__(
      formatter_class=_Help,
      allow_abbrev=False,
      **kwargs,
    )

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: {message} (see --help)\n")


def add_dtype(parser: argparse.ArgumentParser) -> None:
  """The flag --dtype."""
  kinds = ("float32", "bfloat16")
  parser.add_argument("--dtype", default=kinds[0], choices=kinds, help="of matmuls")


def add_processes(parser: argparse.ArgumentParser) -> None:
  """The flags that say which processes make one run."""
  add = parser.add_argument_group("several processes").add_argument
  add("--coordinator", default="", metavar="HOST:PORT", help="where process 0 is")
  add("--processes", type=int, default=0, metavar="N", help="how many there are")
  add("--process", type=int, default=-1, metavar="I", help="which one this is, from 0")


@contextlib.contextmanager
def devices(args: argparse.Namespace) -> Iterator[None]:
  """Joins the processes that the flags of `add_processes` name; programs are kept.

  Raises:
    UserError: as `distributed.joined` does.
  """
  from okd_jax.runtime import distributed  # needs JAX, as no flag does

  with distributed.joined(args.coordinator, args.processes, args.process):
    use_compilation_cache()
    yield


def text_or_stdin(value: str, what: str) -> str:
  """The value itself, or standard input if it is `-`, less its last line break.

  Raises:
    UserError: for bytes that are no UTF-8.
  """
  if value != "-":
    # Bytes of the command line that are no text arrive as lone surrogates.
    given = value.encode(errors="surrogateescape")
  else:
    given = sys.stdin.buffer.read().removesuffix(b"\n")
  try:
    return given.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{what} is not valid UTF-8 ({error})") from error


def add_sampling(parser: argparse.ArgumentParser, temperature: float) -> None:
  """The flags that say how to sample; `temperature` is the default of its flag."""
  add = parser.add_argument
  add(
    "--temperature",
    type=number(float, "at least 0", lambda t: 0 <= t < math.inf),
    default=temperature,
    help="of the sampling; 0 always takes the likeliest token",
  )
  add(
    "--top_p",
    type=number(float, "above 0 and at most 1", lambda p: 0 < p <= 1),
    default=1.0,
    help="sample from the likeliest tokens that hold this much probability",
  )
  add(
    "--top_k",
    type=number(int, "at least 0", lambda k: 0 <= k < 2**31),
    default=0,
    help="sample from this many likeliest tokens; 0 is all",
  )
  add(
    "--seed",
    type=number(int, "from 0 to 2^32 - 1", lambda seed: 0 <= seed < 2**32),
    default=0,
    help="of the sampling; the same seed gives the same text",
  )


def add_answers(parser: argparse.ArgumentParser) -> None:
  """The flags that say how a model answers held-out prompts."""
  add = parser.add_argument_group("answers").add_argument
  drawn = "MiniLLM's and OKD's: drawn with every seed at temperature 1, and greedy ones"
  add("--protocol", action="store_true", help=drawn)
  add("--temperature", type=float, help="0, the default without --protocol, is greedy")
  seeds, some = "draw the answers once a seed", "10,20,30,40,50"
  add("--seeds", type=_seeds, default=some, metavar="S,S,…", help=seeds)
  ban = "so many tokens in a row do not come twice in prompt and answer; 0: no ban"
  add("--no_repeat_ngram", type=int, default=0, metavar="N", help=ban)
  new = "of an answer, 0 for none; by default 256 or fewer"
  add("--max_new_tokens", type=int, metavar="N", help=new)
  keep = "folder that keeps all answers; stopped, the same command goes on with them"
  add("--answers", default="", metavar="DIR", help=keep)
  first = "write the first draw's answers to this jsonl"
  add("--predictions", default="", metavar="P.jsonl", help=first)


def _seeds(text: str) -> list[int]:
  seed = number(int, "from 0 to 2^32 - 1", lambda seed: 0 <= seed < 2**32)
  return [seed(part) for part in text.split(",")]


def number(
  kind: type, allowed: str, fits: Callable[[float], bool]
) -> Callable[[str], float]:
  """An argparse type: a number that `fits`, or an error that says what is allowed."""

  def parse(text: str) -> float:
    """The number, or an ArgumentTypeError."""
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not fits(value):
      noun = "a whole number" if kind is int else "a number"
      raise argparse.ArgumentTypeError(f"{text!r} must be {noun}, {allowed}")
    return value

  return parse


def need(package: str, extra: str) -> None:
  """Raises a UserError if a package that comes with an extra is missing.

  Beforehand this package's own folder leaves the path, where it is if that is the
  current folder: there `lm_eval` would be our command.
  """
  own = Path(__file__).resolve().parents[1]
  sys.path[:] = [place for place in sys.path if Path(place).resolve() != own]
  if importlib.util.find_spec(package) is None:
    raise UserError(f"the package {package} is missing: pip install okd-jax[{extra}]")


def check_places(
  parser: argparse.ArgumentParser,
  files: Mapping[str, str],
  folders: Mapping[str, str],
  read: Sequence[str],
) -> None:
  """An argparse error for a place that cannot be written, or that is read.

  files, folders: paths by flag, '' for none.
  """
  own = {Path(source).resolve() for source in read}
  for flag, path in files.items():
    if path and Path(path).is_dir():
      parser.error(f"--{flag}={path} is a folder; name a file")
    if path and Path(path).resolve() in own:
      parser.error(f"--{flag}={path} is the data; name another file")
  for flag, path in folders.items():
    if path and Path(path).is_file():
      parser.error(f"--{flag}={path} is a file; name a folder")


def run(main: Callable[[list[str]], None]) -> None:
  """Calls `main(arguments)`; a `UserError` becomes one line and exit status 2.

  Ctrl-C becomes one line, too, and 130, in commands and phases that have nothing to
  save (`run.stop` has the others).
  """
  logging.basicConfig(
    level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True
  )
  logging.getLogger("okd_jax").setLevel(logging.INFO)
  try:
    main(sys.argv[1:])
  except BrokenPipeError:  # the reader of our output has gone: not our error
    sys.stderr.close()
    sys.exit(141)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)
  except (UserError, OSError) as error:  # OSError: a full disk, a file in the way
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def use_compilation_cache() -> None:
  """Compiled programs outlive the process, unless the environment says otherwise.

  Not for several simulated devices: such programs hang when they come out of the
  cache (jax 0.10.2; BUILD_NOTES.md, 2026-11-22).
  """
  import jax

  if jax.default_backend() == "cpu" and jax.device_count() > 1:
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  _remove_torn_entries(jax.config.jax_compilation_cache_dir)


def _remove_torn_entries(folder: str) -> None:
  """Has entries removed that JAX finds unreadable, each with a line.

  It compiles such a program anew at every start and never writes over what is there;
  all that it says is a warning with the program's name, with which its files begin.
  """
  shown = warnings.showwarning

  def show(message: Warning | str, *rest: Any, **more: Any) -> None:
    """Shows a warning; one of a torn entry removes that."""
    torn = re.match("Error reading persistent compilation .* '(.+?)': ", str(message))
    if not torn:
      shown(message, *rest, **more)
      return
    for entry in Path(folder).glob(f"{glob.escape(torn[1])}-*-cache"):
      entry.unlink(missing_ok=True)
    _log.warning("%s: what was kept of %s is torn: compiled anew", folder, torn[1])

  warnings.showwarning = show
