"""What a page's texts, tables, cards and marks look like in a real browser, in windows of several widths."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report.test_page import make_run, with_a_task, written

CHECK = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const words = (one) => one.textContent.trim().slice(0, 60);
  const leaves = [...document.querySelectorAll("main *, header *")].filter((one) =>
    !one.closest("svg, canvas, pre, .table")
    && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  // A text that is cut off, or that ends in an ellipsis.
  const cut = leaves.filter((one) => (one.clientWidth > 0 && one.scrollWidth > one.clientWidth + 1)
    || getComputedStyle(one).textOverflow === "ellipsis").map(words);
  // Words of cards that are broken into two lines, and numbers of more than one line.
  const broken = [...document.querySelectorAll(".card b")]
    .filter((one) => one.getBoundingClientRect().height > 1.6 * parseFloat(getComputedStyle(one).fontSize)).map(words);
  for (const one of document.querySelectorAll(".card b, .card span")) {
    const node = one.firstChild;
    for (const found of node.data.matchAll(/[^\\s-]+-?/g)) {
      const range = document.createRange();
      range.setStart(node, found.index);
      range.setEnd(node, found.index + found[0].length);
      if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1) broken.push(found[0]);
    }
  }
  // Headers that do not stand above their column.
  const apart = [];
  const edge = (cell) => {
    const side = getComputedStyle(cell).textAlign.replace("start", "left"), box = cell.getBoundingClientRect();
    return `${side} ${Math.round(side === "right" ? box.right : box.left)}`;
  };
  for (const table of document.querySelectorAll("table")) {
    const head = [...table.querySelectorAll("thead tr > *")];
    for (const row of [...table.querySelectorAll("tr")].filter((one) => !one.closest("thead"))) {
      if (!head.length || row.children.length !== head.length) continue;
      head.forEach((name, c) => {
        const [own, below] = [edge(name), edge(row.children[c])];
        if (name.textContent && own !== below) apart.push(`${name.textContent}: ${own}, ${below}`);
      });
    }
  }
  // Pictures of legends that touch their words.
  const close = [...document.querySelectorAll(".legend svg")].filter((one) => {
    const range = document.createRange();
    range.selectNode(one.nextSibling);
    return range.getBoundingClientRect().left - one.getBoundingClientRect().right < 3;
  }).map((one) => words(one.parentNode));
  // Marks at one place: how each is drawn.
  const marks = [0, 1, 2, 3].map((mark) => ({ path: MARKS[mark](0, 0), ...inked({ mark, colour: 0 }) }));
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  // Labels of breaks that leave their chart.
  const outside = [...document.querySelectorAll("text.cut")].filter((one) => {
    const own = one.getBoundingClientRect(), plot = one.closest("svg").getBoundingClientRect();
    return own.right > plot.right || own.left < plot.left;
  }).map(words);
  const breaks = document.querySelectorAll("text.cut").length;
  // Labels of breaks that touch one another.
  const touching = [...document.querySelectorAll("svg")].flatMap((svg) => {
    const own = [...svg.querySelectorAll("text.cut")].map((one) => [words(one), one.getBoundingClientRect()]);
    return own.flatMap(([name, a], i) => own.slice(i + 1).filter(([, b]) =>
      a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1)
      .map(([other]) => `${name} | ${other}`));
  });
  // The timeline: what its legend says of the marks, and the parts of its bar.
  const said = document.querySelector(".legend.marks").textContent;
  const bar = [...document.querySelectorAll("#timeline-0 .parts > div")].map((one) => Number(one.dataset.share));
  const timeline = document.querySelector("#timeline-0").textContent;
  const cards = document.querySelectorAll(".card").length;
  document.title = JSON.stringify({ cut, broken, apart, close, marks, wide, cards, outside, breaks, touching,
    said, bar, timeline });
});
</script></body>"""
WIDTHS = (1300, 760, 500)  # Chromium's narrowest window is 500


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium: apt-get install -y --no-install-recommends chromium")
    return found


