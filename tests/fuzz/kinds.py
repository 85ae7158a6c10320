"""Each kind of input: how it is made, and who reads it.

An input is a value that `repr` shows whole, so that what broke something once can be
kept in corpus.py. `read` puts it into a folder and does what a command would do.
"""

import dataclasses
import functools
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from fuzz import odd
from fuzz.materials import KEY, ROWS, lines, materials
from okd_jax import models
from okd_jax.config import read as config_read
from okd_jax.data import load_records, make_tokenizer, rows
from okd_jax.data.encode import encode
from okd_jax.data.format import make_render
from okd_jax.data.sources import Record
from okd_jax.errors import UserError
from okd_jax.run.job import check
from okd_jax.teachers.store import Store


@dataclasses.dataclass(frozen=True)
class Kind:
  """inputs: a strategy; read: raises a UserError for what it refuses."""

  inputs: Callable[[], st.SearchStrategy]
  read: Callable[[Any, Path], None]


def _files(folder: Path, files: dict[str, bytes]) -> Path:
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return folder


# Data

_FORM = {"max_length": 128, "max_prompt_length": 64}


@functools.cache
def _tokenizer() -> Any:
  return make_tokenizer("bytes", [])


def _read_data(name: str, content: bytes, folder: Path) -> None:
  path = folder / name
  path.write_bytes(content)
  for record in load_records(str(path)):
    encode(record, _tokenizer(), **_FORM)


def _jsonl() -> st.SearchStrategy:
  row = st.sampled_from(ROWS).flatmap(odd.json_like)
  some = st.lists(row, min_size=1, max_size=3).map(lines)
  return some | some.flatmap(odd.bytes_like)


def _json() -> st.SearchStrategy:
  whole = odd.json_like({"data": ROWS}) | odd.json_like(ROWS)
  some = whole.map(lambda value: json.dumps(value).encode())
  return some | some.flatmap(odd.bytes_like)


_CSV = b'instruction,input,output\n"Add ""it""","1, 2",3\nb,,c\n"two\nlines",x,y\n'


def _csv() -> st.SearchStrategy:
  cell = st.text('ab,"\n\r\0\t;é', max_size=6)
  line = st.lists(cell, max_size=4).map(",".join)
  return odd.bytes_like(_CSV) | st.lists(line, max_size=5).map(
    lambda some: ("instruction,output\n" + "\n".join(some)).encode()
  )


def _table(columns: dict[str, list], arrow: bool) -> bytes:
  out = io.BytesIO()
  table = pa.table(columns)
  if arrow:
    with pa.ipc.new_stream(out, table.schema) as writer:
      writer.write_table(table)
  else:
    pq.write_table(table, out)
  return out.getvalue()


def _columns() -> st.SearchStrategy:
  names = st.sampled_from(["instruction", "output", "messages", "text", "tools", "x"])
  one = st.sampled_from(
    [1, 2**40, 1.5, "a", b"\xff", [1], ["a"], [{"role": "user", "content": "a"}], True]
    + [{"a": {"b": 1}}, None]
  )
  column = one.map(lambda value: [value, value])
  return st.dictionaries(names, column, min_size=1, max_size=3)


def _parquet() -> st.SearchStrategy:
  made = st.tuples(_columns(), st.booleans()).map(lambda x: (x[1], _table(*x)))
  sound = st.sampled_from([(False, materials().parquet), (True, materials().arrow)])
  damaged = sound.flatmap(
    lambda one: odd.bytes_like(one[1]).map(lambda content: (one[0], content))
  )
  return damaged | made


def _read_parquet(value: tuple[bool, bytes], folder: Path) -> None:
  _read_data("d.arrow" if value[0] else "d.parquet", value[1], folder)


# Templates

