// Draws every element with data-chart: lines that the console gives as JSON, over time or over rounds. Colours are those of the style sheet.
// {times: [...], time: label, series: [{label, values: [...], cap, cap_label}], epsilon: label}: what was spent, in steps, below its cap
// {rounds: [...], x: label, series: [{label, values: [... or null]}], y: label, log: true for a logarithmic axis}
"use strict";

(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dashes = [[], [6, 4]];
  const colours = (told) => (told.rounds ? [...Array(8).keys()].map((i) => colour(`--series-${i}`)) : [colour("--fill"), colour("--amber")]);
  const moment = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");
  // As everywhere: an epsilon is never written below its value.
  const upwards = (value) => (Math.ceil(value * 1e4 - 1e-7) / 1e4).toFixed(4);

  const plain = (value) => String(Number(value.toPrecision(4)));

  function options(place, told, width) {
    const ink = colour("--muted"), line = colour("--line"), strokes = colours(told), byRound = Boolean(told.rounds);
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif" };
    const series = [{ label: told.x ?? told.time, value: (_, at) => (at == null ? "–" : byRound ? String(at) : moment(at)) }];
    told.series.forEach((one, i) => {
      const stroke = strokes[i % strokes.length];
      if (byRound) { series.push({ label: one.label, value: (_, value) => (value == null ? "–" : plain(value)), stroke, width: 2, dash: dashes[Math.floor(i / strokes.length) % 2], spanGaps: true, points: { show: told.rounds.length < 60, size: 5, fill: stroke } }); return; }
      series.push({ label: one.label, value: (_, spent) => (spent == null ? "–" : upwards(spent)), stroke, width: 2, dash: dashes[i], paths: uPlot.paths.stepped({ align: 1 }), points: { show: told.times.length < 60, size: 6, fill: stroke } });
      series.push({ label: one.cap_label, value: () => String(one.cap), stroke: colour("--danger"), width: 1.5, dash: [2, 3], points: { show: false } });
    });
    return {
      width, height: Math.max(230, Math.min(420, Math.round(width * 0.28))),
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      scales: byRound ? { x: { time: false }, y: { distr: told.log ? 3 : 1 } } : { y: { range: (_, low, high) => [0, (high || 1) * 1.08] } },
      axes: [byRound ? { ...axis, label: told.x, labelFont: axis.font, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] }
        : { ...axis, space: 110, values: (_, splits, __, ___, step) => splits.map((at) => (step >= 86400 ? moment(at).slice(0, 10) : moment(at).slice(5))) },
      { ...axis, label: told.y ?? told.epsilon, labelFont: axis.font, size: 60 }],
      series, legend: { live: width > 480 },
    };
  }

  function draw(place, told) {
    const data = [told.rounds ?? told.times];
    for (const one of told.series) { data.push(one.values); if (!told.rounds) data.push(told.times.map(() => one.cap)); }
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
    if ((told.rounds ?? told.times).length) draw(place, told); else place.textContent = place.dataset.empty;
  }

  const all = () => document.querySelectorAll("[data-chart]:not([data-drawn])").forEach(load);
  document.addEventListener("DOMContentLoaded", all);
  document.addEventListener("htmx:afterSwap", all);
})();
