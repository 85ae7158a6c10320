"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes beside `path`, then takes its place; makes the folder if it must."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_text(text, encoding="utf8")
  os.replace(temporary, path)
