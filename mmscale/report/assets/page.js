// Puts the figures on the page and listens to the bar above them.
"use strict";
(function () {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const wish = new URLSearchParams(location.search).get("theme");
  root.dataset.theme = wish === "dark" || wish === "light" ? wish : dark.matches ? "dark" : "light";
  dark.addEventListener("change", () => { root.dataset.theme = dark.matches ? "dark" : "light"; redraw(); });

  const buttons = Object.entries(AXES).map(([name, text]) => {
    const known = DATA.runs.some((run) => run.groups.some((group) => group[name].some((x) => x !== null)));
    const button = el("button", { type: "button", id: `axis-${name}`, onclick: () => { state.axis = name; state.zoom = null; redraw(); } }, text);
    button.disabled = !known;
    if (!known) button.title = "no run has numbers for it";
    return [name, button];
  });
  const reset = el("button", { type: "button", onclick: () => { state.zoom = null; redraw(); } }, "Reset zoom");
  const smooth = el("input", { type: "range", min: 0, max: 10, step: 0.5, value: state.smooth, oninput: (event) => { state.smooth = Number(event.target.value); charts.forEach((chart) => chart.draw()); } });
  const events = el("input", { type: "checkbox", onchange: (event) => { state.events = event.target.checked; redraw(); } });
  events.checked = true;
  const theme = el("button", { type: "button", title: "light or dark", onclick: () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; redraw(); } }, "◐");
  document.getElementById("tools").append(
    el("div", { class: "choice", role: "group", "aria-label": "x axis" }, ...buttons.map(([, button]) => button)),
    el("label", {}, "smoothing", smooth), el("label", {}, events, "faults and resumes"), reset, theme);

  for (const spec of DATA.charts) {
    const parent = document.querySelector(`[data-section="${spec.section}"]`);
    charts.push(new Chart(spec, parent));
  }
  listeners.push(() => {
    buttons.forEach(([name, button]) => button.setAttribute("aria-pressed", String(name === state.axis)));
    reset.disabled = !state.zoom;
    charts.forEach((chart) => chart.draw());
  });
  const layers = document.getElementById("layer-maps");
  if (layers) new LayersView(layers);
  const timelines = document.getElementById("timelines");
  DATA.runs.forEach((run) => timelineOf(run, timelines));
  redraw();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  root.dataset.ready = "yes";
})();
