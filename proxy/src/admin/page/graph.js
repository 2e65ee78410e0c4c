// Draws who talks to whom: sources on the left, destinations on the right.

import { count, element, shape, table } from "./dom.js";

/** The number of parties in a column. The others are drawn as one. */
const MAX_PARTIES = 14;
const ROW = 44;
const WIDTH = 900;
const BOX = { width: 300, height: 30 };

/** The name of an end of a connection: its workload, or else its IP address. */
export function partyName(end) {
  if (end.workload) return `${end.namespace ? `${end.namespace}/` : ""}${end.workload}`;
  return end.address ? end.address.replace(/:\d+$/, "") : "unknown";
}

/** How a connection is drawn. */
function kind(connection) {
  if (connection.verdict !== "allowed") return "refused";
  return connection.protocol === "hbone" ? "mutual-tls" : "plain";
}

const KINDS = { "mutual-tls": "mutual TLS", plain: "plaintext", refused: "denied or failed" };

/** Groups the connections by source, destination and kind. The most frequent group first. */
export function traffic(connections) {
  const groups = new Map();
  for (const connection of connections) {
    const group = {
      source: partyName(connection.source), destination: partyName(connection.destination),
      kind: kind(connection), open: 0, total: 0, bytes: 0, reasons: new Set(),
    };
    const key = JSON.stringify([group.source, group.destination, group.kind]);
    const known = groups.get(key) ?? group;
    groups.set(key, known);
    known.total += 1;
    known.open += connection.state === "open" ? 1 : 0;
    known.bytes += (connection.bytes_sent ?? 0) + (connection.bytes_received ?? 0);
    if (known.kind === "refused" && connection.reason) known.reasons.add(connection.reason);
  }
  return [...groups.values()].sort((a, b) => b.total - a.total);
}

/** The groups as a table: the same facts as the drawing. */
export function trafficTable(groups, bytesText) {
  return table("Connections by source and destination", [
    ["Source", (group) => group.source],
    ["Destination", (group) => group.destination],
    ["Security", (group) => KINDS[group.kind]],
    ["Open", (group) => String(group.open), true],
    ["Listed", (group) => String(group.total), true],
    ["Bytes", (group) => bytesText(group.bytes), true],
    ["Reasons", (group) => [...group.reasons].join(", ")],
  ], groups, "No connections yet.");
}

/** The drawing. */
export function drawing(groups) {
  if (groups.length === 0) return element("p", { class: "muted" }, "No connections yet.");
  const left = column(groups, "source");
  const right = column(groups, "destination");
  const height = Math.max(left.names.length, right.names.length) * ROW + 24;
  const most = Math.max(...groups.map((group) => group.total));
  const lines = merged(groups, left, right).map((group) => line(group, left, right, most));
  const refused = groups.filter((group) => group.kind === "refused").length;
  const summary = `${count(left.names.length, "source")}, ${count(right.names.length, "destination")}, `
    + `${count(groups.length, "kind of connection", "kinds of connections")}, ${refused} of them denied or failed. `
    + "The table below has the same content.";
  return shape("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": summary },
    shape("text", { x: 0, y: 12, class: "muted" }, "source"),
    shape("text", { x: WIDTH - BOX.width, y: 12, class: "muted" }, "destination"),
    lines, boxes(left, 0), boxes(right, WIDTH - BOX.width));
}

/** The parties of a column and their places. */
function column(groups, side) {
  const totals = new Map();
  for (const group of groups) totals.set(group[side], (totals.get(group[side]) ?? 0) + group.total);
  const sorted = [...totals.keys()].sort((a, b) => totals.get(b) - totals.get(a));
  const names = sorted.length > MAX_PARTIES ? sorted.slice(0, MAX_PARTIES - 1) : sorted;
  const rest = sorted.length - names.length;
  const others = rest > 0 ? `${rest} others` : undefined;
  if (others) names.push(others);
  return { names, place: (name) => (names.includes(name) ? name : others) };
}

/** The groups after the parties without a place of their own have become one. */
function merged(groups, left, right) {
  const lines = new Map();
  for (const group of groups) {
    const [source, destination] = [left.place(group.source), right.place(group.destination)];
    const key = JSON.stringify([source, destination, group.kind]);
    const known = lines.get(key) ?? { source, destination, kind: group.kind, total: 0, open: 0 };
    known.total += group.total;
    known.open += group.open;
    lines.set(key, known);
  }
  return [...lines.values()];
}

const OFFSET = { "mutual-tls": 0, plain: -7, refused: 7 };

function line(group, left, right, most) {
  const y = (names, name) => 24 + names.indexOf(name) * ROW + BOX.height / 2 + OFFSET[group.kind];
  const [from, to] = [y(left.names, group.source), y(right.names, group.destination)];
  const [start, end] = [BOX.width, WIDTH - BOX.width];
  const width = 1.5 + 4 * Math.log1p(group.total) / Math.log1p(most);
  const text = `${group.source} to ${group.destination}: ${count(group.total, "connection")}, `
    + `${group.open} open, ${KINDS[group.kind]}`;
  const middle = (start + end) / 2;
  return shape("path", {
    d: `M${start} ${from} C${middle} ${from} ${middle} ${to} ${end} ${to}`,
    class: group.kind, "stroke-width": width.toFixed(1),
  }, shape("title", {}, text));
}

function boxes({ names }, x) {
  return names.map((name, index) => {
    const y = 24 + index * ROW;
    return shape("g", {},
      shape("rect", { x: x + 0.5, y: y + 0.5, width: BOX.width - 1, height: BOX.height - 1, rx: 6 }),
      shape("text", { x: x + 10, y: y + 20 }, shorten(name)),
      shape("title", {}, name));
  });
}

function shorten(name) {
  return name.length > 44 ? `${name.slice(0, 20)}…${name.slice(-22)}` : name;
}
