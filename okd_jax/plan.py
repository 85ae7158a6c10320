"""What a run's step would need of hardware that is not here; nothing is loaded.

    python -m okd_jax.plan --config=RECIPE --topology=v5e:4x4 [--search] \\
        [--output=O.json] [--config.key=value …]

Compiles the real training step from shapes alone, for any TPU that libtpu knows
(pip install okd-jax[tpu]), and prints its memory by part, operations, collectives,
and how long these take at the hardware's best. Of GPUs, gpu:h100x8, all is
arithmetic. Models are read from their config.json; a stage's model is the one that the
stage starts from. --search ranks meshes, where the teacher lies, remat and microbatches
by arithmetic, compiles the best three (--compile=N: so many; 0: none) and names the
best. --vocab_size=N is that of models drawn at random, of which nothing else says it.
"""

from okd_jax.bench.roofline import topology_of
from okd_jax.config import read
from okd_jax.config.describe import help_page
from okd_jax.config.unstaged import without_stages
from okd_jax.runtime import cli
from okd_jax.runtime.files import write_json


def main(arguments: list[str]) -> None:
  """Plans as the arguments say; a UserError for whatever is wrong with them."""
  if page := help_page(__doc__, arguments):
    print(page, end="")
    return
  parser = cli.Parser(prog="okd_jax.plan", add_help=False)
  parser.add_argument("--topology", required=True)
  parser.add_argument("--search", action="store_true")
  count = cli.number(int, "at least 0", lambda n: n >= 0)
  parser.add_argument("--compile", type=count, default=3)
  tokens = cli.number(int, "at least 1", lambda n: n >= 1)
  parser.add_argument("--vocab_size", type=tokens, default=32000)
  parser.add_argument("--output", default="")
  args, rest = parser.parse_known_args(arguments)
  cli.check_places(parser, {"output": args.output}, {}, ())
  topology = topology_of(args.topology)
  config = without_stages(read.read(rest))
  # From here on all is needed, which takes seconds to import.
  import jax

  from okd_jax.bench import plan_text, planning
  from okd_jax.run.ahead import outline
  from okd_jax.run.job import check

  jax.config.update("jax_platforms", "cpu")  # no device of this machine is used
  job = check(config)
  planner = planning.Planner(job, outline(job.settings, args.vocab_size), topology)
  plans = planner.search() if args.search else [planner.by_arithmetic(planner.asked())]
  plans = planner.compile_best(plans, 0 if topology.of_gpus else args.compile)
  best = plans[0]
  about = planner.about()
  print(plan_text.text(about, plans, best), flush=True)
  if args.output:
    found = about | {"best": planning.as_json(best)}
    write_json(args.output, found | {"plans": [planning.as_json(p) for p in plans]})


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
