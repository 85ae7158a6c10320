"""A configuration from a recipe and from --config.key=value, or from a dict of keys."""

import contextlib
import difflib
import importlib
import inspect
import json
import logging
import os
import re
import runpy
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from okd_jax.errors import UserError
from okd_jax.runtime.files import local, read_json

_log = logging.getLogger(__name__)

_WRONG = (flags.Error, AttributeError, KeyError, TypeError, ValueError)
_OPEN = ("teachers", "data.columns")  # sections whose keys are anybody's
_SOURCES = ("data.train", "data.eval")  # text, or a list of it
_PREFIXES = tuple(f"{section}." for section in _OPEN)
_WORD = r"\d*[a-zA-Z_][\w-]*"  # and no number
_SEVERAL = re.compile(rf"[\[(]? *({_WORD} *, *)+{_WORD} *[\])]?")
_PACKAGE = "configs"  # what recipes import their neighbours from


def read(arguments: list[str]) -> ConfigDict:
  """The locked configuration that these flags describe; there may be no others.

  --config=FILE.py[:VARIANT] is a recipe, or NAME[:VARIANT] one of those that come with
  the package.

  Raises:
    UserError: for a missing file, a key that does not exist, or a wrong value.
  """
  given = _given(arguments)
  if not given.get("config"):
    raise UserError("--config=RECIPE is needed (see --help)")
  return parsed(load_recipe(given.pop("config")), arguments)


def parsed(config: ConfigDict, arguments: list[str]) -> ConfigDict:
  """The configuration with --config.key=value … of the arguments, in place.

  Raises:
    UserError: as `read` does.
  """
  given = _given(arguments)
  given.pop("config", None)
  changes = {name.removeprefix("config."): text for name, text in given.items()}
  return _finished(config, changes, _parsed)


def from_keys(changes: Mapping[str, Any], recipe: str = "default") -> ConfigDict:
  """The locked configuration of a recipe with some keys set, 'train.steps' for one.

  Raises:
    UserError: as `read` does.
  """
  return changed(load_recipe(recipe), changes)


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  """The configuration with some keys set, 'train.steps' for one; changes it in place.

  Raises:
    UserError: as `read` does.
  """
  return _finished(config, changes, _assigned)


def load_recipe(spec: str) -> ConfigDict:
  """What a recipe's get_config returns, its method file's knobs among the keys.

  spec: FILE.py[:VARIANT], or NAME[:VARIANT] of a shipped one.

  Raises:
    UserError: if there is no such recipe or variant, or it fails.
  """
  return run_recipe(spec)[0]


def run_recipe(spec: str) -> tuple[ConfigDict, dict[str, Any]]:
  """What a recipe's get_config returns, and all names that the recipe defines.

  Raises:
    UserError: as `load_recipe` does.
  """
  name, _, variant = spec.partition(":")
  path = _recipe_path(name)
  with _neighbours(path.parent):
    try:
      names = runpy.run_path(str(path))
      get_config = names["get_config"]
      takes_variant = bool(inspect.signature(get_config).parameters)
      if variant and not takes_variant:
        raise UserError("it has no variants")
      config = get_config(variant) if variant else get_config()
    except Exception as error:  # a recipe is Python: whatever it raises
      reason = str(error).strip().splitlines() or [type(error).__name__]
      raise UserError(f"{spec}: {reason[-1]}") from error
  config.lock()
  return config, names


def defaults() -> ConfigDict:
  """configs/default.py, as it is."""
  return load_recipe("default")


def recipes() -> Path:
  """The folder of the recipes that come with the package."""
  here = Path(__file__).parents[1]
  installed, checkout = here / "configs", here.parent / "configs"
  return installed if installed.is_dir() else checkout


def saved(path: Path) -> ConfigDict:
  """A workdir's config.json; keys younger than the run have their defaults.

  Raises:
    UserError: if it is damaged.
  """
  try:
    values = read_json(path)
  except UserError as error:
    raise UserError(f"{error}; the file is damaged: name another workdir") from error
  config = ConfigDict(filled(values))
  if file := config.method.file:
    _check_own(file, path)
    _methods().load_file(file)
  return config


def _check_own(file: str, path: Path) -> None:
  """Raises a UserError for a method file that came with the workdir itself.

  It is run; whoever got the workdir from somebody else would run that person's.
  """
  place, workdir = local(file), path.parent.resolve()
  if not place.is_absolute() or place.resolve().is_relative_to(workdir):
    raise UserError(
      f"{path}: method.file={file} lies in the workdir, from which no program is run; "
      "move the file elsewhere and write its new path into config.json"
    )


