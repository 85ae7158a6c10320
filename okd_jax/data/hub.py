"""Hugging Face datasets: saved in a folder, or on the hub."""

import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from okd_jax.data.shard import (
  Row,
  Shard,
  digest_of_files,
  digest_of_text,
  make_shard,
)
from okd_jax.data.values import cause
from okd_jax.errors import UserError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def split_of(source: str) -> tuple[str, str]:
  """('name', 'split') of 'name:split'; the split is '' where none is named."""
  base, *rest = source.split(":", 1)
  return base, rest[0] if rest else ""


def saved_shards(folder: Path, split: str) -> list[Shard]:
  """What a folder holds that `Dataset.save_to_disk` or `DatasetDict` wrote."""
  import datasets  # here, since it takes a second that jsonl need not wait

  try:
    data = datasets.load_from_disk(str(folder))
  except Exception as error:  # its causes have no common class
    raise UserError(f"{folder}: cannot be loaded ({cause(error)})") from error
  if isinstance(data, datasets.DatasetDict):
    split = split or "train"
    if split not in data:
      raise UserError(f"{folder}: has no split {split!r}; it has {', '.join(data)}")
    data, name = data[split], f"{folder}:{split}"
  elif split:
    raise UserError(f"{folder}: is a single dataset without splits; leave :{split} out")
  else:
    name = str(folder)
  files = [Path(part["filename"]) for part in data.cache_files]
  read = functools.partial(_rows, data, name)
  return [make_shard(name, read, functools.partial(digest_of_files, files))]


def hub_shards(source: str) -> list[Shard]:
  """A dataset on the hub, `id`, `id:split` or `id@config:split`."""
  data, (name, config) = _loaded(source)
  digest = functools.partial(_digest, data, config)
  return [make_shard(name, functools.partial(_rows, data, name), digest)]


def streamed_shards(source: str) -> list[Shard]:
  """The same, read on the hub as its rows are asked for; a shard for each of its files.

  Their digests are of the version that the set says it has.
  """
  data, (name, config) = _loaded(source, streaming=True)
  found, count, revision = [], data.num_shards, str(data.info.version)
  for i in range(count):
    part = data.shard(num_shards=count, index=i)
    called = f"{name} shard {i + 1} of {count}"
    digest = functools.partial(digest_of_text, [revision, config])
    found.append(make_shard(called, functools.partial(_rows, part, called), digest))
  return found


def _loaded(source: str, **options: bool) -> tuple[Any, tuple[str, str]]:
  """(a dataset on the hub, (name, config))."""
  base, split = split_of(source)
  id_, _, config = base.partition("@")
  if not _HUB_ID.fullmatch(id_):
    raise UserError(f"{source}: no such file or folder")
  import datasets
  import huggingface_hub

  try:
    # Asked first, since load_dataset alone retries for half a minute, noisily,
    # before it reports a hub that is out of reach.
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
      huggingface_hub.HfApi().dataset_info(id_, timeout=20)
    data = datasets.load_dataset(
      id_, name=config or None, split=split or "train", **options
    )
  except Exception as error:  # network, hub, splits, formats: no common class
    raise UserError(
      f"{source}: not a file or folder here, and not loaded from the Hugging Face "
      f"hub ({_hub_cause(error)})"
    ) from error
  return data, (f"{base}:{split or 'train'}", config)


def _digest(data: Any, config: str) -> str:
  # What `datasets` keeps apart its own caches by.
  return digest_of_text([data._fingerprint, config])


def _rows(data: Iterable[object], name: str) -> Iterator[Row]:
  for number, row in enumerate(data, 1):
    yield row, f"{name} row {number}"


def _hub_cause(error: Exception) -> str:
  if type(error).__name__ == "RepositoryNotFoundError":
    return "no dataset of this name, or it is private and you are not logged in"
  return cause(error)
