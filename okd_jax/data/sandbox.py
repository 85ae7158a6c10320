"""Templates of strangers, with limits: on steps, on what they make, and on time.

jinja2's sandbox keeps a template from what is not its own, but lets it run for ever and
fill the memory: by loops, by 'a' * 10**10, by a text that is doubled forty times, by
lists that hold one another. Here whatever repeats or makes something is counted: loops,
calls, filters, operators, literals and what is joined. All limits are far beyond what a
conversation needs, and none depends on the machine but the last, of processor time.

It works in any thread and process, since nothing is interrupted from outside: no single
operation is let in that could take long.
"""

import contextlib
import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes, sandbox
from jinja2.visitor import NodeTransformer

from okd_jax.errors import UserError

SOURCE = 1 << 18  # characters of a template; published ones have some 10,000
STEPS = 2_000_000  # turns of loops, calls, values that are looked at
MADE = 1 << 29  # bytes of all that comes into being, whether it is kept or not
LONGEST = 1 << 22  # characters of a text, or elements of a list
SECONDS = 10.0  # of the thread's own processor time, so that others' work is no matter
_NUMBER = 1 << 16  # bits
_ELEMENT = 80  # bytes that one of a list takes with its list's place for it
_INDENT = 16
_WIDE = re.compile(r"%(?:\([^()]*\))?[-#0 +]*(?:\*|\d{5}|\d*\.(?:\*|\d{5}))")
_FORMAT = re.compile(r"[:{][^{}]*(?:\d{5}|\{)")  # a width of '{:99999}' or '{:{n}}'
_VIEWS = (type({}.items()), type({}.keys()), type({}.values()))
_NESTED = (list, tuple, dict, set, frozenset, *_VIEWS)
# Filters that leave what is inside their argument alone, and tests that do not.
_SHALLOW = {"length", "count", "first", "last", "list", "items", "default", "d"}
_SHALLOW |= {"map", "select", "reject", "selectattr", "rejectattr", "attr", "reverse"}
_DEEP_TESTS = ("eq", "ne", "lt", "le", "gt", "ge", "in", "sameas", "==", "!=")
_DEEP_TESTS += ("<", "<=", ">", ">=", "equalto", "lessthan", "greaterthan")
# What a text can do that makes none longer than it is, and what is looked at first.
_PLAIN = {"capitalize", "casefold", "count", "endswith", "find", "format", "format_map"}
_PLAIN |= {"index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower"}
_PLAIN |= {"isnumeric", "isspace", "istitle", "isupper", "lower", "lstrip", "partition"}
_PLAIN |= {"removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit"}
_PLAIN |= {"rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title"}
_PLAIN |= {"upper", "center", "ljust", "rjust", "zfill", "replace", "join"}


class _Budget:
  """What one call of a template may still do."""

  def __init__(self) -> None:
    self.steps, self.made, self.until = STEPS, MADE, time.thread_time() + SECONDS

  def spend(self, steps: int, made: int = 0) -> None:
    """Takes steps and bytes off; a TemplateError once one of the three is used up."""
    self.steps -= steps
    self.made -= made
    if self.steps < 0:
      raise jinja2.TemplateError(f"it takes more than {STEPS:,} steps")
    if self.made < 0:
      raise jinja2.TemplateError(f"it makes more than {MADE >> 20} MB")
    if self.steps % 256 == 0 and time.thread_time() > self.until:
      raise jinja2.TemplateError(f"it takes more than {SECONDS:g} s")


_BUDGET: contextvars.ContextVar[_Budget | None]
_BUDGET = contextvars.ContextVar("budget", default=None)


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
  """Within, templates have one budget; whatever they raise is a UserError.

  what: the template and, if need be, the row, for messages.
  """
  token = _BUDGET.set(_Budget())
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # a stranger's program: there is no common class
    said = " ".join(str(error).split())[:200]
    kind = type(error).__name__
    known = isinstance(error, jinja2.TemplateError) and said
    raise UserError(f"{what} ({said if known else f'{kind}: {said}'})") from error
  finally:
    _BUDGET.reset(token)


def _spend(steps: int, made: int = 0) -> None:
  budget = _BUDGET.get()
  if budget is not None:  # else the environment itself is being made
    budget.spend(steps, made)


def weighed(value: Any) -> Any:
  """The value, after all that is in it, as often as it is, has been counted."""
  _weight(value)
  return value


