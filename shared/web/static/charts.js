// Draws every element with data-chart: a line over time that the console gives as JSON
// {times: [...], series: [{label, values: [...], cap}], epsilon: label of the axis}. Colours are those of the style sheet.
"use strict";

(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dashes = [[], [6, 4]];
  const moment = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");
  // As everywhere: an epsilon is never written below its value.
  const upwards = (value) => (Math.ceil(value * 1e4 - 1e-7) / 1e4).toFixed(4);

  function options(place, told, width) {
    const ink = colour("--muted"), line = colour("--line"), strokes = [colour("--fill"), colour("--amber")];
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif" };
    const series = [{ label: told.time, value: (_, seconds) => (seconds == null ? "–" : moment(seconds)) }];
    told.series.forEach((one, i) => {
      series.push({ label: one.label, value: (_, spent) => (spent == null ? "–" : upwards(spent)), stroke: strokes[i], width: 2, dash: dashes[i], paths: uPlot.paths.stepped({ align: 1 }), points: { show: told.times.length < 60, size: 6, fill: strokes[i] } });
      series.push({ label: one.cap_label, value: () => String(one.cap), stroke: colour("--danger"), width: 1.5, dash: [2, 3], points: { show: false } });
    });
    return {
      width, height: Math.max(230, Math.min(420, Math.round(width * 0.28))),
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      scales: { y: { range: (_, low, high) => [0, (high || 1) * 1.08] } },
      axes: [{ ...axis, space: 110, values: (_, splits, __, ___, step) => splits.map((at) => (step >= 86400 ? moment(at).slice(0, 10) : moment(at).slice(5))) }, { ...axis, label: told.epsilon, labelFont: axis.font, size: 56 }],
      series, legend: { live: width > 480 },
    };
  }

  function draw(place, told) {
    const data = [told.times];
    for (const one of told.series) { data.push(one.values); data.push(told.times.map(() => one.cap)); }
    const make = () => { place.replaceChildren(); return new uPlot(options(place, told, place.clientWidth), data, place); };
    let plot = make(), width = place.clientWidth;
    new ResizeObserver(() => {
      if (place.clientWidth === width || !place.clientWidth) return;
      width = place.clientWidth; plot.destroy(); plot = make();
    }).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { plot.destroy(); plot = make(); });
  }

  async function load(place) {
    place.dataset.drawn = "1";
    const answer = await fetch(place.dataset.chart, { headers: { accept: "application/json" } });
    if (!answer.ok) { place.textContent = place.dataset.missing; return; }
    const told = await answer.json();
    if (told.times.length) draw(place, told); else place.textContent = place.dataset.empty;
  }

  const all = () => document.querySelectorAll("[data-chart]:not([data-drawn])").forEach(load);
  document.addEventListener("DOMContentLoaded", all);
  document.addEventListener("htmx:afterSwap", all);
})();
