"""What once broke something, by kind: (what it was, the input or what makes it).

Tracebacks, hangs and wrong acceptances of the code before it had bounds, and what
`fuzz.run` has found since. `test_corpus.py` reads them again in seconds.
"""

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import save

from fuzz.kinds import _header, _with_field, _with_header
from fuzz.materials import materials
from okd_jax.teachers import store


def _json(levels: int) -> bytes:
  return b"[" * levels + b"1" + b"]" * levels


def _config(**keys: Any) -> str:
  return json.dumps(json.loads(materials().model["config.json"]) | keys)


def _adapter(**keys: Any) -> tuple[bytes, bytes]:
  """Another's adapter with these keys in its configuration."""
  files = materials().adapter
  raw = json.loads(files["adapter_config.json"]) | keys
  weights = files["adapter_model.safetensors"]
  header = _header(weights)
  del header["__metadata__"]
  return json.dumps(raw).encode(), _with_header(weights, header)


def _noted(note: str) -> tuple[bytes, bytes]:
  files = materials().adapter
  weights = files["adapter_model.safetensors"]
  header = _header(weights) | {"__metadata__": {"okd_jax": note}}
  return files["adapter_config.json"], _with_header(weights, header)


def _put(content: bytes, at: int, new: bytes) -> bytes:
  return content[:at] + new + content[at + len(new) :]


def _gguf_list(length: int) -> bytes:
  """A file that says that its tokens are so many."""
  whole, key = materials().gguf, b"tokenizer.ggml.tokens"
  at = whole.index(key) + len(key) + 8  # behind the kinds of list and elements
  return _put(whole, at, struct.pack("<Q", length))


def _tokenizer_config(**keys: Any) -> tuple[str, bytes]:
  name = "tokenizer_config.json"
  return name, json.dumps(json.loads(materials().model[name]) | keys).encode()


def _about(**keys: Any) -> tuple[str, bytes]:
  raw = json.loads(materials().prepared["about.json"]) | keys
  return "about.json", json.dumps(raw).encode()


def _forged(**arrays: np.ndarray) -> tuple[str, bytes]:
  """A file of a teacher cache whose checksum is right, and its arrays are not."""
  total = store._checksum(arrays)
  return "00000000.safetensors", save(arrays, {"sha256": total})


def _index(weight_map: Any) -> tuple[str, bytes]:
  whole = materials().model["model.safetensors"]
  return json.dumps({"weight_map": weight_map}), whole