_EXPRESSIONS = ["instruction", "messages", "1", "'a'", "n.s", "messages[0]", "none"]
_EXPRESSIONS += ["10**10", "{'a': [1]}", "input", "m", "range(10**12)", "x.y.z", "loop"]
_EXPRESSIONS += ["messages[-1].content", "tools", "bos_token", "raise_exception('no')"]
_OPERATORS = ["+", "~", "*", "**", "%", "/", "//", "-", "==", "in", "is", "<", "and"]
_FILTERS = ["tojson", "length", "join", "list", "string", "replace('a', 'bb')", "upper"]
_FILTERS += ["center(10**9)", "indent(9**9)", "batch(3)", "sum", "sort", "int", "trim"]
_FILTERS += ["map('upper')", "format(1)", "wordwrap(1)", "truncate(9)", "groupby('a')"]
_METHODS = ["split()", "upper()", "format(1)", "ljust(10**9)", "__class__", "items()"]
_METHODS += ["join('ab')", "encode()", "replace('', 'b')", "mro()", "append(1)", "a"]


@st.composite
def _expression(draw: Any) -> str:
  text = draw(st.sampled_from(_EXPRESSIONS))
  for _ in range(draw(st.integers(0, 3))):
    match draw(st.integers(0, 3)):
      case 0:
        other = draw(st.sampled_from(_EXPRESSIONS))
        text = f"({text} {draw(st.sampled_from(_OPERATORS))} {other})"
      case 1:
        text = f"({text})|{draw(st.sampled_from(_FILTERS))}"
      case 2:
        text = f"({text}).{draw(st.sampled_from(_METHODS))}"
      case 3:
        text = f"[{text}, {text}]"
  return text


_AROUND = [
  "{{% for m in {e} %}}{b}{{% endfor %}}",
  "{{% for i in range(99999) %}}{b}{{% endfor %}}",
  "{{% if {e} %}}{b}{{% else %}}{{{{ {e} }}}}{{% endif %}}",
  "{{% set n.s = {e} %}}{b}",
  "{{% set n.s = n.s ~ n.s %}}{b}{b}",
  "{{% set n.s = [n.s, n.s] %}}{b}",
  "{{% set x %}}{b}{{% endset %}}{{{{ x }}}}",
  "{{% macro f(a) %}}{b}{{{{ f({e}) }}}}{{% endmacro %}}{{{{ f(1) }}}}",
  "{{% filter upper %}}{b}{{% endfilter %}}",
  "{{% generation %}}{b}{{% endgeneration %}}",
  "{b}{{% include {e} %}}",
  "{{{{ {e} }}}}{b}",
]


@st.composite
def _template(draw: Any) -> tuple[bool, str]:
  body = "{{ " + draw(_expression()) + " }}"
  for _ in range(draw(st.integers(0, 4))):
    around = draw(st.sampled_from(_AROUND))
    body = around.format(e=draw(_expression()), b=body)
  start = "{% set n = namespace(s='ab') %}"
  if draw(st.integers(0, 4)) == 0:
    cut = draw(st.integers(0, len(body)))
    body = body[:cut] + draw(st.text("{}%#'\" ()|", max_size=4)) + body[cut:]
  return draw(st.booleans()), start + body


_TALK = Record(
  "messages", "f:1", messages=({"role": "user", "content": "Hi"},), references=("b",)
)
_PLAIN = Record("instruction", "f:2", prompt="Add.", input="1", references=("3",))


def _read_template(value: tuple[bool, str], folder: Path) -> None:
  chat, text = value
  tokenizer = make_tokenizer("bytes", [])
  tokenizer.chat_template = text
  if chat:
    make_render("chat", tokenizer)(_TALK)
  else:
    make_render(text + "{{ instruction }}", None)(_PLAIN)


# Overrides


def _overrides() -> st.SearchStrategy:
  keys = list(config_read.keys(config_read.load_recipe("debug")))
  key = st.sampled_from(
    [*keys, *(k for k in keys if k.startswith(("train", "method")))]
  )
  key |= st.sampled_from(
    ["teachers.a", "data.columns.prompt", "nosuch", "train", "", "."]
  )
  said = st.sampled_from([*odd.SCALARS, *odd.TEXTS]).map(str) | odd.values.map(str)
  said |= st.integers(-3, 300).map(str) | st.floats().map(str)
  return st.lists(st.tuples(key, said), min_size=1, max_size=3)


