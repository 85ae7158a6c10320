"""Where models come from: a Hugging Face folder, a hub id, a .gguf file, a workdir."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from okd_jax.errors import UserError
from okd_jax.models.config import ModelConfig
from okd_jax.models.formats import gguf, hf
from okd_jax.models.formats.card import licence
from okd_jax.models.formats.parts import Where, on_default_device
from okd_jax.models.formats.weights import Params
from okd_jax.models.transformer import Decoder, logits
from okd_jax.runtime import mirror
from okd_jax.runtime.files import local

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]
_HUB_FILES += ["README.md"]  # which names the licence
_BLOCK, _BLOCKS = 2**16, 64  # bytes of one, and how many of a large file are read
_HUB_SKIP = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclasses.dataclass(frozen=True)
class Model:
  """A loaded model. `params` is None if only the rest was asked for."""

  config: ModelConfig
  params: Params | None
  tokenizer: "transformers.PreTrainedTokenizerBase | None" = None

  def logits(
    self,
    params: Params,
    tokens: Int[Array | np.ndarray, "B L"],
    segment_ids: Int[Array | np.ndarray, "B L"] | None = None,
  ) -> Float[Array, "B L V"]:
    """float32 next-token logits, computed in the parameters' dtype.

    `segment_ids` is 0 for padding and numbers the documents of a packed row.
    """
    dtype = params["embed"]["embedding"].dtype
    hidden, _ = Decoder(self.config, dtype=dtype).apply(
      {"params": params}, tokens, segment_ids
    )
    return logits(hidden, params, self.config)


def load(
  path: str | os.PathLike,
  *,
  dtype: DTypeLike = jnp.float32,
  where: Where = on_default_device,
  params: bool = True,
  quantize: bool = False,
  layers: range | None = None,
) -> Model:
  """Loads a model from an HF folder, a hub id, a .gguf file or a run's workdir.

  Args:
    path: of the folder, file or workdir, or the hub's id.
    dtype: what the parameters become, whatever they are stored as.
    where: the sharding of a parameter, given its path ('layers/mlp/up/kernel') and
      shape; a process reads what its own devices need and no more.
    params: False reads configuration and tokenizer only.
    quantize: makes the layers' kernels int8 (`models.int8`): for weights that nobody
      trains.
    layers: reads the parameters of these layers alone, {"layers": …}; an empty range
      all but the layers. The configuration is the whole model's.

  Returns:
    Configuration, parameters, and the tokenizer if there is one.

  Raises:
    UserError: one sentence, for whatever is wrong with `path` or what it holds.

  >>> import tempfile
  >>> config = ModelConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=2)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   hf.save(f"{folder}/model", init(config, jax.random.key(0)), config)
  ...   model = load(f"{folder}/model")
  >>> model.logits(model.params, jnp.zeros((1, 3), jnp.int32)).shape
  (1, 3, 8)
  """
  place = place_of(path)
  reader = gguf if place.is_file() else hf
  how = {"params": params, "quantize": quantize, "layers": layers}
  return Model(*reader.load(place, dtype=dtype, where=where, **how))


def load_tokenizer(path: str | os.PathLike) -> "transformers.PreTrainedTokenizerBase":
  """The tokenizer of a model, or of a folder that holds nothing else.

  Raises:
    UserError: as `load` does, and if there is none.
  """
  place, tokenizer = place_of(path), None
  if place.is_dir() and not hf.is_model(place):
    tokenizer = hf.load_tokenizer(place)
  tokenizer = tokenizer or load(place, params=False).tokenizer
  if tokenizer is None:
    raise UserError(f"{path} has no tokenizer")
  return tokenizer


def template_of(path: str | os.PathLike) -> str:
  """The data.template that a model exported by a run asks for, '' of any other."""
  place = place_of(path)
  return "" if place.is_file() else hf.template(place)


def is_part(path: str | os.PathLike) -> bool:
  """Whether the model is the text part of a larger one, which is all that is read."""
  place = place_of(path)
  return place.is_dir() and hf.is_part(place)


def is_hub_id(path: str | os.PathLike) -> bool:
  """Whether `load` would ask the hub for it."""
  return not local(path).exists() and bool(_HUB_ID.fullmatch(str(path)))


def licence_of(path: str | os.PathLike) -> dict[str, str]:
  """The fields license, license_name and license_link of a model, where it names them.

  Raises:
    UserError: as `load` does where there is no model.
  """
  place = place_of(path)
  return gguf.licence(place) if place.is_file() else licence(place / "README.md")


def fingerprint(path: str | os.PathLike) -> str:
  """SHA-256 of the files that make a model: its configuration and its weights.

  Raises:
    UserError: as `load` does where there is no model.
  """
  place, total = place_of(path), hashlib.sha256()
  for file in [place] if place.is_file() else hf.files(place):
    with file.open("rb") as stream:
      total.update(hashlib.file_digest(stream, "sha256").digest())
  return total.hexdigest()


def glance(path: str | os.PathLike) -> str:
  """A digest of a model's files that is soon there, however large they are.

  Of each file it reads the size and some blocks spread over it, which other weights
  would hardly share.

  Raises:
    UserError: as `load` does where there is no model.
  """
  place, total = place_of(path), hashlib.sha256()
  for file in [place] if place.is_file() else hf.files(place):
    size = file.stat().st_size
    total.update(f"{size} ".encode())
    with file.open("rb") as stream:
      for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
        stream.seek(start)
        total.update(stream.read(_BLOCK))
  return total.hexdigest()


def init(config: ModelConfig, key: Key[Array, ""]) -> Params:
  """Random float32 parameters; a UserError if no HF folder could hold the model."""
  hf.hf_config(config)
  tokens = jnp.zeros((1, 1), jnp.int32)
  return Decoder(config).init(key, tokens)["params"]


def take_layers(
  params: Params, config: ModelConfig, layers: int | Sequence[int]
) -> tuple[Params, ModelConfig]:
  """A shallower model: these layers, or so many evenly spaced ones.

  Evenly spaced are the first, the last and others between; a single one is the first.
  Every array is a copy: a step that donates the new
  model's buffers would otherwise take the old one's with them.
  """
  total = config.num_layers
  count = layers if isinstance(layers, int) else len(layers)
  if not 1 <= count <= total:
    raise UserError(
      f"{count} layers were asked for, but the model has {total}; take at least 1 and "
      "no more than that"
    )
  keep = even_layers(total, count) if isinstance(layers, int) else [*layers]
  taken = jax.tree.map(jnp.copy, {k: v for k, v in params.items() if k != "layers"})
  rows = np.array(keep)
  taken["layers"] = jax.tree.map(lambda x: jnp.copy(x[rows]), params["layers"])
  return taken, config.of_layers(keep)


def even_layers(total: int, n: int) -> list[int]:
  """The numbers of `n` evenly spaced ones of `total` layers, see `take_layers`."""
  return np.linspace(0, total - 1, n).round().astype(int).tolist()


def place_of(path: str | os.PathLike) -> Path:
  """The .gguf file or the HF folder that `path` means; of the hub or a store fetched.

  Raises:
    UserError: where there is none.
  """
  place = mirror.fetched(str(path), checkpoints=False)
  if place.is_file():
    if place.suffix != ".gguf":
      raise UserError(f"{path} is a file, but no .gguf; name the model's folder")
    return place
  return _model_folder(place) if place.is_dir() else _download(str(path))


def _model_folder(folder: Path) -> Path:
  """The HF folder that a local folder is, or holds if it is a run's workdir."""
  # A run keeps its own config.json, which names no model_type.
  if hf.is_model(folder):
    return folder
  exported = folder / "student"
  if (exported / "config.json").exists():
    return exported
  if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists():
    raise UserError(
      f"{folder} is a run that has exported no model yet; let it finish, or make one "
      f"with: python -m okd_jax.export --workdir={folder} --output=DIR"
    )
  if (folder / "adapter_config.json").exists():
    raise UserError(f"{folder} holds an adapter, not a model; name its base model")
  return folder


def _download(name: str) -> Path:
  if not _HUB_ID.fullmatch(name):
    raise UserError(f"{name}: there is no such file or folder")
  try:
    folder = huggingface_hub.snapshot_download(
      name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP
    )
  except Exception as error:  # its errors have no common base class
    reason = str(error).strip().split("\n")[0]
    raise UserError(
      f"{name} is no local file or folder and cannot be fetched from the hub: {reason}"
    ) from error
  return Path(folder)
