"""The report page in a real browser: it draws, reacts to the pointer and reports no error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.unit.report.test_page import make_run, with_a_task, written

# --- a real browser -------------------------------------------------------------------------------------------------

CHECK = """
<script>
addEventListener("load", () => {
  const seen = {}, problems = [];
  for (const axis of ["step", "tokens", "flops", "hours"]) {
    document.getElementById("axis-" + axis).click();
    seen[axis] = [...document.querySelectorAll("section.panel")].map((one) =>
      [one.id, one.querySelectorAll("path, polygon, circle").length, one.querySelectorAll("canvas").length]);
    const bad = [...document.querySelectorAll("svg *")].filter((one) =>
      [...one.attributes].some((a) => /NaN|undefined/.test(a.value)));
    if (bad.length) problems.push(axis + ": " + bad[0].outerHTML.slice(0, 200));
  }
  const plot = document.querySelector("#chart-loss .plot"), box = plot.getBoundingClientRect();
  const at = (type, share) => plot.dispatchEvent(new PointerEvent(type,
    { clientX: box.left + share * box.width, clientY: box.top + 50, pointerId: 1, bubbles: true }));
  plot.setPointerCapture = () => {};
  at("pointermove", 0.5);
  const told = document.querySelector(".tip").textContent;
  at("pointerdown", 0.3); at("pointermove", 0.6); at("pointerup", 0.6);
  const zoomed = !document.querySelector("#tools button:disabled");
  document.querySelector("#chart-loss .legend button").click();
  const slider = document.querySelector("#chart-experts input[type=range]");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  const first = document.querySelector("#chart-experts .tools").textContent;
  for (const panel of ["experts", "layers-over-time"]) {
    const number = document.querySelectorAll("#chart-" + panel + " .choice button").length;
    for (let i = 0; i < number; i++) {
      document.querySelectorAll("#chart-" + panel + " .choice button")[i].click();
      if (!document.querySelector("#chart-" + panel + " canvas")) problems.push(panel + " " + i);
    }
  }
  // Records of layers that hold nothing, and pauses of a long run.
  const parts = document.body.appendChild(document.createElement("div"));
  DATA.runs.push({ ...DATA.runs[0], layers: [{ step: 1, attempt: 1, layers: { 1: {} } }] });
  const empty = new LayersView(parts);
  empty.run = empty.runs[1];
  empty.record = 0;
  empty.draw();
  const said = parts.textContent, chosen = parts.querySelectorAll("select").length;
  DATA.runs.pop();
  state.zoom = null;
  const line = { run: 0, group: 0, label: "saves", colour: 0, points: true, joined: false, mark: 0,
    mean: [2, 1, 1], low: [0, 1, 0.5], high: [30, 1, 2] };
  const spec = { name: "stems", section: "", title: "", unit: "", note: "", log: true, lines: [line], levels: [] };
  const stalls = new Chart(spec, parts);
  stalls.draw();
  const stems = parts.querySelector("path.stems").getAttribute("d").split("M").slice(1).map((d) => {
    const [x, from, to] = d.split(/[,V]/).map(Number);
    return [from > to, from === stalls.box.bottom, Math.abs(to - stalls.sy(30)) < 0.1];
  });
  parts.remove();
  // The names of columns: the first and the last always, never too close.
  const steps = (n) => Array.from({ length: n }, (_, i) => String(1000 * i));
  const columns = [[3, 40], [60, 17], [2, 4], [1, 4]].map(([n, width]) => labelled(steps(n), width));
  document.getElementById("axis-step").click();
  const named = document.querySelector("#chart-layers-over-time canvas").dataset.columns;
  const guesses = [...document.querySelectorAll("#chart-accuracy_which line.level")].map((one) =>
    ["x1", "x2", "y1"].map((name) => Number(one.getAttribute(name))));
  const legend = document.querySelector("#chart-accuracy_which .legend").textContent;
  document.querySelector("[data-theme]").dataset.theme = "dark";
  const ready = document.documentElement.dataset.ready;
  const drawn = { stems, columns, named, guesses, legend };
  document.title = JSON.stringify({ seen, problems, told, zoomed, first, ready, said, chosen, ...drawn });
});
</script></body>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium: apt-get install -y --no-install-recommends chromium")
    return found


def opened(chromium: str, file: Path) -> subprocess.CompletedProcess[str]:
    """A page as a browser without a network builds it, and what it logs."""
    looks = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,900")
    logs = (f"--user-data-dir={file.parent / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000")
    command = [chromium, *looks, *logs, "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def test_steps_have_no_halves(chromium: str, tmp_path: Path) -> None:
    """A short run has fewer steps than a wide chart has room for ticks."""
    file = tmp_path / "report.html"
    file.write_text(written([make_run(tmp_path / "run", steps=3)], file))
    (chart,) = re.findall(r'id="chart-lr".*?</svg>', opened(chromium, file).stdout, re.DOTALL)
    assert re.findall(r'text-anchor="(?:middle|end)"[^>]*>([^<]*)<', chart)[-3:] == ["1", "2", "3"]


def test_in_a_browser(chromium: str, tmp_path: Path) -> None:
    """Every figure is drawn against every axis, the mouse works, no name is looked up, no error is logged."""
    runs = [with_a_task(make_run(tmp_path / "run", resumed_at=20))]
    file = tmp_path / "report.html"
    file.write_text(written(runs, file).replace("</body>", CHECK))
    ended = opened(chromium, file)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    title = re.search(r"<title>(.*?)</title>", ended.stdout, re.DOTALL)
    assert title is not None
    found = json.loads(title[1].replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    assert found["ready"] == "yes" and found["problems"] == [] and found["zoomed"]
    assert "step" in found["told"] or "min" in found["told"] or " s" in found["told"]
    assert "text, held out (causal routing) 1.625" in found["told"]
    assert "step 10" in found["first"]
    assert "Nothing but empty records in layers.jsonl." in found["said"] and found["chosen"] == 1
    assert found["stems"] == [[True, True, True], [True, False, False]]  # nothing from 1 to 1; 0 has no logarithm
    few, many, narrow, single = found["columns"]
    assert (few, narrow, single) == ([0, 1, 2], [1], [0])
    assert many[0] == 0 and many[-1] == 59 and set(np.diff(many)) == {3, 4}  # 3 columns are as wide as 59000
    assert found["named"].split() == ["10", "20", "30"]  # one record each
    (x1, x2, low), (x3, x4, high) = found["guesses"]
    assert x1 < x2 == x3 < x4 and high < low  # 0.25 is drawn above 0.1, from step 20 on
    assert found["legend"].count("guessing") == 1
    for axis, panels in found["seen"].items():
        drawn = {name: (shapes, maps) for name, shapes, maps in panels}
        assert {"chart-loss", "chart-lr", "chart-stalls", "chart-unrouted", "chart-depth", "timeline-0"} <= set(drawn)
        empty = {name for name, (shapes, maps) in drawn.items() if not shapes and not maps}
        assert empty == {"chart-model_tflops_per_rank", "chart-stalls"}, axis  # what the run did not measure
        assert drawn["chart-experts"][1] == 2 and drawn["chart-layers-over-time"][1] == 1
