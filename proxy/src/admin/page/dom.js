// Creates the elements of the page. All text from the proxy becomes text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `attributes` may contain `class`, `title`, `data-key` and others. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false && child !== ""));
  return node;
}

/**
 * A table with a caption. `columns` are `[heading, cell(row), isNumber]`. A cell is a text, a node,
 * or a list of them.
 * Without rows it is the sentence `empty`.
 */
export function table(caption, columns, rows, empty) {
  if (rows.length === 0) return element("p", { class: "muted" }, empty);
  const heads = columns.map(([heading, , isNumber]) =>
    element("th", { scope: "col", class: isNumber && "number" }, heading));
  const body = rows.map((row) => element("tr", {}, columns.map(([, cell, isNumber]) =>
    element("td", { class: isNumber && "number" }, cell(row) ?? ""))));
  // A table that is wider than the window scrolls, by keyboard too.
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, heads)),
      element("tbody", {}, body)));
}

/** The elements whose focus and scroll position survive a replacement, found by their order. */
const KEPT = ".scroll, summary";

/**
 * Replaces the content of a node if it differs, so that a selection survives. Opened details, the
 * scroll position and the focus survive a change too.
 */
export function replace(node, ...children) {
  const next = node.cloneNode(false);
  next.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  const details = [...node.querySelectorAll("details")];
  next.querySelectorAll("details").forEach((one, index) => { one.open = details[index]?.open ?? false; });
  if (next.innerHTML === node.innerHTML) return;
  const before = [...node.querySelectorAll(KEPT)];
  const focused = before.indexOf(document.activeElement);
  const offsets = before.map((one) => [one.scrollLeft, one.scrollTop]);
  node.replaceChildren(...next.childNodes);
  const after = [...node.querySelectorAll(KEPT)];
  after.forEach((one, index) => { [one.scrollLeft, one.scrollTop] = offsets[index] ?? [0, 0]; });
  after[focused]?.focus({ preventScroll: true });
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** A number of bytes with a unit. */
export function bytes(count) {
  let unit = 0;
  for (; count >= 1024 && unit < UNITS.length - 1; unit += 1) count /= 1024;
  return `${unit === 0 ? count : count.toFixed(1)} ${UNITS[unit]}`;
}

/** Seconds as the two largest units. */
export function span(seconds) {
  if (seconds < 0) return `${span(-seconds)} ago`;
  if (seconds === 0) return "0 s";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => seconds >= size);
  const parts = units.slice(first, first + 2).map(([name, size], index, both) => {
    const rest = index === 0 ? seconds : seconds % both[0][1];
    return [Math.floor(rest / size), name];
  });
  return parts.filter(([count]) => count > 0).map(([count, name]) => `${count} ${name}`).join(" ");
}

/** A count with its noun. */
export function count(number, noun, plural = `${noun}s`) {
  return `${number} ${number === 1 ? noun : plural}`;
}
