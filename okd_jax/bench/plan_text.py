"""A plan as people read it: narrow tables, the answer first."""

from collections.abc import Iterable, Sequence
from typing import Any

from okd_jax.bench.planning import Planned
from okd_jax.bench.roofline import Sent

_GB = 1e9
_KEPT = ("arguments", "total")  # sums of the others


def text(about: dict[str, Any], plans: Sequence[Planned], chosen: Planned) -> str:
  """The whole page.

  plans: of a search, the best first; else the one that was asked for.
  """
  parts = [_head(about)]
  if len(plans) > 1:
    parts.append(_ranking(plans))
  parts += [_answer(about, chosen), _memory(about, chosen), _operations(about, chosen)]
  parts += [_collectives(chosen.sent), _times(chosen)]
  parts.append("not in the plan: " + "; ".join(about["not_planned"]))
  return "\n\n".join(parts)


def _head(about: dict[str, Any]) -> str:
  sizes = ", ".join(f"{n} {_count(s)}" for n, s in about["models"].items())
  chip = about["chip"]
  rows = {
    "method": f"{about['method']}, {about['dtype']}",
    "weights": sizes,
    "step": f"{about['rows']} rows of {about['length']} tokens",
    "hardware": f"{about['topology']}, {about['devices']} devices",
    "a device": f"{chip['flops'] / 1e12:.0f} TFLOP/s, {chip['hbm'] / _GB:.1f} GB at "
    f"{chip['hbm_rate'] / _GB:.0f} GB/s",
  }
  return _pairs(rows)


def _answer(about: dict[str, Any], plan: Planned) -> str:
  total, room = plan.memory["total"] / _GB, about["chip"]["hbm"] / _GB
  said = "fits" if plan.fits else "DOES NOT FIT"
  lines = [f"{plan.layout}: {said}, {total:.2f} of {room:.1f} GB a device"]
  lines.append(f"by the {plan.by}" if plan.by == "compiler" else "by arithmetic alone")
  if plan.compile_s:
    lines[-1] += f", compiled in {plan.compile_s:.0f} s"
  if plan.error:
    lines.append(f"the compiler says: {plan.error}; the figures are arithmetic")
  return "\n".join([*lines, *plan.layout.flags().split(" ")])


def _memory(about: dict[str, Any], plan: Planned) -> str:
  rows = [
    (name, f"{size / _GB:.3f}")
    for name, size in plan.memory.items()
    if name not in _KEPT
  ]
  rows.append(("total", f"{plan.memory['total'] / _GB:.3f}"))
  rows.append(("of a device's", f"{about['chip']['hbm'] / _GB:.3f}"))
  return _table(("memory a device", "GB"), rows)


def _operations(about: dict[str, Any], plan: Planned) -> str:
  tokens, parts = about["tokens"], plan.useful
  rows = [
    (name, f"{count / 1e12:.2f}", f"{count / tokens / 1e9:.3f}")
    for name, count in (parts | {"in all": sum(parts.values())}).items()
  ]
  return _table(("useful operations", "TFLOP a step", "GFLOP a token"), rows)


def _collectives(sent: Sequence[Sent]) -> str:
  if not sent:
    return "no collectives"
  groups: dict[tuple[str, str, bool, bool | None], list[Sent]] = {}
  for each in sent:
    alike = (each.kind, each.axes or "?", each.in_loop, each.apart)
    groups.setdefault(alike, []).append(each)
  rows = []
  for (kind, axes, loop, apart), members in groups.items():
    calls = sum(each.times for each in members)
    size = sum(each.bytes * each.times for each in members)
    largest = max(each.bytes for each in members)
    where = "loop" if loop else "once"
    where += {True: ", beside work", False: "", None: ""}[apart]
    figures = (str(calls), f"{largest / 1e6:.2f}", f"{size / 1e6:.1f}")
    rows.append((kind, axes, where, *figures))
  heads = ("collective", "axes", "where", "calls", "largest MB", "all MB")
  return _table(heads, rows) + "\n\n" + _largest(sent)


def _largest(sent: Sequence[Sent], most: int = 6) -> str:
  """The calls that send most, and what they are for."""
  rows = [
    (each.kind, each.axes, f"{each.times} x {each.bytes / 1e6:.2f}", each.what[:40])
    for each in sent[:most]
  ]
  return _table(("most of all", "axes", "calls x MB", "for"), rows)


def _times(plan: Planned) -> str:
  found = plan.roofline
  parts = [n for n in ("compute", "hbm", "link", "link_waited") if f"{n}_s" in found]
  rows = [(n.replace("_", " "), f"{1e3 * found[f'{n}_s']:.1f}") for n in parts]
  parts = _table(("a step's", "ms"), rows)
  rows = [
    (
      name.replace("_", " "),
      f"{1e3 * found[f'step_{name}_s']:.1f}",
      f"{found[f'mfu_{name}']:.3f}",
      f"{found[f'tokens_per_s_{name}']:.0f}",
    )
    for name in ("overlapped", "scheduled", "in_turn")
    if f"step_{name}_s" in found
  ]
  return parts + "\n\n" + _table(("if all is", "ms a step", "MFU", "tokens/s"), rows)


def _ranking(plans: Sequence[Planned], most: int = 12) -> str:
  rows = []
  for plan in plans[:most]:
    found = plan.roofline
    rows.append(
      (
        str(plan.layout),
        "compiled" if plan.by == "compiler" else "",
        f"{plan.memory['total'] / _GB:.1f}" + ("" if plan.fits else "!"),
        f"{1e3 * found['step_overlapped_s']:.0f}",
        f"{1e3 * found['step_in_turn_s']:.0f}",
        f"{found['mfu_overlapped']:.2f}",
      )
    )
  heads = ("layout (of the best)", "", "GB", "ms", "in turn", "MFU")
  rest = f"\n… and {len(plans) - most} more" if len(plans) > most else ""
  return _table(heads, rows) + rest + "\n! does not fit"


def _pairs(rows: dict[str, str]) -> str:
  width = max(map(len, rows))
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Columns as wide as they must be; figures to the right."""
  rows = [heads, *rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
  lines = []
  for row in rows:
    cells = [
      f"{cell:>{w}}" if _right(rows, i) else f"{cell:<{w}}"
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  lines.insert(1, "  ".join("-" * w for w in widths))
  return "\n".join(lines)


def _right(rows: Sequence[Sequence[str]], column: int) -> bool:
  return all(row[column][:1].isdigit() for row in rows[1:])


def _count(size: int) -> str:
  return f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.1f} M"
