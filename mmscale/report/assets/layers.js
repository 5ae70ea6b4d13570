// Heat maps of layers.jsonl: experts by layer at one step, co-selection, and every layer over the run.
"use strict";
// Viridis, by its corners: even steps of lightness, in any colour vision and in grey.
const SHADES = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function shade(t) {
  const at = Math.max(0, Math.min(1, t)) * (SHADES.length - 1), i = Math.min(SHADES.length - 2, Math.floor(at));
  return SHADES[i].map((c, k) => Math.round(c + (at - i) * (SHADES[i + 1][k] - c)));
}
const shadeCss = (t) => `rgb(${shade(t).join(",")})`;

function extent(rows) {
  const all = rows.flat().filter((v) => v !== null && v !== undefined && isFinite(v));
  return all.length ? [Math.min(...all), Math.max(...all)] : [0, 1];
}

const LETTER = 6; // width of a digit in 10 px type

// Columns whose names are written below them: the first, the last, and as many evenly spread between as have room.
function labelled(names, width) {
  const room = Math.max(1, Math.ceil((LETTER * Math.max(0, ...names.map((name) => name.length)) + 8) / width)), last = names.length - 1;
  const number = Math.floor(last / room);
  if (last < 1 || number < 1) return names.length ? [last] : [];
  return [...new Set(Array.from({ length: number + 1 }, (_, i) => Math.round((i * last) / number)))];
}

// rows[r][c]; labels and a line for the tooltip come from functions of r and c.
function heat(caption, rows, { rowName, columnName, tell, range, cell, height, numbers = false }) {
  const [low, high] = range ?? extent(rows);
  const width = cell, tall = height ?? Math.max(11, Math.min(22, Math.round(260 / rows.length)));
  const left = rowName ? 26 : 0, foot = columnName ? 16 : 0, columns = Math.max(...rows.map((row) => row.length));
  const names = columnName ? rows[0].map((_, c) => String(columnName(c))) : [], marked = labelled(names, width);
  const W = left + columns * width + (names.length ? Math.max(0, (LETTER * names.at(-1).length - width) / 2) : 0), H = rows.length * tall + foot, ratio = window.devicePixelRatio || 1;
  const canvas = el("canvas", { width: Math.round(W * ratio), height: Math.round(H * ratio), style: `width:${W}px;height:${H}px`, role: "img", "aria-label": caption, "data-columns": marked.map((c) => names[c]).join(" ") });
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "10px system-ui, sans-serif";
  pen.textBaseline = "middle";
  rows.forEach((row, r) => row.forEach((value, c) => {
    const known = value !== null && value !== undefined && isFinite(value), t = high > low ? (value - low) / (high - low) : 0.5;
    pen.fillStyle = known ? shadeCss(t) : css("--line");
    pen.fillRect(left + c * width, r * tall, width - (width > 5 ? 1 : 0), tall - (tall > 5 ? 1 : 0));
    if (numbers && known && width >= 34 && tall >= 13) {
      pen.fillStyle = t > 0.6 ? "#111" : "#fff";
      pen.textAlign = "center";
      pen.fillText(value.toFixed(value < 0.995 ? 2 : 1), left + c * width + width / 2, r * tall + tall / 2);
    }
  }));
  pen.fillStyle = css("--soft");
  if (rowName) {
    pen.textAlign = "right";
    const skip = Math.ceil(11 / tall);
    rows.forEach((_, r) => { if (r % skip === 0) pen.fillText(rowName(r), left - 5, r * tall + tall / 2); });
  }
  if (columnName) {
    pen.textAlign = "center";
    for (const c of marked) pen.fillText(names[c], left + c * width + width / 2, H - foot / 2 + 1);
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - left) / width), r = Math.floor((event.clientY - box.top) / tall);
    if (c < 0 || c >= columns || r < 0 || r >= rows.length) return hideTip();
    showTip(event, [[tell(r, c)], [el("b", {}, short(rows[r][c] ?? null))]]);
  });
  canvas.addEventListener("pointerleave", hideTip);
  return el("figure", { class: "heat" }, el("figcaption", {}, caption), canvas);
}

function scaleBar([low, high]) {
  const stops = [0, 0.25, 0.5, 0.75, 1].map(shadeCss).join(",");
  return el("span", { class: "note" }, short(low), el("span", { class: "scale", style: `background:linear-gradient(90deg,${stops})` }), short(high));
}

