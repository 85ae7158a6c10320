"""The house: who may import whom, and what lies where (docs/terms.md, README)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "okd_jax"
COMMANDS = {"main", "evaluate", "score", "generate", "sample", "export"}
COMMANDS |= {"prepare", "cache_teacher", "study", "analyze", "lm_eval", "preview"}
COMMANDS |= {"plan"}
# From the ground up; a file imports from its own floor and those below it.
FLOORS = (
  {"errors", "losses"},
  {"runtime"},
  {"data"},
  {"models"},
  {"text"},
  {"methods", "evaluation"},
  {"config", "teachers"},
  {"run", "analysis"},
  {"bench"} | COMMANDS,
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(path):
  """(room of `okd_jax` that a file imports from, the line), one by one."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      top, *rest = name.split(".")
      if top == "okd_jax" and rest:
        yield rest[0], node.lineno


def rooms():
  """(room, path) of every file that lies in one."""
  for path in sorted(ROOT.rglob("*.py")):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room != "__init__":
      yield room, path


def test_the_root_holds_commands_and_errors_alone():
  assert {p.stem for p in ROOT.glob("*.py")} == COMMANDS | {"errors", "__init__"}
  assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == FLOOR.keys() - (
    COMMANDS | {"errors"}
  )


def test_nothing_imports_upwards():
  for room, path in rooms():
    for other, line in imports(path):
      assert FLOOR[other] <= FLOOR[room], f"{path}:{line} imports {other}"


def test_no_circle():
  """Rooms of one floor may know each other, but only one way."""
  known = {room: set() for room in FLOOR}
  for room, path in rooms():
    known[room] |= {other for other, _ in imports(path)} - {room}
  for floor in FLOORS:
    for one in floor:
      for other in known[one] & floor:
        assert one not in known[other], f"{one} and {other} import each other"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_is_a_parser_and_a_main(name):
  text = (ROOT / f"{name}.py").read_text()
  functions = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
  assert {"main", "command"} <= functions
  assert text.count("\n") <= 80
  importers = [p for room, p in rooms() if name in {n for n, _ in imports(p)}]
  assert not importers, f"a command is no library: {importers}"


def test_functions_are_short_and_annotated():
  long, arguments, annotated = [], 0, 0
  for path in ROOT.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        if node.end_lineno - node.lineno >= 40:
          long.append(f"{path.relative_to(ROOT)}:{node.name}")
        own = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        own = [arg for arg in own if arg.arg not in ("self", "cls")]
        arguments += len(own)
        annotated += sum(arg.annotation is not None for arg in own)
  assert len(long) <= 4, long
  assert annotated >= 0.95 * arguments


def test_the_configurations_type_stays_with_who_reads_it():
  """Libraries take the frozen sections (`config.schema`), not what users write."""
  takers = [
    f"{path.relative_to(ROOT)}:{node.name}"
    for room, path in rooms()
    if room != "config" and room not in COMMANDS
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and "ConfigDict" in ast.dump(node.args)
  ]
  assert len(takers) <= 4, takers
