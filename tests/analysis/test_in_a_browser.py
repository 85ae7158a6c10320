"""The pages in Chromium: they open, and nothing of them is wider than the screen."""

import html
import json
import shutil
import subprocess

import comparing
import pytest
from reporting import keep, page, run, whole_run

from okd_jax.analysis import study_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
  pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
]
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
  --disable-background-networking --disable-component-update --disable-sync""".split()
# Each page in a frame as wide as a screen, and what a script finds in it.
LOOK = """<!doctype html><body>{frames}<script>
onload = () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const box = element => element.getBoundingClientRect();
    const wide = [...page.body.querySelectorAll("*")].filter(
      x => box(x).right > root.clientWidth + 1 && !x.closest("details, pre, svg"));
    return {{
      width: root.clientWidth, scroll: root.scrollWidth,
      wide: wide.map(x => x.outerHTML.slice(0, 80)),
      charts: page.querySelectorAll("figure svg").length,
      lefts: [...new Set([...page.querySelectorAll("h2, figure, table, .sample, dl")]
        .filter(x => x.checkVisibility() && !x.closest("details"))
        .map(x => Math.round(box(x).left)))],
      text: page.body.innerText,
    }};
  }});
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = JSON.stringify(found);
  document.body.replaceChildren(out);
}};
</script>"""


def look(tmp_path, text, widths):
  """What a browser makes of the page at each width."""
  frames = "".join(
    f'<iframe style="border:0" width="{w}" height="900" srcdoc="{html.escape(text)}">'
    "</iframe>"
    for w in widths
  )
  outer = tmp_path / "outer.html"
  outer.write_text(LOOK.format(frames=frames), encoding="utf8")
  profile = f"--user-data-dir={tmp_path / 'profile'}"
  command = [CHROMIUM, *FLAGS, profile, "--dump-dom", outer.as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  found = done.stdout.partition('<pre id="found">')[2].partition("</pre>")[0]
  return json.loads(html.unescape(found))


def test_a_runs_report(tmp_path):
  text = page(keep(run(tmp_path / "run", whole_run())))
  phone, desk = look(tmp_path, text, (390, 1200))
  for seen in (phone, desk):
    assert seen["scroll"] <= seen["width"] and not seen["wide"], seen["wide"]
    assert seen["charts"] == text.count("<svg") > 2
    assert "Sample answers" in seen["text"] and "student, step 20" in seen["text"]
  assert len(phone["lefts"]) == 1  # one grid: all begins at the same edge


def test_a_studys_report(tmp_path):
  plan = comparing.plan()
  study_report.write(plan, comparing.found(plan), tmp_path)
  text = (tmp_path / "report.html").read_text(encoding="utf8")
  phone, desk = look(tmp_path, text, (390, 1200))
  for seen in (phone, desk):
    assert seen["scroll"] <= seen["width"] and not seen["wide"], seen["wide"]
    assert seen["charts"] == text.count("<svg") > 1
    assert "no difference" in seen["text"]
  assert len(phone["lefts"]) == 1
