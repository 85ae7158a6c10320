"""What loading a model costs each process of a run: memory and bytes read.

    python benchmarks/loading.py [--processes=2 --devices=4] [--mib=419]

Writes a random model in bfloat16 (LLaMA's layout, four files), loads it in several
processes of several simulated CPU devices each, split over all of them (fsdp), and
prints a line for each process: the share of the weights that its devices hold, the most
memory beyond what the process had before, and the bytes that it read from the files.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from okd_jax import models
from okd_jax.runtime import distributed, sharding

MIB = 2**20


def main() -> None:
  args = _parser().parse_args()
  if args.process >= 0:
    _load(args)
    return
  with tempfile.TemporaryDirectory() as folder:
    files = _write(Path(folder), args.mib)
    print(f"{files} files, fsdp={args.processes * args.devices}, bfloat16")
    print("process   share MiB   peak MiB   peak / share   read MiB   read / share")
    for i, found in enumerate(_all(args, folder)):
      share, peak, read = (found[key] / MIB for key in ("share", "peak", "read"))
      print(
        f"{i:7} {share:11.1f} {peak:10.1f} {peak / share:14.2f} {read:10.1f} "
        f"{read / share:14.2f}"
      )


def _write(folder: Path, mib: int) -> int:
  """A model of about so many MiB; the number of its files."""
  layers = max(1, round((mib - 62) / 22.3))
  shape = dict(hidden_size=1024, num_heads=16, mlp_size=2816, vocab_size=16_000)
  config = models.preset("llama", num_layers=layers, max_length=512, **shape)
  params = models.init(config, jax.random.key(0))
  limit = mib * MIB // 4 + 10 * MIB
  models.save(folder, params, config, dtype=jnp.bfloat16, max_shard_bytes=limit)
  return len(list(folder.glob("*.safetensors")))


def _all(args: argparse.Namespace, folder: str) -> list[dict[str, int]]:
  flag = f"--xla_force_host_platform_device_count={args.devices}"
  port = 20_000 + os.getpid() % 10_000
  command = [sys.executable, __file__, f"--folder={folder}", f"--port={port}"]
  command.append(f"--processes={args.processes}")
  started = [
    subprocess.Popen(
      [*command, f"--process={i}"],
      env=os.environ | {"XLA_FLAGS": flag},
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(args.processes)
  ]
  lines = [process.communicate()[0].splitlines()[-1] for process in started]
  return [json.loads(line) for line in lines]


def _load(args: argparse.Namespace) -> None:
  where = f"localhost:{args.port}"
  with distributed.joined(where, args.processes, args.process):
    mesh = sharding.make_mesh(1, -1, 1)
    jax.block_until_ready(jnp.zeros(8) + 1)
    before, read = _memory(), _read()
    place = functools.partial(sharding.place, mesh)
    params = models.load(args.folder, dtype=jnp.bfloat16, where=place).params
    jax.block_until_ready(params)
    own = [s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards]
    found = {"share": sum(own), "peak": _memory() - before, "read": _read() - read}
  print(json.dumps(found), flush=True)


def _memory() -> int:
  """The most that this process has had in memory."""
  text = Path("/proc/self/status").read_text()
  return int(text.split("VmHWM:")[1].split()[0]) * 1024


def _read() -> int:
  """Bytes that this process has asked of files."""
  return int(Path("/proc/self/io").read_text().split()[1])


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--processes", type=int, default=2)
  add("--devices", type=int, default=4, help="of each process")
  add("--mib", type=int, default=419, help="size of the model")
  add("--process", type=int, default=-1, help=argparse.SUPPRESS)
  add("--folder", help=argparse.SUPPRESS)
  add("--port", help=argparse.SUPPRESS)
  return parser


if __name__ == "__main__":
  main()
