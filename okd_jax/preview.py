"""Shows what a run would train on, before it runs; no weights are read.

    python -m okd_jax.preview --config=RECIPE [--config.key=value …] [--output=DIR] \\
        [--workdir=DIR] [--stage=NAME]

Prints where rows come from and what was left out or cut, how long they are, padding
with and without data.pack, tokens trained on, some rows with the trained part marked,
the template, and special tokens of teacher and student. The rows are kept, so that the
run itself starts at once. --output adds all figures, DIR/preview.json, and a picture,
DIR/lengths.png. Where paths mean stages, --workdir is the run that has finished them;
--stage previews one of them.
"""

import logging
import tempfile

from okd_jax.config import read
from okd_jax.config.describe import help_page
from okd_jax.config.stages import Stage, stages, untrained
from okd_jax.errors import UserError
from okd_jax.runtime import cli
from okd_jax.runtime.files import local, write_json


def main(arguments: list[str]) -> None:
  """Previews as the arguments say; a UserError for whatever is wrong with them."""
  if page := help_page(__doc__, arguments):
    print(page, end="")
    return
  parser = cli.Parser(prog="okd_jax.preview", add_help=False)
  for flag in ("--output", "--workdir", "--stage"):
    parser.add_argument(flag, default="")
  args, rest = parser.parse_known_args(arguments)
  cli.check_places(parser, {}, {"output": args.output}, ())
  with tempfile.TemporaryDirectory() as nowhere:
    workdir = local(args.workdir or nowhere)
    own = _stage(stages(read.read(rest), workdir), args.stage)
    # From here on all is needed, which takes seconds to import.
    from okd_jax.run import look, look_text
    from okd_jax.run.job import check
    from okd_jax.runtime.workdir import Workdir

    logging.getLogger("okd_jax").setLevel(logging.WARNING)  # the page says the rest
    seen = look.look(check(own.config), Workdir(own.workdir))
    found = look.figures(seen)
  print(look_text.text(seen, found), flush=True)
  if args.output:
    write_json(local(args.output) / "preview.json", found)
    look.save_picture(seen, local(args.output) / "lengths.png")


def _stage(parts: list[Stage], name: str) -> Stage:
  """The stage of that name, which must lack no earlier one's model."""
  found = [part for part in parts if part.name == name]
  if not found:
    named = ", ".join(part.name for part in parts[:-1]) or "none"
    raise UserError(f"--stage={name}: the stages are {named}")
  for key, stage in untrained(found[0]).items():
    raise UserError(
      f"{key}=stage:{stage}: this stage has left no model yet, so its tokenizer is not "
      f"known; name the run that has by --workdir=DIR, or preview --stage={stage}"
    )
  return found[0]


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
