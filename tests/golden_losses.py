"""Losses of short runs of every kind, compared bit by bit with those of a file.

    python tests/golden_losses.py               # all runs, about 8 minutes on 2 cores
    python tests/golden_losses.py okd gkd       # these
    python tests/golden_losses.py --write okd   # takes today's values of these

Each run is 20 steps of configs/debug.py in a variant of its own, through the command as
a user calls it: every method, every kind of online module, and stored, kept, packed,
several and differently tokenised teachers. Kept are the loss of each step, the figures
of the last evaluation and a digest of what was exported. Floats depend on the compiler
and the processor, so the file says which it was written with; elsewhere they need only
agree to 1e-3, and digests are not compared.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # one device, and none of the flags of the tests
  os.environ.pop("XLA_FLAGS", None)

import jax
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
ELSEWHERE = 1e-3  # relative, on another machine
QUICK = {
  "train.steps": 20,
  "train.log_every": 1,
  "train.batch_size": 4,
  "data.max_length": 96,
  "data.max_prompt_length": 80,
  "data.overlong_prompt": "truncate",
  "checkpoint.every": 100,
  "eval.every": 10,
  "eval.limit": 8,
  "eval.generate_limit": 2,
  "eval.max_new_tokens": 4,
}
METHODS = (
  "akl clda distillm distillm2 ensemble fdistill gkd imitkd jsd kd minillm mixkd okd "
  "promptkd rkd rlkd seqkd sft skd skl srkl tvd"
).split()
_TWO = {"teachers.big": "@big", "teachers.old": "@old", "data.tokenizer": ""}
_TWO |= {"teacher.model.hidden_size": 0}
_ENSEMBLE = _TWO | {"method.name": "ensemble"}
_OKD, _TOP = {"method.name": "okd"}, {"adapter.layers": 1}
VARIANTS = {name: {"method.name": name} for name in METHODS} | {
  "okd-prefix": _OKD | {"adapter.kind": "prefix"},
  "okd-prompt": _OKD | {"adapter.kind": "prompt"},
  "okd-blocks": _OKD | {"adapter.kind": "blocks"},
  "okd-sequential": _OKD | {"method.update_order": "sequential"},
  "okd-anchor": _OKD | _TOP | {"method.anchor_weight": 0.3},
  "okd-trunk": _OKD | _TOP | {"teacher.trunk": "memory", "method.anchor_weight": 0.3},
  "okd-packed": _OKD | {"data.pack": True},
  "okd-microbatches": _OKD | {"train.microbatches": 2, "train.dropout": 0.1},
  "okd-bfloat16": _OKD | {"train.dtype": "bfloat16", "optim.dtype": "bfloat16"},
  "okd-layers": _OKD
  | {"teacher.path": "@big", "student.layers": 1, "student.model.hidden_size": 0}
  | {"teacher.model.hidden_size": 0, "data.tokenizer": ""},
  "okd-schedules": _OKD
  | {"method.end.temperature": 2.0, "method.divergence": "alpha_beta"},
  "gkd-lora": {"method.name": "gkd", "adapter.kind": "lora"},
  "gkd-replay": {"method.name": "gkd", "method.replay": True},
  "minillm-prefix": {"method.name": "minillm", "adapter.kind": "prefix"},
  "promptkd-text": {"method.name": "promptkd", "adapter.text": "Be kind."},
  "kd-stored": {"method.name": "kd", "teacher.cache": "@cache"},
  "kd-packed": {"method.name": "kd", "data.pack": True, "method.kd_ratio": 0.5},
  "kd-top": {"method.name": "kd", "method.top_k": 8, "method.gold_weight": 0.5},
  "kd-uld": {
    "method.name": "kd",
    "method.cross_tokenizer": "uld",
    "method.kd_ratio": 0.6,
    "teacher.path": "@big",
    "teacher.model.hidden_size": 0,
    "data.tokenizer": "bpe:300",
  },
  "seqkd-ratio": {"method.name": "seqkd", "method.seqkd_ratio": 0.5},
  "ensemble-two": _ENSEMBLE,
  "ensemble-gated": _ENSEMBLE | {"method.weighting": "gated"},
  "ensemble-reinforced": _ENSEMBLE | {"method.weighting": "reinforced"},
  "ensemble-lora": _ENSEMBLE | {"adapter.kind": "lora", "method.anchor_weight": 0.3},
  "ensemble-one-lora": _ENSEMBLE
  | {
    "method.weighting": "gated",
    "adapter.kind": "lora",
    "adapter.teachers": "('old',)",
  },
}
_SAMPLES = {"distillm", "gkd", "imitkd", "minillm", "promptkd", "skd", "fdistill"}


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", help="variants; all by default")
  parser.add_argument("--write", action="store_true", help="keep what comes out")
  args = parser.parse_args(arguments)
  if unknown := set(args.names) - set(VARIANTS):
    parser.error(f"no such variants: {', '.join(sorted(unknown))}")
  kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  os.chdir(ROOT)
  wrong = 0
  for name, found in measure(args.names or list(VARIANTS)):
    if args.write:
      kept = {"machine": machine(), "runs": kept.get("runs", {}) | {name: found}}
      GOLDEN.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
      continue
    problem = difference(kept["runs"].get(name), found, machine() == kept["machine"])
    print(f"{name}: {problem or 'equal'}", flush=True)
    wrong += bool(problem)
  return int(wrong > 0)


def machine() -> dict[str, str]:
  """What a float's last bit depends on."""
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  flags = next((line for line in lines if line.startswith("flags")), platform.machine())
  return {
    "jax": jax.__version__,
    "python": ".".join(platform.python_version_tuple()[:2]),
    "cores": str(os.cpu_count()),
    "cpu": hashlib.sha256(flags.encode()).hexdigest()[:16],
  }


