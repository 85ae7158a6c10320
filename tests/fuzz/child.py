"""A process that tries many inputs and says of each what became of it.

    python -m fuzz.child SCRATCH SEED KIND=COUNT …

A line of JSON for each input on standard output; the input itself lies in SCRATCH/last
while it is tried, so that one that ends the process can be told.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

MEMORY, SECONDS = 2 << 30, 20
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link")
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
_ALLOWED = ("/dev/null", "/dev/shm", "/proc/")


class Hang(BaseException):
  """20 seconds are over."""


def main(scratch: str, seed: str, *kinds: str) -> None:
  place, sent = Path(scratch), os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print is no answer
  from hypothesis import HealthCheck, Phase, given, settings
  from hypothesis import seed as seeded

  from fuzz.kinds import KINDS
  from fuzz.materials import materials

  materials()
  warnings.simplefilter("ignore")
  strange = _watch(place)
  resource.setrlimit(resource.RLIMIT_DATA, (_data() + MEMORY,) * 2)
  signal.signal(signal.SIGALRM, _over)
  how = settings(
    max_examples=1000,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
  )

  def tell(said: dict[str, Any]) -> None:
    sent.write(json.dumps(said | {"strange": list(strange)}) + "\n")
    sent.flush()
    strange.clear()

  for name, count in (kind.rsplit("=", 1) for kind in kinds):
    left, number = [int(count)], int(seed)
    one = _trial(name, KINDS[name], left, place, tell)
    trial = how(given(KINDS[name].inputs())(one))
    while left[0]:
      with contextlib.suppress(_Enough):
        seeded(number)(trial)()
      number += 1


def _trial(
  name: str,
  kind: Any,
  left: list[int],
  place: Path,
  tell: Callable[[dict[str, Any]], None],
) -> Callable[[Any], None]:
  """What tries one input after the other, until none is left."""

  def trial(value: Any) -> None:
    if not left[0]:
      raise _Enough
    left[0] -= 1
    (place / "last").write_text(f"{name}\n{value!r}", "utf-8", "replace")
    tell(_tried(kind, value, place) | {"kind": name})

  return trial


class _Enough(Exception):
  """As many inputs as were asked for."""


def _tried(kind: Any, value: Any, place: Path) -> dict[str, Any]:
  from fuzz.kinds import REFUSED

  start = time.monotonic()
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    with tempfile.TemporaryDirectory(dir=place) as folder:
      kind.read(value, Path(folder))
    found = {"end": "accepted"}
  except REFUSED as error:
    one = " ".join(str(error).split())
    found = {"end": "refused" if one else "traceback", "what": one[:300]}
  except Hang:
    found = {"end": "hang", "value": repr(value)[:2000]}
  except BaseException as error:  # whatever a command would show as a traceback
    where = _where(error)
    said = f"{type(error).__name__}: {str(error)[:200]}"
    found = {"end": "traceback", "what": said, "where": where}
    found["value"] = repr(value)[:100_000]
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  return found | {"seconds": time.monotonic() - start}


def _where(error: BaseException) -> str:
  """The last line of ours that was run."""
  found, trace = "", error.__traceback__
  while trace:
    code = trace.tb_frame.f_code
    if "okd_jax" in code.co_filename:
      found = f"{Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}"
    trace = trace.tb_next
  return found


def _over(number: int, frame: FrameType | None) -> None:
  raise Hang


def _data() -> int:
  """Bytes that this process has now, as RLIMIT_DATA counts them."""
  status = Path("/proc/self/status").read_text()
  [line] = [line for line in status.splitlines() if line.startswith("VmData")]
  return int(line.split()[1]) << 10


def _watch(place: Path) -> list[str]:
  """What is written elsewhere, or run; filled as it happens."""
  strange: list[str] = []

  def hook(event: str, args: tuple) -> None:
    if event in _RUNS or event == "socket.connect":
      strange.append(f"{event} {args[:1]!r}")
    elif event == "open" and _is_write(args) or event in _WRITES:
      path = args[0]
      if isinstance(path, str | bytes | os.PathLike):
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith((str(place), *_ALLOWED)):
          strange.append(f"{event} {name}")

  sys.addaudithook(hook)
  return strange


def _is_write(args: tuple) -> bool:
  flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
  return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


if __name__ == "__main__":
  main(*sys.argv[1:])
