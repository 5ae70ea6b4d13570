// What all figures share: numbers as people read them, ticks, small DOM helpers, the tooltip. Draws nothing by itself.
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const AXES = { step: "Steps", tokens: "Tokens", flops: "FLOPs", hours: "Wall clock" };
const state = { axis: "step", smooth: 2, events: true, zoom: null, hidden: new Set() };
const listeners = [];
const redraw = () => listeners.forEach((draw) => draw());

function el(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "circle", "g", "text", "title", "polygon", "clipPath", "defs"].includes(name);
  const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (number) => `var(--c${number % 6})`;

// 12k, 3.4M, 1.2e18, 2.5e-4: as many digits as ticks a distance `step` apart need.
function short(value, step) {
  if (value === null || !isFinite(value)) return "not finite";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let scale = 1, suffix = "";
  if (size >= 1e15 || size < 1e-3) {
    scale = 10 ** Math.floor(Math.log10(size) + 1e-9);
    suffix = `e${Math.round(Math.log10(scale))}`;
  } else for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) { scale = letter === "k" ? 1e3 : limit; suffix = letter; break; }
  }
  const digits = step ? Math.max(0, Math.min(6, -Math.floor(Math.log10(step / scale) + 1e-9))) : null;
  const text = digits === null ? String(Number((value / scale).toPrecision(4))) : (value / scale).toFixed(digits);
  return text + suffix;
}

function duration(hours) {
  if (hours === null || !isFinite(hours)) return "";
  const seconds = hours * 3600;
  if (seconds < 90) return `${Number(seconds.toPrecision(3))} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(1)} min`;
  if (hours < 72) return `${Number(hours.toPrecision(3))} h`;
  return `${(hours / 24).toFixed(2)} d`;
}
// Hours in the unit that fits a range: [factor, name].
const clockUnit = (range) => (range < 0.03 ? [3600, "s"] : range < 2 ? [60, "min"] : range < 96 ? [1, "h"] : [1 / 24, "d"]);

// About `number` round values from low to high, at least `least` apart, and their distance.
function ticks(low, high, number, least = 0) {
  const raw = Math.max((high - low) / Math.max(1, number), least);
  if (!(raw > 0)) return [[low], 1];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return [found, step];
}

function logTicks(low, high) {
  const span = Math.log10(high / low), found = [];
  const factors = span > 4 ? [1] : span > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  const every = span > 9 ? Math.ceil(span / 7) : 1;
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
    if (((e % every) + every) % every) continue;
    for (const factor of factors) {
      const value = factor * 10 ** e;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found.length > 1 ? found : ticks(low, high, 4)[0].filter((value) => value > 0);
}

const tip = el("div", { class: "tip", hidden: "" });
document.body.append(tip);
function showTip(event, rows) {
  tip.replaceChildren(...rows.map((row) => el("div", {}, ...row)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - 16 - box.width : event.clientX + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY - 20, innerHeight - box.height - 6))}px`;
}
const hideTip = () => { tip.hidden = true; };

function bisect(values, wanted) {
  let low = 0, high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && Math.abs(values[low - 1] - wanted) <= Math.abs(values[low] - wanted) ? low - 1 : low;
}
