// Attempts and events of runs against the clock, and where their time went.
"use strict";
// Parts of the allocated time, with their words and colours, in this order.
const PARTS = [["steps", "--s-steps"], ["start_up", "--s-start"], ["save_stall", "--s-stall"], ["evaluation", "--s-eval"], ["lost", "--s-lost"], ["other", "--s-other"]].map(([name, tint]) => [name, DATA.parts[name], tint]);
// Routine events that are drawn, as marks: a circle or a square.
const QUIET = { finish: [0, "--s-steps"], ended_early: [0, "--s-steps"], resume: [0, "--soft"], stop: [3, "--soft"] };
const QUIET_WORDS = { finish: "finished", ended_early: "ended early", resume: "resumed", stop: "stopped on request" };
const SPANS = { steps: "--s-steps", start_up: "--s-start", lost: "--s-lost" };

// The meaning of the marks below the attempts, of those that are there.
function marksLegend(events, crosses) {
  const own = (shape) => { const svg = el("svg", { width: 14, height: 14, viewBox: "0 0 14 14", style: "flex:none;margin:.15rem .3rem 0 0", "aria-hidden": "true" }); svg.append(shape); return svg; };
  const found = [], has = (name) => events.some((one) => one.event === name);
  if (has("save_committed")) found.push([el("line", { x1: 7, x2: 7, y1: 4, y2: 10, stroke: "var(--soft)", "stroke-width": 1.5 }), "checkpoint saved"]);
  for (const [name, word] of Object.entries(QUIET_WORDS)) if (has(name)) found.push([el("path", { d: MARKS[QUIET[name][0]](7, 7), fill: `var(${QUIET[name][1]})`, "fill-opacity": 0.45, stroke: `var(${QUIET[name][1]})` }), word]);
  if (crosses) found.push([el("path", { d: "M2.5,2.5l9,9m0,-9l-9,9", stroke: "var(--bad)", "stroke-width": 2.2, fill: "none" }), `${crosses}: point at it`]);
  return el("div", { class: "legend marks", style: "margin:0 .5rem .3rem" }, ...found.map(([shape, word]) => el("span", { style: "display:inline-flex" }, own(shape), el("span", {}, word))));
}