class LayersView {
  constructor(parent) {
    this.runs = DATA.runs.map((run, number) => ({ ...run, number })).filter((run) => run.layers.length);
    this.parent = parent;
    this.run = this.runs[0];
    this.record = this.run ? this.run.layers.length - 1 : 0;
    this.measure = "load";
    this.over = null;
    if (!this.run) {
      parent.append(el("div", { class: "panel empty" }, "No figures of layers: the run wrote no layers.jsonl (log.layers_every)."));
      return;
    }
    this.experts = el("section", { class: "panel", id: "chart-experts" });
    this.time = el("section", { class: "panel", id: "chart-layers-over-time" });
    parent.append(this.experts, this.time);
    listeners.push(() => this.draw());
  }

  // [group, modality] pairs of a record, in the order of the first layer that has experts.
  groups(record) {
    const found = new Map();
    for (const layer of Object.values(record.layers)) for (const [group, some] of Object.entries(layer.experts ?? {})) {
      for (const modality of Object.keys(some)) found.set(`${group} ${modality}`, [group, modality]);
    }
    const order = DATA.modalities, rank = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
    return [...found.values()].sort((a, b) => rank(a[1]) - rank(b[1]));
  }

  chooser() {
    if (this.runs.length < 2) return [];
    const select = el("select", { "aria-label": "run", onchange: (event) => {
      this.run = this.runs[Number(event.target.value)];
      this.record = this.run.layers.length - 1;
      this.draw();
    } }, ...this.runs.map((run, i) => el("option", { value: i }, run.name)));
    select.value = this.runs.indexOf(this.run);
    return [el("label", {}, "run", select)];
  }

  draw() {
    this.drawExperts();
    this.drawTime();
  }

  drawExperts() {
    const records = this.run.layers, record = records[this.record], groups = this.groups(record);
    this.experts.hidden = !groups.length;
    if (!groups.length) return;
    const slider = el("input", { type: "range", min: 0, max: records.length - 1, value: this.record, "aria-label": "step", oninput: (event) => {
      this.record = Number(event.target.value);
      this.drawExperts();
      this.experts.querySelector("input[type=range]").focus();
    } });
    const measures = { load: "tokens taken", gate: "mean gate" };
    const choice = el("div", { class: "choice" }, ...Object.entries(measures).map(([name, text]) => el("button", { type: "button", "aria-pressed": String(name === this.measure), onclick: () => { this.measure = name; this.drawExperts(); } }, text)));
    const loads = el("div", { class: "heats" }), pairs = el("div", { class: "heats" });
    const layers = Object.keys(record.layers).filter((n) => record.layers[n].experts).sort((a, b) => a - b);
    const tables = groups.map(([group, modality]) => layers.map((n) => record.layers[n].experts[group]?.[modality]?.[this.measure] ?? []));
    const range = [0, Math.max(...tables.map((rows) => extent(rows)[1]))];
    groups.forEach(([group, modality], g) => {
      const columns = Math.max(...tables[g].map((row) => row.length));
      const name = group === modality ? `${group} experts` : `${group} experts, ${modality} tokens`;
      loads.append(heat(name, tables[g], {
        range, numbers: true, cell: this.cell(columns, groups.length, 9, 60),
        rowName: (r) => layers[r], columnName: (c) => c,
        tell: (r, c) => `layer ${layers[r]}, expert ${c} of ${name}`,
      }));
    });
    const everywhere = new Set(records.flatMap((one) => this.groups(one)).map(([, modality]) => modality));
    const absent = [...everywhere].filter((name) => !groups.some(([, modality]) => modality === name));
    const drawnGroups = groups.length, paired = this.paired();
    const drawn = groups.flatMap(([group, modality]) => {
      const some = layers.filter((n) => paired?.layers[n]?.experts?.[group]?.[modality]?.coselection);
      if (!some.length) return [];
      const size = paired.layers[some[0]].experts[group][modality].coselection.length;
      const maps = some.map((n) => {
        const rows = paired.layers[n].experts[group][modality].coselection.map((row, i) => row.map((v, j) => (i === j ? null : v)));
        return [n, rows];
      });
      const top = Math.max(...maps.map(([, rows]) => extent(rows)[1]), 1e-9), cell = Math.max(3, Math.min(22, Math.floor(Math.max(72, this.cell(some.length, drawnGroups, 0, 150) - 16) / size)));
      return [el("div", {},
        el("p", { class: "sub" }, group === modality ? modality : `${group}, ${modality} tokens`, " ", scaleBar([0, top])),
        el("div", { class: "heats" }, ...maps.map(([n, rows]) => heat(`layer ${n}`, rows, { range: [0, top], cell, height: cell, tell: (r, c) => `layer ${n}: of the tokens of expert ${r}, those that expert ${c} took too` }))))];
    });
    pairs.append(...drawn);
    this.experts.replaceChildren(
      el("div", { class: "head" }, el("h3", {}, "Expert load by layer"), el("span", { class: "note" }, this.measure === "load" ? "Tokens that an expert took, over the modality's tokens in that layer; a row is a layer, a column an expert." : "Mean gate of the tokens that an expert took; a row is a layer, a column an expert.")),
      el("div", { class: "tools" }, ...this.chooser(), choice, el("label", {}, `step ${record.step.toLocaleString("en")}`, slider), scaleBar(range)),
      ...(absent.length ? [el("p", { class: "sub" }, `The micro-batches of step ${record.step.toLocaleString("en")} have no tokens of ${absent.join(" and ")}.`)] : []),
      loads,
      ...(drawn.length ? [el("div", { class: "head", style: "margin-top:1rem" }, el("h3", {}, "Co-selection"), el("span", { class: "note" }, `Of the tokens that the row's expert took, the fraction that the column's expert took too; step ${paired?.step.toLocaleString("en")}.`)), pairs] : []));
  }