def _weight(value: Any) -> int:
  """Characters of a value written out, at least; what is twice in it counts twice."""
  if isinstance(value, str):
    _spend(1, len(value))
    return len(value)
  total, rest = 0, [(value, 0)]
  while rest:
    one, depth = rest.pop()
    total += depth + (len(one) if isinstance(one, str) else 1)
    _spend(1 + depth // 8, len(one) if isinstance(one, str) else 8)
    if isinstance(one, dict):
      rest += [(x, depth + 1) for pair in one.items() for x in pair]
    elif isinstance(one, _NESTED):
      rest += [(x, depth + 1) for x in one]
  return total


def _fits(size: int, what: str) -> None:
  """An error for what would be too long, before it is made."""
  if size > LONGEST:
    raise jinja2.TemplateError(f"{what} would be {size:,} long")
  _spend(1, size)


def made(value: Any) -> Any:
  """The value, paid for as something new."""
  if isinstance(value, str | bytes):
    _fits(len(value), "a text")
  elif isinstance(value, _NESTED):
    _fits(len(value), "a list")
    _spend(1, _ELEMENT * len(value))
  return value


def counted(values: Iterable[Any]) -> Iterable[Any]:
  """The values, each turn of a loop over them paid for."""
  if isinstance(values, str | list | tuple | dict | range | Mapping | Sequence):
    _spend(1 + len(values))
    return values
  return _one_by_one(values)


def _one_by_one(values: Iterable[Any]) -> Iterator[Any]:
  for value in values:
    _spend(1)
    yield made(value)


class _Counting(NodeTransformer):
  """Puts a filter around whatever the sandbox has no hook for."""

  def visit_For(self, node: nodes.For) -> nodes.For:
    self.generic_visit(node)
    node.iter = _around(node.iter, "counted")
    return node

  def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
    self.generic_visit(node)
    parts = nodes.List(node.nodes, lineno=node.lineno)
    return _around(parts, "concatenated")

  def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
    self.generic_visit(node)
    node.expr = _around(node.expr, "weighed")
    for operand in node.ops:
      operand.expr = _around(operand.expr, "weighed")
    return node

  def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
    self.generic_visit(node)
    return _around(node, "made") if isinstance(node.arg, nodes.Slice) else node

  def visit_List(self, node: nodes.List) -> nodes.Filter:
    self.generic_visit(node)
    return _around(node, "made")

  def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
    self.generic_visit(node)
    return _around(node, "made")


def _around(node: nodes.Expr, name: str) -> nodes.Expr:
  # No template can name it so.
  return nodes.Filter(node, f"{name}!", [], [], None, None, lineno=node.lineno)


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
  """jinja2's sandbox, all of whose templates count what they do."""

  intercepted_binops = frozenset("+ * ** %".split())

  def __init__(self, **options: Any) -> None:  # jinja2's own
    super().__init__(optimized=False, finalize=weighed, **options)
    del self.globals["lipsum"]  # makes as much text as it is asked for
    self.filters = {k: _filter(k, f) for k, f in self.filters.items()}
    self.tests = {k: _test(f) if k in _DEEP_TESTS else f for k, f in self.tests.items()}
    ours = {"weighed": weighed, "made": made, "counted": counted}
    ours["concatenated"] = lambda parts: self.concat(map(str, weighed(parts)))
    self.filters |= {f"{name}!": function for name, function in ours.items()}

  def template(self, source: str, what: str) -> jinja2.Template:
    """A template of this text.

    Raises:
      UserError: for text that is none; `what` begins the sentence.
    """
    with limited(what):
      if len(source) > SOURCE:
        raise jinja2.TemplateError(f"it is longer than {SOURCE:,} characters")
      return self.from_string(_Counting().visit(self.parse(source)))

  def add_filter(self, name: str, function: Callable[..., Any]) -> None:
    """A filter of our own, counted as the others are."""
    self.filters[name] = _filter(name, function)

  def concat(self, parts: Iterable[str]) -> str:
    """The parts as one text: of a macro, a block, or all that a template writes."""
    found, size = [], 0
    for part in parts:
      found.append(part)
      size += len(part)
      _spend(1)
      if size > LONGEST:
        _fits(size, "a text")
    _fits(size, "a text")
    return "".join(found)

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    """As in the base class, where the result is of a size that can be borne."""
    match operator:
      case "%" if isinstance(left, str):
        _check_formatted(left, _WIDE, right)
      case "*" | "**" if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length()
        _check_bits(bits + right.bit_length())
      case "*":
        for one, other in ((left, right), (right, left)):
          if isinstance(one, str | list | tuple | bytes) and isinstance(other, int):
            _fits(len(one) * max(other, 0), "a text or a list")
      case "+" if isinstance(left, str | list | tuple) and isinstance(
        right, type(left)
      ):
        _fits(len(left) + len(right), "a text or a list")
    return made(super().call_binop(context, operator, left, right))

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    """As in the base class; what texts and numbers do is of a known size, too."""
    if isinstance(obj, str) and attr not in _PLAIN:
      return False
    if isinstance(obj, int | float | bytes) and callable(value):
      return False
    return super().is_safe_attribute(obj, attr, value)

  def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
    """As in the base class, with a look at the text first."""
    inner = super().wrap_str_format(value)
    if inner is None:
      return None

    @functools.wraps(inner)
    def checked(*args: Any, **kwargs: Any) -> str:
      _check_formatted(value.__self__, _FORMAT, [args, kwargs])
      return inner(*args, **kwargs)

    return checked

  def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
    """As in the base class, paid for."""
    _spend(1)
    own = getattr(obj, "__self__", None)
    if isinstance(own, str):
      name = obj.__name__
      _check_arguments(name, (own, *args), kwargs)
      if name == "join" and args:
        args = ([*counted(args[0])], *args[1:])
        _fits(_weight(args[0]) + len(own) * len(args[0]), "a text")
    return made(super().call(context, obj, *args, **kwargs))


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """A filter whose arguments are looked at, and whose result is paid for."""
  first = 1 if getattr(function, "jinja_pass_arg", None) else 0  # jinja2's mark

  @functools.wraps(function)
  def checked(*args: Any, **kwargs: Any) -> Any:
    """The filter's result; a TemplateError where it would be too much."""
    _spend(1)
    ours, own = args[:first], list(args[first:])
    if own and isinstance(own[0], Iterator):
      own[0] = _one_by_one(own[0]) if name in _SHALLOW else [*_one_by_one(own[0])]
    if name not in _SHALLOW:
      for value in (*own, *kwargs.values()):
        _weight(value)
    _check_arguments(name, own, kwargs)
    return made(function(*ours, *own, **kwargs))

  return checked


def _test(function: Callable[..., bool]) -> Callable[..., bool]:
  @functools.wraps(function)
  def checked(*args: Any) -> bool:
    """The test's answer, its arguments paid for."""
    return function(*map(weighed, args))

  return checked


def _check_arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
  """An error for a filter or a text's method that would make too much."""
  values = (*args[1:], *kwargs.values())
  numbers = [x for x in values if isinstance(x, int)]
  texts = [len(x) for x in values if isinstance(x, str)]
  for number in numbers:
    _fits(abs(number), f"{name!r}")
  own = str(args[0]) if args and isinstance(args[0], str) else ""
  match name:
    case "replace" if len(values) > 1 and isinstance(values[0], str):
      _fits(len(own) + own.count(values[0]) * max(texts, default=0), "a text")
    case "indent" | "wordwrap":
      lines = own.count("\n") + 1
      if name == "wordwrap":
        lines += len(own) // max(1, *numbers[:1], 1)
      _fits(len(own) + lines * max([4, *texts, *map(abs, numbers)]), "a text")
    case "join" if args and isinstance(args[0], list | tuple):
      _fits(len(args[0]) * max(texts, default=0), "a text")
    case "tojson" if any(number > _INDENT for number in numbers):
      raise jinja2.TemplateError(f"tojson indents by more than {_INDENT}")
    case "format":
      _check_formatted(own, _WIDE, [args[1:], kwargs])
    case "sum" if any(isinstance(x, _NESTED) for x in values):
      raise jinja2.TemplateError("sum adds numbers alone")


def _check_formatted(text: str, wide: re.Pattern, values: Any) -> None:
  """An error for a format whose widths or values are too long."""
  if wide.search(text):
    raise jinja2.TemplateError(f"the format {text[:40]!r} is too wide")
  places = text.count("%") + text.count("{")
  _fits(len(text) + places * _weight(values), "a text")


def _check_bits(bits: int) -> None:
  if bits > _NUMBER:
    raise jinja2.TemplateError(f"a number would have {bits:,} bits")


def rendered(template: jinja2.Template, values: Mapping[str, Any], what: str) -> str:
  """What a template writes; a UserError that begins with `what` where it fails."""
  with limited(what):
    return template.render(values)
