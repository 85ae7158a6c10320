"""Values and bytes that a file of somebody else's may hold where another is meant."""

import math
from typing import Any

from hypothesis import strategies as st

SCALARS = (None, True, False, 0, -1, 1, 3, 10**12, 2**31, 2**32, 2**63, 2**64, 10**30)
SCALARS += (1.5, -1.5, 1e-30, 1e308, math.nan, math.inf, -math.inf)
TEXTS = ("", " ", "x", "1", "a\0b", "~nosuchuser", "../x", "/etc/hostname", "\ud800")
TEXTS += ("é" * 50, "<|endoftext|>", "{", "{{", "stage:a", "x" * 5000, "https://e.x/y")


def _deep(levels: int) -> Any:
  value: Any = 1
  for i in range(levels):
    value = [value] if i % 2 else {"a": value}
  return value


NESTED = ([], [1], ["a"], [[]], [None], {}, {"a": 1}, {"": None}, _deep(50), _deep(150))
values = st.sampled_from(SCALARS + TEXTS) | st.sampled_from(NESTED) | st.integers()
values |= st.floats() | st.text(max_size=8)


def _paths(value: Any, at: tuple = ()) -> list[tuple]:
  """The places in a JSON value, the whole last."""
  inner = []
  if isinstance(value, dict):
    inner = [p for k, v in value.items() for p in _paths(v, (*at, k))]
  elif isinstance(value, list):
    inner = [p for i, v in enumerate(value[:40]) for p in _paths(v, (*at, i))]
  return [*inner, at]


def _with(value: Any, path: tuple, new: Any, how: str) -> Any:
  if not path:
    return new
  key, *rest = path
  copy = dict(value) if isinstance(value, dict) else list(value)
  if rest:
    copy[key] = _with(copy[key], tuple(rest), new, how)
  elif how == "leave out":
    del copy[key]
  elif how == "twice" and isinstance(copy, list):
    copy.insert(key, copy[key])
  else:
    copy[key] = new
  return copy


@st.composite
def json_like(draw: Any, base: Any) -> Any:
  """A JSON value with up to two places that hold something else, or nothing."""
  for _ in range(draw(st.integers(0, 2))):
    path = draw(st.sampled_from(_paths(base)))
    how = draw(st.sampled_from(["put", "put", "put", "leave out", "twice"]))
    base = _with(base, path, draw(values), how)
  return base


@st.composite
def bytes_like(draw: Any, base: bytes, head: int = 0) -> bytes:
  """Bytes with one to four damages, most of them among the first `head`."""
  for _ in range(draw(st.integers(1, 4))):
    front = head and draw(st.integers(0, 3))
    at = draw(st.integers(0, max(0, min(len(base), head if front else 1 << 30) - 1)))
    how = draw(st.sampled_from(["flip", "cut", "put", "insert", "remove", "number"]))
    some = draw(st.binary(min_size=1, max_size=8))
    if how == "flip":
      flipped = base[at] ^ (1 << draw(st.integers(0, 7))) if base else 0
      base = base[:at] + bytes([flipped]) + base[at + 1 :]
    elif how == "cut":
      base = base[:at]
    elif how == "put":
      base = base[:at] + some + base[at + len(some) :]
    elif how == "insert":
      base = base[:at] + some * draw(st.integers(1, 50)) + base[at:]
    elif how == "remove":
      base = base[:at] + base[at + draw(st.integers(1, 40)) :]
    else:
      number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]))
      base = base[:at] + number.to_bytes(8, "little") + base[at + 8 :]
  return base