def _read_overrides(value: list[tuple[str, str]], folder: Path) -> None:
  flags = [f"--config.{key}={text}" for key, text in value]
  check(config_read.read(["--config=debug", *flags]))


# Models


def _with_header(content: bytes, header: Any) -> bytes:
  """A safetensors file with another header."""
  length = int.from_bytes(content[:8], "little")
  new = json.dumps(header).encode()
  return struct.pack("<Q", len(new)) + new + content[8 + length :]


def _header(content: bytes) -> Any:
  return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _safetensors() -> st.SearchStrategy:
  whole = materials().model["model.safetensors"]
  head = int.from_bytes(whole[:8], "little")
  header = odd.json_like(_header(whole)).map(lambda x: ("", _with_header(whole, x)))
  damaged = odd.bytes_like(whole, head).map(lambda x: ("", x))
  index = {"metadata": {}, "weight_map": dict.fromkeys(_header(whole), "a.safetensors")}
  indexed = odd.json_like(index).map(lambda x: (json.dumps(x), whole))
  return header | damaged | indexed


def _read_safetensors(value: tuple[str, bytes], folder: Path) -> None:
  index, content = value
  files = dict(materials().model)
  del files["model.safetensors"]
  if index:
    files["model.safetensors.index.json"] = index.encode()
  files["a.safetensors" if index else "model.safetensors"] = content
  models.load(_files(folder, files))


