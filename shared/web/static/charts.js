// Draws every element with data-chart: lines that the console gives as JSON. Over time or over rounds, each with a cap or without:
// {times | rounds: [...], time | x: label, series: [{label, values: [... or null], cap?, cap_label?}]}, and `epsilon`, a label, of what
// was spent, in steps; or `y`, a label, of anything else, with `upwards` or `log` (an axis) where they fit. Colours are those of the
// style sheet.
"use strict";

(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dashes = [[], [6, 4], [2, 3], [10, 3, 2, 3]];
  const colours = (told) => (told.rounds ? [...Array(8).keys()].map((i) => `--series-${i}`) : ["--fill", "--amber"]).map(colour);
  const moment = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");
  // As everywhere: an epsilon is never written below its value.
  const upwards = (value) => (Math.ceil(value * 1e4 - 1e-7) / 1e4).toFixed(4);
  const xs = (told) => told.times || told.rounds;

  function data(told) {
    const found = [xs(told)];
    for (const one of told.series) {
      found.push(one.values);
      if (one.cap != null) found.push(found[0].map(() => one.cap));
    }
    return found;
  }

  function options(told, width) {
    const strokes = colours(told);
    const ink = colour("--muted"), line = colour("--line"), timed = Boolean(told.times), spent = told.epsilon != null;
    const written = spent || told.upwards ? upwards : (value) => String(Number(value.toPrecision(4)));
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif" };
    const labelled = { ...axis, labelFont: axis.font };
    const series = [{ label: timed ? told.time : told.x, value: (_, x) => (x == null ? "–" : timed ? moment(x) : String(x)) }];
    told.series.forEach((one, i) => {
      const stroke = strokes[i % strokes.length], dash = dashes[(timed ? i : Math.floor(i / strokes.length)) % dashes.length];
      series.push({ label: one.label, value: (_, y) => (y == null ? "–" : written(y)), stroke, width: 2, dash, spanGaps: true, paths: spent ? uPlot.paths.stepped({ align: 1 }) : undefined, points: { show: xs(told).length < 60, size: 6, fill: stroke } });
      if (one.cap != null) series.push({ label: one.cap_label, value: () => String(one.cap), stroke: colour("--danger"), width: 1.5, dash: [2, 3], points: { show: false } });
    });
    const across = timed
      ? { ...axis, space: 110, values: (_, splits, __, ___, step) => splits.map((at) => (step >= 86400 ? moment(at).slice(0, 10) : moment(at).slice(5))) }
      : { ...labelled, label: told.x, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] };
    return {
      width, height: Math.max(230, Math.min(420, Math.round(width * 0.28))),
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      scales: { x: { time: timed }, y: spent || told.upwards ? { range: (_, low, high) => [0, (high || 1) * 1.08] } : { distr: told.log ? 3 : 1 } },
      axes: [across, { ...labelled, label: told.epsilon || told.y, size: 56 }],
      series, legend: { live: width > 480 },
    };
  }

  function draw(place, told) {
    const make = () => { place.replaceChildren(); return new uPlot(options(told, place.clientWidth), data(told), place); };
    let plot = make(), width = place.clientWidth;
    new ResizeObserver(() => {
      if (place.clientWidth === width || !place.clientWidth) return;
      width = place.clientWidth; plot.destroy(); plot = make();
    }).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { plot.destroy(); plot = make(); });
    document.addEventListener("silotune:changed", async () => {
      const found = await fetched(place);
      if (!found) return;
      const same = found.series.length === told.series.length;
      told = found;
      if (same) plot.setData(data(told)); else { plot.destroy(); plot = make(); }
    });
  }

  async function fetched(place, headers = { "x-live": "1" }) {
    const answer = await fetch(place.dataset.chart, { headers: { accept: "application/json", ...headers } });
    return answer.ok ? answer.json() : null;
  }

  async function load(place) {
    place.dataset.drawn = "1";
    const told = await fetched(place, {});
    if (!told) place.textContent = place.dataset.missing;
    else if (xs(told).length) draw(place, told);
    else place.textContent = place.dataset.empty;
  }

  const all = () => document.querySelectorAll("[data-chart]:not([data-drawn])").forEach(load);
  document.addEventListener("DOMContentLoaded", all);
  document.addEventListener("htmx:afterSwap", all);
})();
