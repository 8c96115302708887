// Follows what happens: an element with data-events names a stream of events; at each one, htmx loads the parts of the page whose
// trigger is "news", and charts.js its lines anew. Without this script, or the stream, the page is as it was loaded.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const page = document.querySelector("[data-events]");
  if (!page || !window.EventSource) return;
  const light = document.querySelector("[data-following]");
  // What somebody ticked stays ticked when its table is loaded anew.
  const ticked = new Set();
  document.addEventListener("change", ({ target }) => { if (target.type === "checkbox") ticked[target.checked ? "add" : "delete"](target.value); });
  document.addEventListener("htmx:afterSwap", ({ target }) => {
    target.querySelectorAll("input[type=checkbox]").forEach((box) => { box.checked = ticked.has(box.value); });
  });
  const say = (state) => { if (light) { light.textContent = light.dataset[state]; light.dataset.following = state; } };
  let source = null;
  const open = () => {
    source = new EventSource(page.dataset.events);
    source.addEventListener("open", () => say("live"));
    source.addEventListener("error", () => say(source.readyState === EventSource.CLOSED ? "over" : "lost"));
    source.addEventListener("changed", () => {
      document.dispatchEvent(new Event("silotune:changed"));
      document.querySelectorAll("[hx-trigger~='news']").forEach((part) => htmx.trigger(part, "news"));
    });
  };
  open();
  // A page that nobody looks at holds no connection.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { source.close(); say("lost"); } else if (source.readyState === EventSource.CLOSED) open();
  });
});