function timelineOf(run, parent) {
  const { spans, events, crosses, goodput, seconds, measured_start } = run.timeline;
  const box = el("section", { class: "panel wide", id: `timeline-${DATA.runs.indexOf(run)}` });
  const parts = PARTS.filter(([name]) => (seconds[name] ?? 0) > 0), total = parts.reduce((sum, [name]) => sum + seconds[name], 0);
  const word = goodput === null ? "" : `goodput ${(100 * goodput).toFixed(1)} %: the share of allocated time in steps that count`;
  box.append(el("div", { class: "head" }, el("h3", {}, DATA.runs.length > 1 ? run.name : "Attempts and events"), el("span", { class: "note" }, word + (measured_start || goodput === null ? "" : "; start-up before the first event is not known"))));
  parent.append(box);
  if (!spans.length) return box.append(el("div", { class: "empty" }, "No events were logged."));
  const strip = el("div", { class: "strip" });
  box.append(strip);
  const draw = () => {
    const W = Math.max(300, strip.clientWidth), left = 8, right = W - 8, end = Math.max(...spans.map((s) => s.end), ...events.map((h) => h.hours), 1e-9);
    const sx = (h) => left + (h / end) * (right - left), svg = el("svg", { height: 92, viewBox: `0 0 ${W} 92`, role: "img", "aria-label": "timeline" });
    for (const span of spans) {
      const width = Math.max(1, sx(span.end) - sx(span.begin));
      const rect = el("rect", { x: sx(span.begin), y: 22, width, height: 26, fill: `var(${SPANS[span.kind]})`, rx: 2 });
      const name = PARTS.find(([part]) => part === span.kind)[1];
      rect.addEventListener("pointermove", (event) => showTip(event, [[el("b", {}, `attempt ${span.attempt}: ${name}`)], [`${duration(span.begin)} to ${duration(span.end)} (${duration(span.end - span.begin)})`]]));
      rect.addEventListener("pointerleave", hideTip);
      svg.append(rect);
    }
    for (const attempt of new Set(spans.map((s) => s.attempt))) {
      const mine = spans.filter((s) => s.attempt === attempt), from = sx(mine[0].begin), to = sx(mine.at(-1).end);
      if (to - from > 14) svg.append(el("text", { x: from + 3, y: 16 }, to - from > 70 ? `attempt ${attempt}` : String(attempt)));
    }
    const drawn = events.filter((one) => !one.routine || one.event === "save_committed" || one.event in QUIET);
    // What stands at a place: marks may hide each other.
    const near = (x) => drawn.filter((one) => Math.abs(sx(one.hours) - x) < 6).slice(0, 8).flatMap((one) => {
      const where = one.step === null ? "" : ` at step ${one.step.toLocaleString("en")}`;
      return [[el("b", {}, one.event.replaceAll("_", " ") + where), ` attempt ${one.attempt}, ${duration(one.hours)}`], ...(one.text ? [[one.text]] : [])];
    });
    for (const one of drawn) {
      const x = sx(one.hours), save = one.event === "save_committed", quiet = one.routine && !save;
      const node = save ? el("line", { x1: x, x2: x, y1: 51, y2: 57, stroke: "var(--soft)", "stroke-width": 1.5 })
        : quiet ? el("path", { class: `event ${one.event}`, d: MARKS[QUIET[one.event][0]](x, 62), fill: `var(${QUIET[one.event][1]})`, "fill-opacity": 0.45, stroke: `var(${QUIET[one.event][1]})` })
        : el("path", { d: `M${x - 4.5},${57.5}l9,9m0,-9l-9,9`, stroke: "var(--bad)", "stroke-width": 2.2, fill: "none" });
      const hit = el("rect", { x: x - 5, y: 50, width: 10, height: 20, fill: "transparent" });
      hit.addEventListener("pointermove", (event) => showTip(event, near(x)));
      hit.addEventListener("pointerleave", hideTip);
      svg.append(node, hit);
    }
    const [factor, unit] = clockUnit(end), [xs, step] = ticks(0, end * factor, (right - left) / 110);
    svg.append(el("line", { x1: left, x2: right, y1: 72, y2: 72, stroke: "var(--line)" }));
    for (const value of xs) svg.append(el("text", { x: Math.max(left + 8, Math.min(right - 14, sx(value / factor))), y: 86, "text-anchor": "middle" }, `${short(value, step)} ${unit}`));
    strip.replaceChildren(svg);
  };
  listeners.push(draw);
  box.append(marksLegend(events, crosses));
  if (total > 0) {
    const row = el("div", { class: "parts", style: "display:flex;height:1.1rem;border-radius:5px;overflow:hidden;margin:.5rem .5rem .3rem" });
    for (const [name, text, tint] of parts) {
      const part = el("div", { "data-share": (100 * seconds[name]) / total, style: `width:${(100 * seconds[name]) / total}%;background:var(${tint})` });
      part.addEventListener("pointermove", (event) => showTip(event, [[el("b", {}, text)], [`${duration(seconds[name] / 3600)}, ${((100 * seconds[name]) / total).toFixed(1)} %`]]));
      part.addEventListener("pointerleave", hideTip);
      row.append(part);
    }
    const legend = el("div", { class: "legend", style: "margin:0 .5rem .3rem" }, ...parts.map(([name, text, tint]) => el("span", {}, el("span", { style: `display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.35rem;background:var(${tint})` }), `${text} ${duration(seconds[name] / 3600)} (${((100 * seconds[name]) / total).toFixed(1)} %)`)));
    if (seconds.waiting > 0) legend.append(el("span", {}, `besides, the run waited ${duration(seconds.waiting / 3600)} between attempts`));
    box.append(row, legend);
  }
}