  // The record nearest to the chosen one that has co-selection: long runs of large models have it only now and then.
  paired() {
    const has = (record) => Object.values(record.layers).some((layer) => Object.values(layer.experts ?? {}).some((some) => Object.values(some).some((figures) => figures.coselection)));
    const places = this.run.layers.map((_, i) => i).filter((i) => has(this.run.layers[i]));
    return this.run.layers[places.sort((a, b) => Math.abs(a - this.record) - Math.abs(b - this.record))[0]];
  }

  // Width of a cell when so many maps of so many columns stand side by side.
  cell(columns, maps, least, most) {
    const room = (this.parent.clientWidth - 40) / maps - 50;
    return Math.max(least, Math.min(most, Math.floor(room / columns)));
  }

  // Matrices [layer][record] of every figure that layers have, by name.
  overTime() {
    const records = this.run.layers, layers = Object.keys(records.at(-1).layers).sort((a, b) => a - b), found = new Map();
    const add = (name, modality, r, c, value) => {
      if (!found.has(name)) found.set(name, new Map());
      const maps = found.get(name);
      if (!maps.has(modality)) maps.set(modality, layers.map(() => records.map(() => null)));
      maps.get(modality)[r][c] = value;
    };
    records.forEach((record, c) => layers.forEach((n, r) => {
      const layer = record.layers[n] ?? {};
      for (const [group, some] of Object.entries(layer.experts ?? {})) for (const [modality, figures] of Object.entries(some)) {
        add("unrouted", group === modality ? modality : `${group}, ${modality} tokens`, r, c, figures.unrouted);
      }
      for (const [modality, value] of Object.entries(layer.depth ?? {})) add("depth", modality, r, c, value);
      for (const [modality, value] of Object.entries(layer.output_norm ?? {})) add("norm", modality, r, c, isFinite(value) ? value : null);
    }));
    for (const [name, maps] of found) found.set(name, new Map([...maps].sort(([a], [b]) => DATA.modalities.indexOf(a) - DATA.modalities.indexOf(b))));
    return [layers, found];
  }

  drawTime() {
    const [layers, found] = this.overTime(), records = this.run.layers;
    const titles = { unrouted: "tokens that no expert took", depth: "tokens processed (depth)", norm: "output norm" };
    const notes = { unrouted: "Fraction of the modality's tokens that passed by the layer's experts; a row is a layer, a column a step.", depth: "Fraction of the modality's tokens that the Mixture-of-Depths layer processed; grey layers process all.", norm: "Mean norm of the hidden states after the layer; a row is a layer, a column a step." };
    const names = Object.keys(titles).filter((name) => found.has(name));
    if (!names.includes(this.over)) this.over = names[0];
    if (!names.length) {
      this.time.replaceChildren(el("div", { class: "tools" }, ...this.chooser()), el("div", { class: "empty" }, "Nothing but empty records in layers.jsonl."));
      return;
    }
    const choice = el("div", { class: "choice" }, ...names.map((name) => el("button", { type: "button", "aria-pressed": String(name === this.over), onclick: () => { this.over = name; this.drawTime(); } }, titles[name])));
    const maps = [...found.get(this.over)], range = extent(maps.map(([, rows]) => rows.flat()));
    const cell = this.cell(records.length, maps.length, 4, 40);
    this.time.replaceChildren(
      el("div", { class: "head" }, el("h3", {}, "Layers over the run"), el("span", { class: "note" }, notes[this.over])),
      el("div", { class: "tools" }, ...this.chooser(), choice, scaleBar(range)),
      el("div", { class: "heats" }, ...maps.map(([modality, rows]) => heat(modality, rows, {
        range, cell, rowName: (r) => layers[r], columnName: (c) => short(records[c].step),
        tell: (r, c) => `layer ${layers[r]}, step ${records[c].step.toLocaleString("en")}, ${modality}`,
      }))));
  }
}