_NUMBERS, _X = np.arange(10), np.ones(6)
_LOOP = "{% for i in range(99) %}{% set n.s = "
_LOOP = "{% set n = namespace(s='ab') %}" + _LOOP
CORPUS: dict[str, list[tuple[str, Callable[[], Any]]]] = {
  "jsonl": [
    ("deep", lambda: _json(150)),
    ("too deep for Python", lambda: _json(100_000)),
    ("deep within a row", lambda: b'{"messages": ' + _json(300) + b"}"),
    ("half a surrogate pair", lambda: b'{"text": "\\ud800"}'),
    ("a number of 5000 digits", lambda: b'{"text": ' + b"1" * 5000 + b"}"),
  ],
  "templates": [
    ("10**12 turns", lambda: (True, "{% for i in range(10**12) %}x{% endfor %}")),
    ("1/0", lambda: (True, "{{ 1 / 0 }}")),
    ("10 GB", lambda: (False, "{{ 'a' * 10**10 }}")),
    ("doubled by ~", lambda: (True, _LOOP + "n.s ~ n.s %}{% endfor %}")),
    ("doubled by lists", lambda: (True, _LOOP + "[n.s, n.s] %}{% endfor %}{{ n.s }}")),
    ("a bad index", lambda: (True, "{{ 'a'.index('b') }}{{ messages.x.y.z }}")),
  ],
  "overrides": [
    ("a seed of 2^64", lambda: [("train.seed", str(2**64))]),
    ("1e-30 degrees", lambda: [("method.temperature", "1e-30")]),
    ("nobody's home", lambda: [("method.file", "~nosuchuser/x.py")]),
    ("NUL", lambda: [("method.file", "a\0b")]),
    ("a rate of inf", lambda: [("optim.lr", "inf")]),
  ],
  "safetensors, index": [
    ("a file of another folder", lambda: _index({"a": "../../x.safetensors"})),
    ("a list", lambda: _index(["a.safetensors"])),
    ("numbers", lambda: _index({"a": 1})),
    ("text", lambda: _index("a.safetensors")),
    ("NUL", lambda: _index({"a": "a\0.safetensors"})),
  ],
  "config.json": [
    ("10**12 layers", lambda: _config(num_hidden_layers=10**12)),
    ("10**12 windowed", lambda: _config(model_type="gemma2", num_hidden_layers=10**12)),
    ("layers of 1.5", lambda: _config(num_hidden_layers=1.5)),
    ("NaN layers", lambda: _config(num_hidden_layers=math.nan)),
    ("10**12 words", lambda: _config(vocab_size=10**12)),
    ("a list of norms", lambda: _config(rms_norm_eps=[1])),
    ("a NaN norm", lambda: _config(rms_norm_eps=math.nan)),
    ("a base in words", lambda: _config(rope_theta="x")),
    ("ends that are objects", lambda: _config(eos_token_id={"a": 1})),
    ("biases that are lists", lambda: _config(attention_bias=[1])),
    ("deep", lambda: '{"a": ' + "[" * 9999 + "]" * 9999 + "}"),
  ],
  "tokenizer": [
    ("a length that is a list", lambda: _tokenizer_config(model_max_length=[1])),
    ("a length in words", lambda: _tokenizer_config(model_max_length="long")),
  ],
  "GGUF": [
    ("10**12 layers", lambda: _with_field("block_count", 10**12)),
    ("more layers than tensors", lambda: _with_field("block_count", 999)),
    ("no heads", lambda: _with_field("attention.head_count", 0)),
    ("heads in words", lambda: _with_field("attention.head_count", "x")),
    ("2^60 tokens", lambda: _gguf_list(2**60)),
    ("cut within the head", lambda: materials().gguf[:200]),
    ("2^63 fields", lambda: _put(materials().gguf, 16, struct.pack("<Q", 2**63))),
    ("2^63 tensors", lambda: _put(materials().gguf, 8, struct.pack("<Q", 2**63))),
  ],
  "adapters": [
    ("NaN alpha", lambda: _adapter(lora_alpha=math.nan)),
    ("alpha in words", lambda: _adapter(lora_alpha="x")),
    ("a kind that is a list", lambda: _adapter(peft_type=["LORA"])),
    ("patterns that are a list", lambda: _adapter(alpha_pattern=["q_proj"])),
    ("no expression", lambda: _adapter(alpha_pattern={"(": 1})),
    ("a search without end", lambda: _adapter(alpha_pattern={"(a+)+$": 1})),
    ("NaN in a pattern", lambda: _adapter(alpha_pattern={"q_proj": math.nan})),
    ("a note that is no JSON", lambda: _noted("{")),
    ("a note that is a list", lambda: _noted("[1]")),
    ("a note without a kind", lambda: _noted("{}")),
    ("a rank of 10**12", lambda: _noted('{"kind": "lora", "rank": 1000000000000}')),
    ("a rank in words", lambda: _noted('{"kind": "lora", "rank": "2"}')),
    ("more layers", lambda: _noted('{"kind": "lora", "rank": 2, "layers": 9}')),
  ],
  "prepared rows": [
    ("ends that are null", lambda: _about(ends=[3, None])),
    ("ends of lists", lambda: _about(ends=[[3], 6])),
    ("more ends", lambda: _about(ends=[3, 5, 6])),
    ("ends that fall", lambda: _about(ends=[7, 6])),
  ],
  "teacher caches": [
    ("forged without rows", lambda: _forged(ids=np.ones(3))),
    ("forged ends", lambda: _forged(rows=_NUMBERS[:2], ends=_NUMBERS[[9, 6]], x=_X)),
    ("forged rows", lambda: _forged(rows=-_NUMBERS[1:2], ends=_NUMBERS[[6]], x=_X)),
    ("forged lengths", lambda: _forged(rows=_NUMBERS[:1], ends=_NUMBERS[[9]], x=_X)),
  ],
}
