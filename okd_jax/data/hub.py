"""Hugging Face datasets: saved in a folder, or on the hub."""

import pathlib
import re
from collections.abc import Iterable, Iterator

from okd_jax.errors import UserError

Row = tuple[object, str]  # what was read, and where

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def split_of(source: str) -> tuple[str, str]:
  """('name', 'split') of 'name:split'; the split is '' where none is named."""
  base, *rest = source.split(":", 1)
  return base, rest[0] if rest else ""


def read_saved(folder: pathlib.Path, split: str) -> Iterable[Row]:
  """Rows of a folder that `Dataset.save_to_disk` or `DatasetDict` wrote."""
  import datasets  # here, since it takes a second that jsonl need not wait

  try:
    data = datasets.load_from_disk(str(folder))
  except Exception as error:  # its causes have no common class
    raise UserError(f"{folder}: cannot be loaded ({cause(error)})") from error
  if isinstance(data, datasets.DatasetDict):
    split = split or "train"
    if split not in data:
      raise UserError(f"{folder}: has no split {split!r}; it has {', '.join(data)}")
    return _dataset_rows(data[split], f"{folder}:{split}")
  if split:
    raise UserError(f"{folder}: is a single dataset without splits; leave :{split} out")
  return _dataset_rows(data, str(folder))


def read_hub(source: str) -> Iterable[Row]:
  """Rows of a dataset on the hub, `id`, `id:split` or `id@config:split`."""
  base, split = split_of(source)
  name, _, config = base.partition("@")
  if not _HUB_ID.fullmatch(name):
    raise UserError(f"{source}: no such file or folder")
  import datasets
  import huggingface_hub

  try:
    # Asked first, since load_dataset alone retries for half a minute, noisily,
    # before it reports a hub that is out of reach.
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
      huggingface_hub.HfApi().dataset_info(name, timeout=20)
    data = datasets.load_dataset(name, name=config or None, split=split or "train")
  except Exception as error:  # network, hub, splits, formats: no common class
    raise UserError(
      f"{source}: not a file or folder here, and not loaded from the Hugging Face "
      f"hub ({_hub_cause(error)})"
    ) from error
  return _dataset_rows(data, f"{base}:{split or 'train'}")


def _dataset_rows(data: Iterable[object], name: str) -> Iterator[Row]:
  for number, row in enumerate(data, 1):
    yield row, f"{name} row {number}"


def _hub_cause(error: Exception) -> str:
  if type(error).__name__ == "RepositoryNotFoundError":
    return "no dataset of this name, or it is private and you are not logged in"
  return cause(error)


def cause(error: BaseException) -> str:
  """The first line of an error's text; its class when it has none."""
  lines = str(error).strip().splitlines()
  return lines[0].rstrip(".") if lines else type(error).__name__