def eventful(folder: Path) -> Path:
    """A run with tasks, with events of every kind of card, and with settings that changed at its second attempt."""
    run = with_a_task(make_run(folder, resumed_at=27))
    with (run / "events.jsonl").open("a") as file:
        for name in ("spike", "checkpoint_bad", "optimizer_fresh", "held_out_rising"):
            file.write(json.dumps({"time": 1200.0, "attempt": 2, "event": name, "step": 30}) + "\n")
    # Labels of neighbouring breaks have no room beside each other.
    texts = {13: "data.path", 14: "train.global_batch_size: 8 -> 16", 28: "model.seq_length: 64 -> 128", 29: "task x"}
    with (run / "events.jsonl").open("a") as file:
        for number, (step, text) in enumerate(texts.items(), start=2):
            event = {"time": 1200.0 + number, "attempt": number, "event": "resume", "step": step, "changed": [text]}
            file.write(json.dumps(event) + "\n")
    before = (run / "config.yaml").read_text() + "data: {path: data/icons}\noptim: {lr: 1.0e-3}\n"
    (run / "config.1.yaml").write_text(before)
    blend = "{blend: [{path: data/icons, weight: 2.0}, {path: data/a-second-set-with-a-long-name, weight: 1.0}]}"
    (run / "config.2.yaml").write_text(before.replace("{path: data/icons}", blend).replace("1.0e-3", "2.0e-3"))
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    file = folder / "report.html"
    text = written([eventful(folder / "run")], file)
    assert "Changed within" in text
    file.write_text(text.replace("</body>", CHECK))
    return file


@pytest.fixture(scope="module", params=WIDTHS)
def found(request: pytest.FixtureRequest, chromium: str, page: Path) -> dict[str, Any]:
    looks = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    size = (f"--window-size={request.param},900", f"--user-data-dir={page.parent / f'profile-{request.param}'}")
    command = [chromium, *looks, *size, "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    title = re.search(r"<title>(.*?)</title>", ended.stdout, re.DOTALL)
    assert title is not None
    read: dict[str, Any] = json.loads(title[1].replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    return read


def test_no_text_is_cut_off(found: dict[str, Any]) -> None:
    assert found["cut"] == []


def test_no_word_of_a_card_is_broken(found: dict[str, Any]) -> None:
    assert found["cards"] > 10 and found["broken"] == []


def test_pictures_of_legends_do_not_touch_their_words(found: dict[str, Any]) -> None:
    assert found["close"] == []


def test_labels_of_breaks_are_inside_their_charts(found: dict[str, Any]) -> None:
    assert found["breaks"] > 5 and found["outside"] == []


def test_labels_of_breaks_do_not_touch(found: dict[str, Any]) -> None:
    assert found["touching"] == []


def test_the_legend_names_the_red_crosses(found: dict[str, Any]) -> None:
    """docs/report.md calls an attempt whose processes were killed `died`."""
    assert "died" in found["said"] and "other event" not in found["said"]


def test_the_bar_and_goodput_are_shares_of_one_whole(found: dict[str, Any]) -> None:
    """Waiting between attempts is not allocated: it is said, and is no part of the bar."""
    assert sum(found["bar"]) == pytest.approx(100.0, abs=0.1)
    goodput, steps, waited = (
        re.search(pattern, found["timeline"])
        for pattern in (
            r"goodput ([0-9.]+) %",
            r"steps that count [^(]*\(([0-9.]+) %\)",
            r"waited \d+ s between attempts",
        )
    )
    assert goodput and steps and waited, found["timeline"]
    assert goodput[1] == steps[1] == f"{found['bar'][0]:.1f}"


def test_headers_stand_above_their_columns(found: dict[str, Any]) -> None:
    assert found["apart"] == []


def test_the_page_is_not_wider_than_its_window(found: dict[str, Any]) -> None:
    assert found["wide"] == 0


def test_no_mark_hides_another_at_the_same_place(found: dict[str, Any]) -> None:
    """Routing modes have one colour: their marks differ in shape, and only one is filled, half transparent."""
    marks = found["marks"]
    assert len({one["path"] for one in marks}) == len(marks)
    assert sorted(one["fill-opacity"] for one in marks) == [0, 0, 0, 0.45]
