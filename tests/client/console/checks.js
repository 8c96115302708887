// What of a page does not fit WCAG 2.2 AA, as far as a script can tell: contrast of text, names of controls, sizes, headings, width.
() => {
  const found = [];
  const shown = (e) => e.getClientRects().length && getComputedStyle(e).visibility !== "hidden";
  const luminance = (c) => {
    const f = (x) => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]);
  };
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const behind = (e) => {
    for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] === 1) return c; }
    return [255, 255, 255];
  };
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !shown(e) || e.closest("svg, .skip, .u-wrap, option")) continue;
    const style = getComputedStyle(e), [a, b] = [luminance(rgb(style.color)), luminance(behind(e))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if ((a + 0.05) / (b + 0.05) < (large ? 3 : 4.5)) found.push(`contrast of ${e.tagName} ${e.textContent.trim().slice(0, 30)}`);
  }
  for (const e of document.querySelectorAll("input:not([type=hidden]), select"))
    if (shown(e) && !e.labels?.length && !e.getAttribute("aria-label")) found.push(`no label for ${e.name}`);
  for (const e of document.querySelectorAll("a, button, summary"))
    if (shown(e) && !(e.textContent.trim() || e.getAttribute("aria-label"))) found.push(`no name for ${e.outerHTML.slice(0, 60)}`);
  for (const e of document.querySelectorAll("a:not(p a, td a, li a, .note a), button, input:not([type=hidden]), select")) {
    const box = e.getBoundingClientRect();
    if (shown(e) && e.type !== "radio" && (box.width < 24 || box.height < 24) && !e.closest(".skip")) found.push(`small: ${e.outerHTML.slice(0, 60)}`);
  }
  if (document.querySelectorAll("h1").length !== 1) found.push("not one h1");
  if (document.querySelectorAll("main").length !== 1) found.push("not one main");
  for (const e of document.querySelectorAll("[id]")) if (document.querySelectorAll(`[id="${e.id}"]`).length > 1) found.push(`twice: ${e.id}`);
  if (document.documentElement.scrollWidth > innerWidth) found.push(`wider than ${innerWidth}`);
  return [...new Set(found)];
}
