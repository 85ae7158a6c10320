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
# Of zstd, 4 kB of which may be 100 MB.
_PACKED = 1 << 12
# Bytes of a line, and of a file that is read as a whole: some kB may unpack to more.
LINE, WHOLE = 1 << 29, 1 << 32
_BOM = b"\xef\xbb\xbf"  # that some editors put before a text
_LFS = b"version https://git-lfs.github.com/spec/"
# Of a file that was written with --long: by default 128 MB are the limit.
_WINDOW = 1 << 31


def whole(path: Path) -> bytes:
  """All that a file holds, without a byte order mark.

  Raises:
    UserError: if it cannot be read, is too long, or is a pointer of git-lfs.
  """
  found, size = [], 0
  for piece in _pieces(path):
    found.append(piece)
    size += len(piece)
    if size > WHOLE:
      raise UserError(
        f"{path}: has more than {WHOLE >> 20:,} MB; use .jsonl or .parquet"
      )
  return b"".join(found).removeprefix(_BOM)


def lines(path: Path) -> Iterator[bytes]:
  """A file's lines without their ends, the first without a byte order mark.

  Not as str.splitlines() cuts: U+2028 and its like are legal inside a JSON string.

  Raises:
    UserError: as `whole` does.
  """
  mark, held, size = _BOM, [], 0
  for piece in _pieces(path):
    first, *others = piece.split(b"\n")
    held.append(first)
    size = len(others[-1]) if others else size + len(first)
    if size > LINE:
      raise UserError(f"{path}: has a line of more than {LINE >> 20:,} MB")
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
  frame, packed = None, file.read(_PACKED)
  while packed:
    frame = frame or unzip.decompressobj()
    yield frame.decompress(packed)
    packed = frame.unused_data or file.read(_PACKED)
    frame = None if frame.eof else frame
  if frame:
    raise EOFError("it ends before the end of its zstd frame")