def _config_json() -> st.SearchStrategy:
  raw = json.loads(materials().model["config.json"])
  families = {"gemma2", "gemma3_text", "gpt2", "mistral", "olmo3", "opt", "phi3"}
  families |= {"qwen2", "qwen3_moe", "smollm3", "ministral", "granite", "llama"}
  more = {"sliding_window": 8, "layer_types": ["full_attention"] * 2, "n_inner": 4}
  more |= {"num_experts": 2, "query_pre_attn_scalar": 4, "no_rope_layers": [1, 1]}
  more |= {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 64, "ffn_dim": 32}
  more |= {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": True}}
  some = st.sampled_from(sorted(families)).map(lambda name: raw | {"model_type": name})
  wide = some.map(lambda one: more | one)
  return (some | wide).flatmap(odd.json_like).map(json.dumps)


def _read_config(value: str, folder: Path) -> None:
  models.load(_files(folder, materials().model | {"config.json": value.encode()}))


def _tokenizer_json() -> st.SearchStrategy:
  found = []
  for name in ("tokenizer.json", "tokenizer_config.json"):
    content = materials().model[name]
    named = functools.partial(lambda name, x: (name, x), name)
    raw = odd.json_like(json.loads(content)).map(lambda x: json.dumps(x).encode())
    found += [raw.map(named), odd.bytes_like(content).map(named)]
  return st.one_of(found)


def _read_tokenizer(value: tuple[str, bytes], folder: Path) -> None:
  place = _files(folder, materials().model | {value[0]: value[1]})
  found = models.load(place, params=False).tokenizer
  encode(_PLAIN, found, **_FORM)


def _gguf() -> st.SearchStrategy:
  whole = materials().gguf
  field = st.tuples(st.sampled_from(_NUMBERS), odd.values | st.binary(max_size=12))
  return odd.bytes_like(whole, 600) | odd.bytes_like(whole, 20_000) | field


_NUMBERS = ["block_count", "context_length", "embedding_length", "feed_forward_length"]
_NUMBERS += ["attention.head_count", "attention.head_count_kv", "rope.freq_base"]
_NUMBERS += ["attention.key_length", "attention.layer_norm_rms_epsilon"]


def _read_gguf(value: Any, folder: Path) -> None:
  content = value if isinstance(value, bytes) else _with_field(*value)
  (folder / "m.gguf").write_bytes(content)
  models.load(folder / "m.gguf")


def _with_field(name: str, value: Any) -> bytes:
  """The file with another value in a field of four bytes, of any type."""
  whole, key = materials().gguf, f"llama.{name}".encode()
  at = whole.index(key) + len(key)
  match value:
    case bool():
      new = struct.pack("<IB", 7, value)
    case int() if -(2**63) <= value < 2**63:
      new = struct.pack("<Iq", 11, value)
    case float():
      new = struct.pack("<Id", 12, value)
    case bytes():
      new = value
    case _:
      text = str(value).encode("utf-8", "replace")
      new = struct.pack("<IQ", 8, len(text)) + text
  # Padding before the tensors moves with what is longer.
  return whole[:at] + new + whole[at + 8 :]


def _adapter() -> st.SearchStrategy:
  files = materials().adapter
  weights = files["adapter_model.safetensors"]
  raw = json.loads(files["adapter_config.json"]) | {"alpha_pattern": {"q_proj": 4}}
  config = odd.json_like(raw).map(lambda x: (json.dumps(x).encode(), weights))
  strange = _header(weights)
  note = json.loads(strange["__metadata__"].pop("okd_jax"))
  foreign = _with_header(weights, strange)
  stranger = odd.json_like(raw).map(lambda x: (json.dumps(x).encode(), foreign))

  def noted(x: Any) -> tuple[bytes, bytes]:
    header = _header(weights) | {"__metadata__": {"okd_jax": json.dumps(x)}}
    return files["adapter_config.json"], _with_header(weights, header)

  header = odd.json_like(_header(weights)).map(
    lambda x: (files["adapter_config.json"], _with_header(weights, x))
  )
  return config | stranger | odd.json_like(note).map(noted) | header


def _read_adapter(value: tuple[bytes, bytes], folder: Path) -> None:
  names = ("adapter_config.json", "adapter_model.safetensors")
  models.load_adapter(
    _files(folder, dict(zip(names, value, strict=True))), materials().config
  )


# What okd_jax wrote itself


def _damaged(files: dict[str, bytes]) -> st.SearchStrategy:
  """(a file's name, its bytes) of a folder, one of whose files is damaged."""
  ways = []
  for name, content in files.items():
    named = functools.partial(lambda name, x: (name, x), name)
    ways.append(odd.bytes_like(content).map(named))
    if name.endswith(".json"):
      raw = odd.json_like(json.loads(content))
      ways.append(raw.map(lambda x: json.dumps(x).encode()).map(named))
  return st.one_of(ways)


def _read_prepared(value: tuple[str, bytes], folder: Path) -> None:
  _files(folder, materials().prepared | {value[0]: value[1]})
  for example in rows.open_rows(str(folder)):
    assert example.prompt_length <= len(example.tokens)


def _read_cache(value: tuple[str, bytes], folder: Path) -> None:
  _files(folder, materials().cache | {value[0]: value[1]})
  kept = Store(folder, 4, KEY)
  for row in range(4):
    kept.read(np.array([[row]]), np.ones((1, 3), bool))


KINDS = {
  "jsonl": Kind(_jsonl, functools.partial(_read_data, "d.jsonl")),
  "json": Kind(_json, functools.partial(_read_data, "d.json")),
  "csv": Kind(_csv, functools.partial(_read_data, "d.csv")),
  "parquet, arrow": Kind(_parquet, _read_parquet),
  "templates": Kind(_template, _read_template),
  "overrides": Kind(_overrides, _read_overrides),
  "safetensors, index": Kind(_safetensors, _read_safetensors),
  "config.json": Kind(_config_json, _read_config),
  "tokenizer": Kind(_tokenizer_json, _read_tokenizer),
  "GGUF": Kind(_gguf, _read_gguf),
  "adapters": Kind(_adapter, _read_adapter),
  "prepared rows": Kind(lambda: _damaged(materials().prepared), _read_prepared),
  "teacher caches": Kind(lambda: _damaged(materials().cache), _read_cache),
}
REFUSED = (UserError, OSError)  # what a command says in one sentence