def _methods() -> types.ModuleType:
  """The registry: imported here, since --help and wrong keys do without JAX."""
  return importlib.import_module("okd_jax.methods")


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
  """A run's configuration; keys younger than the run have their defaults."""
  return _filled(dict(values), json.loads(json.dumps(defaults().to_dict())))


def _filled(values: Any, known: Any) -> Any:
  """`values`, where these lack a key with that of `known`."""
  if not (isinstance(values, dict) and isinstance(known, dict)):
    return values
  both = {key: _filled(value, known.get(key)) for key, value in values.items()}
  return known | both


def _given(arguments: list[str]) -> dict[str, str]:
  """{'config': recipe, 'config.key': value}; '--config X' is '--config=X'."""
  joined = []
  for argument in arguments:
    if joined and joined[-1].startswith("--config") and "=" not in joined[-1]:
      if not argument.startswith("-"):
        joined[-1] += f"={argument}"
        continue
    joined.append(argument)
  names = [argument.lstrip("-").partition("=")[0] for argument in joined]
  foreign = [
    argument
    for argument, name in zip(joined, names, strict=True)
    if not (name == "config" or name.startswith(("config.", "noconfig.")))
  ]
  if foreign:
    raise UserError(f"unexpected arguments {' '.join(foreign)} (see --help)")
  given = {}
  for name, argument in zip(names, joined, strict=True):
    _, equals, value = argument.partition("=")
    if name.startswith("noconfig."):
      name, equals, value = name.removeprefix("no"), "=", "False"
    given[name] = value if equals else "True"
  return given


def _recipe_path(name: str) -> Path:
  path = local(name)
  if path.is_file():
    return path
  shipped = recipes() / f"{name.removesuffix('.py').removeprefix('configs/')}.py"
  if shipped.is_file():
    return shipped
  known = sorted(p.relative_to(recipes()).as_posix() for p in recipes().rglob("*.py"))
  names = [other.removesuffix(".py") for other in known]
  raise UserError(
    f"--config={name}: there is no such file, and the recipes that come with the "
    f"package are {', '.join(names)}"
  )


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
  """While a recipe runs, `configs` is the package of recipes and no other."""
  package = types.ModuleType(_PACKAGE)
  package.__path__ = [str(recipes()), str(folder)]
  other = _take(_PACKAGE)
  sys.modules[_PACKAGE] = package
  sys.path.insert(0, str(folder))
  try:
    yield
  finally:
    sys.path.remove(str(folder))
    _take(_PACKAGE)
    sys.modules.update(other)


def _take(package: str) -> dict[str, types.ModuleType]:
  """Takes a package and its modules out of those that are loaded."""
  names = [n for n in sys.modules if n == package or n.startswith(f"{package}.")]
  return {name: sys.modules.pop(name) for name in names}


def _finished(config: ConfigDict, changes: Mapping[str, Any], apply: Any) -> ConfigDict:
  """The recipe with the changes applied, its method's own knobs and new teachers."""
  changes = _opened(changes)
  if file := changes.get("method.file", config.method.file):
    # Whole, so that the run can be resumed and exported from any folder.
    changes["method.file"] = str(local(file).resolve())
    add_method_file(config, changes["method.file"])
  named = {k: changes.pop(k) for k in list(changes) if k.startswith(_PREFIXES)}
  sources = {k: _fspath(changes.pop(k, _value(config, k))) for k in _SOURCES}
  for name in changes:
    _check_key(name, config)
  config = apply(config, changes)
  # Not as flags, which would take a folder called 2024 for a number.
  with config.ignore_type():
    config.update_from_flattened_dict(sources)
  # New names, which no flag can have.
  with config.unlocked():
    for key, value in named.items():
      section = next(x for x in _OPEN if key.startswith(f"{x}."))
      _value(config, section)[key.removeprefix(f"{section}.")] = str(value)
  if any(key.startswith(("method.", "adapter.")) for key in changes):
    _leave_behind(config, changes)
  return config


def _opened(changes: Mapping[str, Any]) -> dict[str, Any]:
  """The changes, an open section that is given whole as its keys one by one."""
  found = {}
  for key, value in changes.items():
    if key in _OPEN and isinstance(value, Mapping):
      found |= {f"{key}.{name}": one for name, one in value.items()}
    else:
      found[key] = value
  return found


