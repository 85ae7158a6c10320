"""How far a loader has come, in a checkpoint: one file, of however many processes."""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, Protocol, runtime_checkable

import jax

_FILE = "position.json"


@runtime_checkable
class Moving(Protocol):
  """A loader whose position is JSON and the same in all processes."""

  def get_state(self) -> Any:
    """The position."""

  def set_state(self, state: Any) -> None:
    """Goes on at a position."""


class Position:
  """A loader as Orbax saves and restores it.

  Grain's own way writes a file for each process and wants as many again; those files
  are read, too.
  """

  def __init__(self, loader: Moving):
    self._loader = loader

  async def save(self, directory: Any) -> Awaitable[None]:
    """Orbax's way to ask for the position; later steps do not change what is saved."""
    return _save(directory, json.dumps(self._loader.get_state()))

  async def load(self, directory: Any) -> Awaitable[None]:
    """Orbax's way to set it."""
    return self._load(directory)

  async def _load(self, directory: Any) -> None:
    own = directory / _FILE
    file = own if own.exists() else min(directory.glob("process_*.json"))
    self._loader.set_state(json.loads(await asyncio.to_thread(file.read_text)))


async def _save(directory: Any, state: str) -> None:
  folder = await directory.await_creation()
  if jax.process_index() == 0:  # the others' is the same
    await asyncio.to_thread((folder / _FILE).write_text, state)
