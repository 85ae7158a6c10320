"""The bytes of data files, unzipped, a piece or a line at a time."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from okd_jax.data.values import cause
from okd_jax.errors import UserError

PACKED = (".gz", ".zst")
_PIECE = 1 << 20
_BOM = b"\xef\xbb\xbf"  # that some editors put before a text
_LFS = b"version https://git-lfs.github.com/spec/"
# Of a file that was written with --long: by default 128 MB are the limit.
_WINDOW = 1 << 31


def whole(path: Path) -> bytes:
  """All that a file holds, without a byte order mark.

  Raises:
    UserError: if it cannot be read, or is a pointer of git-lfs.
  """
  return b"".join(_pieces(path)).removeprefix(_BOM)


def lines(path: Path) -> Iterator[bytes]:
  """A file's lines without their ends, the first without a byte order mark.

  Not as str.splitlines() cuts: U+2028 and its like are legal inside a JSON string.

  Raises:
    UserError: as `whole` does.
  """
  mark, held = _BOM, []
  for piece in _pieces(path):
    first, *others = piece.split(b"\n")
    held.append(first)
    for other in others:
      yield b"".join(held).removeprefix(mark)
      mark, held = b"", [other]
  yield b"".join(held).removeprefix(mark)


def check_no_pointer(path: Path) -> None:
  """Raises a UserError for a pointer of git-lfs, or a file that cannot be opened."""
  try:
    with path.open("rb") as file:
      start = file.read(len(_LFS))
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({cause(error)})") from error
  if start == _LFS:
    raise UserError(
      f"{path}: is a pointer of git-lfs, not the file; fetch it with git lfs pull"
    )


def _pieces(path: Path) -> Iterator[bytes]:
  """What a file holds, unzipped if its suffix says so."""
  check_no_pointer(path)
  try:
    with path.open("rb") as file:
      match path.suffix.lower():
        case ".gz":
          with gzip.open(file) as unzipped:
            yield from _read(unzipped)
        case ".zst":
          yield from _unzip(file)
        case _:
          yield from _read(file)
  except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
    raise UserError(f"{path}: cannot be read ({cause(error)})") from error


def _read(file: io.BufferedIOBase) -> Iterator[bytes]:
  while piece := file.read(_PIECE):
    yield piece


def _unzip(file: io.BufferedIOBase) -> Iterator[bytes]:
  """Frame by frame; the library's own reader ends in silence where a file was cut."""
  unzip = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
  frame, packed = None, file.read(_PIECE)
  while packed:
    frame = frame or unzip.decompressobj()
    yield frame.decompress(packed)
    packed = frame.unused_data or file.read(_PIECE)
    frame = None if frame.eof else frame
  if frame:
    raise EOFError("it ends before the end of its zstd frame")