def _fspath(value: Any) -> Any:
  """Paths as text, in a list or alone; whatever else is left for the checks."""
  if isinstance(value, list | tuple):
    return [_fspath(one) for one in value]
  return os.fspath(value) if isinstance(value, os.PathLike) else value


def add_method_file(config: ConfigDict, file: str) -> None:
  """Runs a file of somebody's methods and adds what their knobs are to `config`."""
  methods = _methods()
  methods.load_file(file)
  ours, section = defaults().method, config.method
  theirs = {k: v for k, v in methods.defaults().items() if k not in ours}
  with config.unlocked():
    section.file = file
    for key, value in theirs.items():
      if key not in section:
        section[key] = value
      if isinstance(value, float) and key not in section.end:
        section.end[key] = config_dict.placeholder(float)


def _leave_behind(config: ConfigDict, changes: Mapping[str, Any]) -> None:
  """Gives knobs that the recipe set, for a method that is another now, their defaults.

  Only knobs that the new method does not read, and none that `changes` names.
  """
  methods = _methods()
  section, known = config.method, methods.defaults()
  left = methods.unread(section.name, section.to_dict(), config.adapter.kind)
  left = [key for key in left if f"method.{key}" not in changes]
  for key in left:
    if key.startswith("end."):
      section.end[key.removeprefix("end.")] = None
    else:
      section[key] = known[key]
  if left:
    names = ", ".join(f"method.{key}" for key in left)
    _log.info("%s: set by the recipe, not read by %s: left out", names, section.name)


def _parsed(config: ConfigDict, changes: Mapping[str, str]) -> ConfigDict:
  """Applies values as text, as flags do."""
  values = flags.FlagValues()
  texts = {k: _words(config, k, v) for k, v in changes.items()}
  arguments = [sys.argv[0], *(f"--config.{k}={v}" for k, v in texts.items())]
  try:
    holder = config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=arguments
    )
    values(arguments)
  except _WRONG as error:
    raise UserError(str(error).strip().splitlines()[-1]) from error
  return holder.value


def _words(config: ConfigDict, key: str, text: str) -> str:
  """Of a key that holds several: 'query,up' is ('query', 'up'), as people write it."""
  several = _SEVERAL.fullmatch(text.strip()) and key in keys(config)
  if not several or not isinstance(_value(config, key), tuple):
    return text
  return repr(tuple(word.strip() for word in text.strip("[]() ").split(",")))


def _assigned(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  """Applies values as they are."""
  for key, value in changes.items():
    value = value.item() if isinstance(value, np.generic) else value
    try:
      if value is None and _value(config, key) is not None:
        raise ValueError("it needs a value")
      config.update_from_flattened_dict({key: value})
    except _WRONG as error:
      raise UserError(f"{key}={value!r}: {str(error).splitlines()[0]}") from error
  return config


def _value(config: ConfigDict, path: str) -> Any:
  for key in path.split("."):
    config = config[key]
  return config


def _check_key(path: str, config: ConfigDict) -> None:
  """Raises a UserError that suggests the nearest key, unless there is this one."""
  section: Any = config
  for key in path.split("."):
    if not isinstance(section, ConfigDict) or key not in section:
      near = _nearest(path, list(keys(config)))
      hint = f"did you mean {near}?" if near else "okd_jax.main --help lists them all"
      raise UserError(f"--config.{path} is no configuration key; {hint}")
    section = section[key]


def keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
  """Every key, 'train.steps' for one."""
  for name, value in config.items(preserve_field_references=True):
    if isinstance(value, ConfigDict):
      yield from keys(value, f"{prefix}{name}.")
    else:
      yield prefix + name


def _nearest(path: str, known: list[str]) -> str:
  """'--config.KEY' of the key that was probably meant, '' if none is near."""
  section, _, name = path.rpartition(".")
  initials = "".join(word[:1] for word in name.split("_"))
  same = [key for key in known if key.rpartition(".")[2] in (name, initials)]
  # In the section that was named, else anywhere.
  same.sort(key=lambda key: (key.rpartition(".")[0] != section, len(key)))
  close = [
    *difflib.get_close_matches(path, known, n=1, cutoff=0.75),
    *(
      key
      for last in difflib.get_close_matches(
        name, [k.rpartition(".")[2] for k in known], n=1, cutoff=0.6
      )
      for key in known
      if key.rpartition(".")[2] == last
    ),
  ]
  close.sort(key=lambda key: key.rpartition(".")[0] != section)
  best = next(iter([*same, *close]), "")
  return best and f"--config.{best}"
