// Draws the path of each kind of traffic through the rules, with the live counters.

import { count, element, table } from "./dom.js";

/** The explanation of the rules, as `/rules` and `underpass rules explain -o json` give it. */
export function rules(explanation) {
  if (!explanation.rules) {
    return element("p", { class: "muted" }, `Profile ${explanation.profile}. This proxy installs no rules.`);
  }
  const counters = new Map(explanation.rules.map((rule) => [rule.id, rule]));
  const isIntact = explanation.is_intact;
  return [
    isIntact !== undefined && element("p", { class: isIntact ? "good" : "bad" },
      isIntact ? "The rules are intact." : "The rules are not as this proxy installed them."),
    explanation.difference && element("pre", {}, explanation.difference),
    explanation.foreign_rules?.length > 0 && element("p", {}, `Rules of other programs before them: ${explanation.foreign_rules.join("; ")}`),
    explanation.errors?.map((error) => element("p", { class: "problem" }, error)),
    element("p", {}, `Profile ${explanation.profile}. The number on an arrow counts the packets that matched the rule; `
      + "a connection is redirected by its first packet."),
    explanation.flows?.map((flow) => drawFlow(flow, counters)),
    element("details", {}, element("summary", {}, "All rules"), ruleTable(explanation.rules)),
  ].flat().filter(Boolean);
}

function drawFlow(flow, counters) {
  return element("article", { class: "flow" },
    element("h3", {}, flow.title),
    flow.note && element("p", { class: "muted" }, flow.note),
    flow.hops.map((hop) => element("ol", { class: "path", "aria-label": `${flow.title}: ${hop.from} to ${hop.to ?? "nowhere"}` },
      steps(hop, counters))));
}

/** The boxes of a path. The arrow before each has the counters of the rules that led to it. */
function steps(hop, counters) {
  const boxes = [element("li", {}, element("span", { class: "box end" }, hop.from))];
  let arrow = [];
  for (const { table: tableName, chain, rules: matched } of hop.traversed) {
    boxes.push(element("li", {}, edge(arrow, counters), element("span", { class: "box" }, `${tableName} ${chain}`)));
    arrow = matched;
  }
  boxes.push(element("li", {}, edge(arrow, counters), element("span", { class: "box end" }, destination(hop))));
  return boxes;
}

function edge(matched, counters) {
  const labels = matched.map((id) => {
    const packets = counters.get(id)?.packets;
    return packets === undefined ? id : `${id} ${packets.toLocaleString("en")}`;
  });
  return element("span", { class: "edge" }, labels.length > 0 && element("span", { class: "mono" }, labels.join(", ")));
}

const ENDS = { rejected: "rejected", dropped: "dropped" };

function destination({ to, end }) {
  const port = end.port === undefined ? "" : `:${end.port}`;
  return ENDS[end.kind] ?? `${to ?? "not delivered"}${port}`;
}

function ruleTable(listed) {
  const number = (value) => (value === undefined ? "–" : value.toLocaleString("en"));
  return table(count(listed.length, "rule"), [
    ["Chain", (rule) => `${rule.table} ${rule.chain}`],
    ["Rule", (rule) => rule.id],
    ["Reason", (rule) => rule.reason],
    ["Expression", (rule) => element("code", {}, rule.text)],
    ["Packets", (rule) => number(rule.packets), true],
    ["Bytes", (rule) => number(rule.bytes), true],
  ], listed, "No rules.");
}