def measure(names: list[str]) -> Iterator[tuple[str, dict]]:
  """(name, what came out) of each run."""
  from okd_jax import main as command

  with tempfile.TemporaryDirectory() as folder:
    places = {"@big": {"hidden_size": 48, "num_layers": 2}, "@old": {"hidden_size": 32}}
    for place, shape in places.items():
      model = {f"student.model.{key}": value for key, value in shape.items()}
      changes = {"method.name": "sft", "train.steps": 2} | model
      _run(command.main, Path(folder) / place, changes)
    for name in names:
      workdir = Path(folder) / name
      yield name, _outcome(command.main, workdir, VARIANTS[name])
      shutil.rmtree(workdir)


def _outcome(run, workdir: Path, changes: dict) -> dict:
  if changes.get("teacher.cache"):
    from okd_jax import cache_teacher

    flags = _flags(workdir.parent, changes | {"teacher.cache": ""})
    with contextlib.redirect_stdout(io.StringIO()):
      cache_teacher.main([*flags, f"--output={workdir.parent / '@cache'}", "--k=16"])
  _run(run, workdir, changes)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  last = [row for row in rows if row["kind"] == "eval"][-1]
  exported = sorted(workdir.glob("*/**/*.safetensors"))
  return {
    "loss": [row["loss"] for row in rows if row["kind"] == "train"],
    "eval": {k: v for k, v in sorted(last.items()) if k != "kind"},
    "exported": {
      str(path.relative_to(workdir)): _digest(path)
      for path in exported
      if "checkpoints" not in path.parts
    },
  }


def _run(run, workdir: Path, changes: dict) -> None:
  with contextlib.redirect_stdout(io.StringIO()):
    run([*_flags(workdir.parent, changes), f"--workdir={workdir}"])


def _flags(folder: Path, changes: dict) -> list[str]:
  changes = QUICK | changes
  if changes["method.name"] in _SAMPLES:
    changes = {"method.max_new_tokens": 6} | changes
  values = {
    key: folder / value if str(value).startswith("@") else value
    for key, value in changes.items()
  }
  flags = [f"--config.{key}={value}" for key, value in values.items()]
  return ["--config=configs/debug.py", *flags]


def _digest(path: Path) -> str:
  """Of the tensors, whatever the file's header says."""
  total = hashlib.sha256()
  for name, tensor in sorted(load_file(path).items()):
    total.update(name.encode() + tensor.tobytes())
  return total.hexdigest()[:16]


def difference(kept: dict | None, found: dict, same_machine: bool) -> str:
  """What differs, in words; '' where nothing does."""
  if kept is None:
    return "there is no such run in the file"
  if same_machine:
    parts = [part for part in kept if kept[part] != found[part]]
    steps = [i + 1 for i, pair in _pairs(kept, found) if pair[0] != pair[1]]
    first = f", losses from step {steps[0]}" if steps else ""
    return f"{', '.join(parts)} differ{first}" if parts else ""
  apart = [
    i + 1
    for i, (a, b) in _pairs(kept, found)
    if not math.isclose(a, b, rel_tol=ELSEWHERE)
  ]
  return f"losses differ from step {apart[0]}" if apart else ""


def _pairs(kept: dict, found: dict):
  return enumerate(zip(kept["loss"], found["loss"], strict=True))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
