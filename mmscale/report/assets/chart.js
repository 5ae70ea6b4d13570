// Line charts: one x axis for all of them, zoom by dragging, a cursor that all follow, spikes and broken values marked.
"use strict";
const charts = [];

function axisDomain() {
  if (state.zoom) return state.zoom;
  let low = Infinity, high = -Infinity;
  for (const run of DATA.runs) for (const group of run.groups) {
    for (const x of group[state.axis]) if (x !== null) { low = Math.min(low, x); high = Math.max(high, x); }
  }
  if (!(low <= high)) return [0, 1];
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

// Mean over neighbours on both sides, so that curves do not lag; the window shrinks at the beginning, where they are steep.
function smoothed(line, amount) {
  const reach = Math.round((line.mean.length / 200) * amount);
  if (reach < 1 || line.mean.length < 40) return line.mean;
  return pieces(line).flatMap(([first, end]) => means(line.mean.slice(first, end), reach));
}

// Places of a line's points between its gaps: [first, end) of each piece.
function pieces(line) {
  const edges = [0, ...(line.gaps ?? []), line.mean.length];
  return edges.slice(1).map((end, i) => [edges[i], end]);
}

function means(values, reach) {
  const sums = [0], counts = [0];
  values.forEach((v, i) => { sums.push(sums[i] + (v ?? 0)); counts.push(counts[i] + (v === null ? 0 : 1)); });
  return values.map((v, i) => {
    const near = Math.min(reach, i), first = i - near, end = Math.min(i + near + 1, values.length);
    const number = counts[end] - counts[first];
    return number ? (sums[end] - sums[first]) / number : null;
  });
}

const MARKS = [
  (x, y) => `M${x - 4},${y}a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z`,
  (x, y) => `M${x},${y - 5}l5,5l-5,5l-5,-5Z`,
  (x, y) => `M${x},${y - 5}l5,8.5h-10Z`,
  (x, y) => `M${x - 4},${y - 4}h8v8h-8Z`,
];

// Marks at one place show through each other: the first shape is filled and half transparent, the others are outlines.
function inked(line) {
  const stroke = colour(line.colour);
  return { fill: stroke, "fill-opacity": line.mark % 4 ? 0 : 0.45, stroke, "stroke-width": line.mark % 4 ? 1.7 : 1 };
}

const LEVEL = { stroke: "var(--soft)", "stroke-width": 1.4, "stroke-dasharray": "6 3" };
const CHARACTER = 6.5; // width of a letter of a chart's texts
const CUT_ROW = 13; // height of a row of labels of breaks
const MANY_MARKS = 80, DASHES = ["7 3", "7 2 2 2", "3 3", "2 3"];

// Place of the lowest value of a line behind its last gap; -1 where there are fewer than two, of which none is worth a mark.
function best(line) {
  const from = (line.gaps ?? []).at(-1) ?? 0;
  const known = line.mean.map((v, i) => [v, i]).filter(([v, i]) => v !== null && i >= from);
  return known.length < 2 ? -1 : known.reduce((low, one) => (one[0] < low[0] ? one : low))[1];
}

class Chart {
  constructor(spec, parent) {
    this.spec = spec;
    this.log = spec.log;
    this.lines = spec.lines.map((line) => ({ ...line, group: DATA.runs[line.run].groups[line.group] }));
    this.plot = el("div", { class: "plot" });
    this.logButton = el("button", { type: "button", title: "logarithmic scale", onclick: () => this.toggleLog() }, "log");
    const note = el("span", { class: "note", title: spec.note }, spec.note);
    const title = spec.unit ? `${spec.title} [${spec.unit}]` : spec.title;
    this.panel = el("section", { class: spec.wide ? "panel wide" : "panel", id: `chart-${spec.name}` },
      el("div", { class: "head" }, el("h3", {}, title), note, spec.lines.length ? this.logButton : null));
    if (!spec.lines.length) this.panel.append(el("div", { class: "empty" }, "not measured"));
    else this.panel.append(...(spec.lines.length > 1 || DATA.runs.length > 1 || spec.levels.length ? [this.legend()] : []), this.plot);
    parent.append(this.panel);
    this.drag = null;
    this.plot.addEventListener("pointermove", (event) => this.move(event));
    this.plot.addEventListener("pointerleave", () => { if (!this.drag) { hideTip(); charts.forEach((c) => c.cursor(null)); } });
    this.plot.addEventListener("pointerdown", (event) => this.down(event));
    this.plot.addEventListener("pointerup", (event) => this.up(event));
    this.plot.addEventListener("dblclick", () => { state.zoom = null; redraw(); });
  }

  key(line) { return DATA.runs.length > 1 ? `run ${line.run}` : `${this.spec.name} ${line.label}`; }

  legend() {
    const box = el("div", { class: "legend" });
    for (const line of this.lines) {
      const picture = el("svg", { width: 22, height: 12 });
      if (line.points) picture.append(el("path", { d: MARKS[line.mark % 4](11, 6), ...inked(line) }));
      else picture.append(el("line", { x1: 1, x2: 21, y1: 6, y2: 6, stroke: colour(line.colour), "stroke-width": 2.5 }));
      const button = el("button", { type: "button", title: "show or hide", onclick: () => {
        const key = this.key(line);
        if (!state.hidden.delete(key)) state.hidden.add(key);
        redraw();
      } }, picture, line.label);
      line.button = button;
      box.append(button);
    }
    for (const label of new Set(this.spec.levels.map((level) => level.label))) {
      const picture = el("svg", { width: 22, height: 12 }, el("line", { x1: 1, x2: 21, y1: 6, y2: 6, ...LEVEL }));
      box.append(el("span", { class: "level" }, picture, label));
    }
    return box;
  }

  toggleLog() { this.log = !this.log; this.draw(); }
  shown() { return this.lines.filter((line) => !state.hidden.has(this.key(line))); }

  draw() {
    if (!this.lines.length) return;
    this.lines.forEach((line) => line.button?.classList.toggle("off", state.hidden.has(this.key(line))));
    this.logButton.setAttribute("aria-pressed", String(this.log));
    const W = this.width = Math.max(240, this.plot.clientWidth), H = this.height = this.spec.wide ? 330 : 215;
    const box = this.box = { left: 54, right: W - 10, top: 10, bottom: H - 24 };
    [this.x0, this.x1] = axisDomain();
    this.sx = (x) => box.left + ((x - this.x0) / (this.x1 - this.x0)) * (box.right - box.left);
    for (const line of this.lines) {
      line.x = line.group[state.axis];
      line.known = line.x.some((x) => x !== null);
      line.curve = line.points || this.spec.raw ? line.mean : smoothed(line, state.smooth);
    }
    this.scaleY();
    const clip = `clip-${this.spec.name}`.replace(/[^\w-]/g, "_");
    const svg = el("svg", { height: H, viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": this.spec.title },
      el("defs", {}, el("clipPath", { id: clip }, el("rect", { x: box.left - 9, y: box.top - 4, width: box.right - box.left + 18, height: box.bottom - box.top + 8 }))));
    this.grid(svg);
    const inner = el("g", { "clip-path": `url(#${clip})` });
    if (state.events) this.events(inner);
    this.cuts(inner);
    this.levels(inner);
    this.shown().forEach((line) => this.line(inner, line));
    svg.append(inner);
    this.over = el("g", {});
    svg.append(this.over);
    if (!this.shown().some((line) => line.known)) {
      svg.append(el("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, `no ${AXES[state.axis].toLowerCase()} known`));
    }
    this.plot.replaceChildren(svg);
  }

  scaleY() {
    const values = [];
    for (const line of this.shown()) line.x.forEach((x, i) => {
      if (x === null || x < this.x0 || x > this.x1) return;
      for (const v of [line.mean[i], line.low?.[i], line.high?.[i]]) {
        if (v !== null && v !== undefined && (!this.log || v > 0)) values.push(v);
      }
    });
    values.push(...this.spec.levels.map((level) => level.value).filter((v) => !this.log || v > 0));
    values.sort((a, b) => a - b);
    let low = values[0] ?? (this.log ? 0.1 : 0), high = values.at(-1) ?? 1;
    // A single spike must not flatten everything else: it is cut off and marked.
    const most = values[Math.floor((values.length - 1) * 0.99)];
    if (!this.log && values.length > 50 && high - low > 4 * (most - low) && most > low) high = most + 0.3 * (most - low);
    this.cut = high;
    if (this.log) {
      if (high / low < 1.05) { low /= 1.1; high *= 1.1; }
      const [a, b] = [Math.log(low), Math.log(high)], pad = 0.04 * (b - a);
      this.y0 = Math.exp(a - pad); this.y1 = Math.exp(b + pad);
    } else {
      if (this.spec.zero && low > 0) low = 0;
      const pad = high > low ? 0.05 * (high - low) : Math.abs(high) * 0.1 || 1;
      this.y0 = low === 0 && this.spec.zero ? 0 : low - pad; this.y1 = high + pad;
    }
    const { top, bottom } = this.box, f = this.log ? Math.log : (v) => v;
    this.sy = (v) => bottom - ((f(v) - f(this.y0)) / (f(this.y1) - f(this.y0))) * (bottom - top);
  }

  grid(svg) {
    const { left, right, top, bottom } = this.box;
    const [ys, gap] = this.log ? [logTicks(this.y0, this.y1), null] : ticks(this.y0, this.y1, (bottom - top) / 45);
    for (const value of ys) {
      const y = this.sy(value);
      svg.append(el("line", { x1: left, x2: right, y1: y, y2: y, stroke: "var(--grid)" }),
        el("text", { x: left - 7, y: y + 3.5, "text-anchor": "end" }, short(value, gap)));
    }
    const [factor, unit] = state.axis === "hours" ? clockUnit(this.x1 - this.x0) : [1, ""];
    const least = state.axis === "step" ? 1 : 0;  // there is no half of a step
    const [xs, step] = ticks(this.x0 * factor, this.x1 * factor, (right - left) / 90, least);
    for (const value of xs) {
      const x = this.sx(value / factor);
      svg.append(el("line", { x1: x, x2: x, y1: bottom, y2: bottom + 4, stroke: "var(--soft)" }),
        el("text", { x, y: bottom + 17, "text-anchor": x > right - 12 ? "end" : "middle" }, unit ? `${short(value, step)} ${unit}` : short(value, step)));
    }
    svg.append(el("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: "var(--soft)" }));
  }

  // Horizontal lines that curves are compared with, each over the steps for which it holds.
  levels(parent) {
    const { left, right } = this.box;
    for (const level of this.spec.levels) {
      if (this.log && level.value <= 0) continue;
      const run = DATA.runs[level.run];
      const at = (step, edge) => { const x = step === null ? null : eventPlace(run, { step, hours: null }); return x === null ? edge : Math.max(left, Math.min(right, this.sx(x))); };
      const x1 = at(level.first || null, left), x2 = at(level.last, right);
      if (x1 < x2) parent.append(el("line", { class: "level", x1, x2, y1: this.sy(level.value), y2: this.sy(level.value), ...LEVEL }, el("title", {}, `${level.label}: ${short(level.value)}`)));
    }
  }

  line(parent, line) {
    const stroke = colour(line.colour), { top, bottom } = this.box;
    const inside = (v) => v !== null && v !== undefined && (!this.log || v > 0);
    const Y = (v) => Math.max(top - 30, Math.min(bottom + 30, this.sy(v))).toFixed(1);
    const X = line.x.map((x) => (x === null ? null : this.sx(x).toFixed(1)));
    const gaps = new Set(line.gaps ?? []); // points that are not joined with the one before
    const path = (values) => {
      let text = "", pen = false;
      values.forEach((v, i) => {
        if (gaps.has(i)) pen = false;
        if (X[i] === null || !inside(v)) { pen = false; return; }
        text += `${pen ? "L" : "M"}${X[i]},${Y(v)}`;
        pen = true;
      });
      return text;
    };
    if (line.low && (!line.points || line.joined)) {
      const seen = X.map((x, i) => (x !== null && inside(line.low[i]) && inside(line.high[i]) ? i : -1)).filter((i) => i >= 0);
      for (const [first, end] of pieces(line)) {
        const own = seen.filter((i) => i >= first && i < end);
        if (!own.length) continue;
        const band = own.map((i) => `${X[i]},${Y(line.high[i])}`).concat(own.reverse().map((i) => `${X[i]},${Y(line.low[i])}`));
        parent.append(el("polygon", { points: band.join(" "), fill: stroke, opacity: 0.16 }));
      }
    } else if (line.low) {
      // A point for many pauses says nothing of the longest: a stem reaches from the lowest to the highest.
      const foot = (v) => (inside(v) ? Y(v) : bottom);
      const stems = line.high.map((v, i) => (X[i] === null || !inside(v) || v === line.low[i] ? "" : `M${X[i]},${foot(line.low[i])}V${Y(v)}`)).join("");
      parent.append(el("path", { class: "stems", d: stems, fill: "none", stroke, "stroke-width": 1.2, opacity: 0.6 }));
    }
    if (line.points) {
      const many = line.joined && line.mean.length > MANY_MARKS;
      if (line.joined) parent.append(el("path", { d: path(line.mean), fill: "none", stroke, "stroke-width": many ? 1.6 : 1, "stroke-dasharray": DASHES[many ? line.mark % 4 : 3], opacity: many ? 1 : 0.7 }));
      const marks = many ? "" : line.mean.map((v, i) => (X[i] === null || !inside(v) ? "" : MARKS[line.mark % 4](Number(X[i]), Number(Y(v))))).join("");
      parent.append(el("path", { d: marks, ...inked(line) }));
      const lowest = line.best ? best(line) : -1;
      if (lowest >= 0 && X[lowest] !== null && inside(line.mean[lowest])) {
        const ring = el("circle", { class: "best", cx: X[lowest], cy: Y(line.mean[lowest]), r: 7.5, fill: "none", stroke, "stroke-width": 1.8 });
        ring.append(el("title", {}, `lowest: ${short(line.mean[lowest])} at step ${line.group.step[lowest]}`));
        parent.append(ring);
      }
    } else {
      if (line.curve !== line.mean) parent.append(el("path", { d: path(line.mean), fill: "none", stroke, "stroke-width": 0.8, opacity: 0.35 }));
      parent.append(el("path", { d: path(line.curve), fill: "none", stroke, "stroke-width": 1.8, "stroke-linejoin": "round" }));
      if (line.mean.length < 40) {
        const dots = line.mean.map((v, i) => (X[i] === null || !inside(v) ? "" : `M${X[i] - 2},${Y(v)}a2,2 0 1,0 4,0a2,2 0 1,0 -4,0Z`)).join("");
        parent.append(el("path", { d: dots, fill: stroke }));
      }
    }
    const above = (line.high ?? line.mean).map((v, i) => (v !== null && !this.log && v > this.y1 ? i : -1)).filter((i) => i >= 0);
    const mark = (i, fill) => (X[i] === null ? "" : parent.append(el("path", { d: `M${X[i]},${top - 3}l4,7h-8Z`, fill })));
    above.forEach((i) => mark(i, stroke));
    (line.broken ?? []).forEach((i) => mark(i, "var(--bad)"));
  }

  events(parent) {
    const { top, bottom } = this.box;
    DATA.runs.forEach((run, number) => {
      if (!this.shown().some((line) => line.run === number)) return;
      for (const one of run.timeline.events) {
        if (one.routine && one.event !== "resume") continue;
        const x = eventPlace(run, one);
        if (x === null || x < this.x0 || x > this.x1) continue;
        const stroke = one.routine ? "var(--soft)" : "var(--bad)";
        parent.append(el("line", { x1: this.sx(x), x2: this.sx(x), y1: top, y2: bottom, stroke, "stroke-dasharray": "3 3", opacity: 0.6 }));
      }
    });
  }

  // Lines where other data, batches or sequences begin, and what changed. A label that would touch another one is below it.
  cuts(parent) {
    if (this.spec.raw) return;
    const { top, bottom } = this.box, rows = [], labels = [];
    DATA.runs.forEach((run, number) => {
      const own = this.shown().filter((line) => line.run === number);
      const shown = run.cuts.filter((_, place) => own.some((line) => line.cuts.includes(place)));
      // Of two with the same text at neighbouring steps, of held-out and of training curves, the later one.
      for (const cut of shown.filter((one) => !shown.some((other) => other.text === one.text && other.step === one.step + 1))) {
        const place = eventPlace(run, cut), x = place === null ? null : this.sx(place);
        if (x === null || place < this.x0 || place > this.x1) continue;
        parent.append(el("line", { class: "cut", x1: x, x2: x, y1: top, y2: bottom, stroke: "var(--soft)", "stroke-width": 1.4 }));
        // On the side where it has room.
        const width = CHARACTER * cut.text.length, fits = x + 4 + width < this.box.right;
        labels.push([fits ? x + 4 : x - 4 - width, width, cut.text, fits ? x + 4 : x - 4, fits]);
      }
    });
    labels.sort((a, b) => a[0] - b[0]);
    for (const [from, width, text, x, fits] of labels) {
      const free = rows.findIndex((end) => end < from), row = free < 0 ? rows.length : free;
      if (top + 9 + CUT_ROW * row > bottom) continue; // the line is left; zooming shows its label
      rows[row] = from + width;
      parent.append(el("text", { class: "cut", x, y: top + 9 + CUT_ROW * row, "text-anchor": fits ? "start" : "end" }, text));
    }
  }

  at(event) {
    const box = this.plot.getBoundingClientRect();
    return this.x0 + ((event.clientX - box.left - this.box.left) / (this.box.right - this.box.left)) * (this.x1 - this.x0);
  }

  down(event) {
    if (event.button || !this.box) return;
    this.drag = { from: this.at(event), pixel: event.clientX };
    this.plot.setPointerCapture(event.pointerId);
  }

  up(event) {
    const drag = this.drag;
    this.drag = null;
    if (!drag || Math.abs(event.clientX - drag.pixel) < 6) return;
    const to = this.at(event), [low, high] = axisDomain();
    const zoom = [Math.max(low, Math.min(drag.from, to)), Math.min(high, Math.max(drag.from, to))];
    if (zoom[1] > zoom[0]) state.zoom = zoom;
    redraw();
  }

  move(event) {
    if (!this.box) return;
    const x = this.at(event);
    if (this.drag) {
      const [a, b] = [this.sx(this.drag.from), this.sx(x)];
      this.over.replaceChildren(el("rect", { x: Math.min(a, b), y: this.box.top, width: Math.abs(a - b), height: this.box.bottom - this.box.top, fill: "var(--accent)", opacity: 0.15 }));
      return;
    }
    if (x < this.x0 || x > this.x1) return;
    charts.forEach((chart) => chart.cursor(x));
    const rows = [[el("b", {}, place(x))]];
    for (const line of this.shown()) {
      if (!line.known) continue;
      const i = bisect(line.x, x);
      const range = line.low && line.low[i] !== line.high[i] ? ` (${short(line.low[i])} to ${short(line.high[i])})` : "";
      rows.push([el("i", { style: `background:${colour(line.colour)}` }), `${line.label} `, el("b", {}, short(line.mean[i])), range]);
    }
    showTip(event, rows);
  }

  cursor(x) {
    if (!this.over) return;
    if (x === null || x < this.x0 || x > this.x1) return this.over.replaceChildren();
    const nodes = [el("line", { x1: this.sx(x), x2: this.sx(x), y1: this.box.top, y2: this.box.bottom, stroke: "var(--soft)" })];
    for (const line of this.shown()) {
      if (!line.known) continue;
      const i = bisect(line.x, x), v = line.curve[i];
      if (v === null || line.x[i] === null || (this.log && v <= 0)) continue;
      nodes.push(el("circle", { cx: this.sx(line.x[i]), cy: this.sy(v), r: 3.2, fill: colour(line.colour), stroke: "var(--panel)" }));
    }
    this.over.replaceChildren(...nodes);
  }
}

function place(x) {
  if (state.axis === "hours") return duration(x);
  if (state.axis === "step") return `step ${Math.round(x).toLocaleString("en")}`;
  return `${short(x)} ${AXES[state.axis]}`;
}

// Where an event stands on the axis: by its time, or between the logged steps around it.
function eventPlace(run, one) {
  if (state.axis === "hours") return one.hours;
  if (state.axis === "step" && one.step !== null) return one.step;
  const group = run.groups[0];
  if (!group) return null;
  const from = one.step !== null ? "step" : "hours", known = group[from];
  if (!known.length || known[0] === null) return null;
  return group[state.axis][bisect(known, one[from])];
}
