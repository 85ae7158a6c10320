"""Students of a stored teacher beside the live one's: what the top K leave out.

    python -m configs.stories                    # once: the data
    python benchmarks/stored.py --config=configs/stories.py --folder=runs/stored

From one SFT start, 'kd' by the live teacher, by its whole stored vocabulary and by its
K likeliest tokens; then every student beside the live teacher on the held-out rows.
What is finished in the folder is not run again. Keys of the configuration are set as
for okd_jax.main. Prints a section of BENCHMARKS.md.
"""

import json
from pathlib import Path

import numpy as np
from command import call, rows
from safetensors.numpy import load_file

from okd_jax.bench import measure
from okd_jax.runtime import cli


def main(arguments: list[str]) -> None:
  """Runs what has not been run, then prints the table."""
  args, changes = _parser().parse_known_args(arguments)
  folder, config = Path(args.folder), f"--config={args.config}"
  start = folder / "start"
  sft = ["--config.method.name=sft", f"--config.train.steps={args.start_steps}"]
  call("main", folder / "start.log", config, *changes, *sft, f"--workdir={start}")
  changes += [f"--config.student.path={start}", "--config.student.layers=0"]
  changes += ["--config.method.name=kd", "--config.train.log_every=1"]
  runs = {"live": []}
  for k in [0, *sorted(args.k, reverse=True)]:
    name = f"K = {k}" if k else "K = V"
    cache = folder / f"cache-{k}"
    stored = [f"--output={cache}", f"--k={k}", f"--dtype={args.dtype}"]
    call("cache_teacher", folder / f"cache-{k}.log", config, *changes, *stored)
    runs[name] = [f"--config.teacher.cache={cache}"]
  lines = [
    "### Stored teachers",
    "",
    measure.describe(measure.environment()),
    "",
    "| teacher | bytes per trained token | first loss | last loss | held-out loss "
    "| KL(teacher‖student) | to the live one's | largest difference of a weight |",
    "|---|---|---|---|---|---|---|---|",
  ]
  live = None
  for name, more in runs.items():
    work = folder / f"student-{name.replace(' ', '')}"
    call("main", work.with_suffix(".log"), config, *changes, *more, f"--workdir={work}")
    result = _evaluate(args, work, changes)
    weights = load_file(work / "student" / "model.safetensors")
    live = live or (result, weights)
    losses = [row["loss"] for row in rows(work, "train")]
    apart = max(float(np.abs(w - live[1][key]).max()) for key, w in weights.items())
    gap = result["forward_kl"] - live[0]["forward_kl"]
    cells = [name, _bytes(more), f"{losses[0]:.5f}", f"{losses[-1]:.5f}"]
    cells += [f"{result['loss']:.4f}", f"{result['forward_kl']:.4f}", f"{gap:+.4f}"]
    lines.append(f"| {' | '.join([*cells, f'{apart:.1e}'])} |")
  print("\n".join(lines))


def _evaluate(args, work: Path, changes: list[str]) -> dict:
  """The student beside the live teacher; lengths as in training."""
  settings = json.loads((work / "config.json").read_text(encoding="utf8"))
  data, output = settings["data"], work / "beside.json"
  call(
    "evaluate",
    work.with_name(f"{work.name}-evaluate.log"),
    f"--model={work}",
    f"--teacher={settings['teacher']['path']}",
    f"--data={data['eval']}",
    f"--max_length={data['max_length']}",
    f"--max_prompt_length={data['max_prompt_length']}",
    "--max_new_tokens=0",
    f"--limit={settings['eval']['limit']}",
    f"--output={output}",
  )
  return json.loads(output.read_text(encoding="utf8"))


def _bytes(more: list[str]) -> str:
  """What a trained token takes in the store."""
  if not more:
    return "–"
  files = list((Path(more[0].partition("=")[2]) / "train").glob("*.safetensors"))
  tokens = sum(len(load_file(file)["log_tail"]) for file in files)
  return f"{sum(file.stat().st_size for file in files) / tokens:.0f}"


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python benchmarks/stored.py",
    description="Trains students from a live and from stored teachers.",
    epilog="--config.key=value changes a key of the configuration.",
  )
  add = parser.add_argument
  add("--config", required=True, help="configuration file of the runs")
  add("--folder", required=True, help="holds runs and caches")
  add("--k", type=lambda t: [int(k) for k in t.split(",")], default="8,32,128")
  add("--dtype", default="float32", help="of the stored log-probabilities")
  add("--start_steps", type=measure.at_least(1), default=100, help="of the SFT start")
  return parser


if __name__ == "__main__":
  cli.run(main)
