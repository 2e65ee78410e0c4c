// Renders each section of the page from the JSON of the proxy.

import { bytes, count, element, span, table } from "./dom.js";
import { partyName } from "./graph.js";

const MAX_ROWS = 200;

const optional = (text) => text ?? "–";
const milliseconds = (value) => {
  if (value === undefined) return "–";
  return value < 10 ? `${value.toFixed(1)} ms` : span(value / 1000);
};
const remedy = (text) => text && element("div", { class: "hint" }, text);

function listed(caption, list, style) {
  return table(caption, [
    ["Part", (problem) => problem.part.replaceAll("_", " ")],
    ["Pod", (problem) => optional(problem.pod)],
    ["Problem", (problem) => [element("span", { class: style }, problem.problem), remedy(problem.hint)]],
  ], list, "None.");
}

/** What is pending or wrong, and notices. */
export function problems(status) {
  const problems = status.problems.length === 0
    ? element("p", { class: "good" }, "None.")
    : listed("What is pending or wrong", status.problems, "problem");
  if (status.notices.length === 0) return problems;
  return element("div", {}, [problems, listed("Notices", status.notices)]);
}

/** The verdict, and why. */
function verdict(connection) {
  const isGood = connection.verdict === "allowed";
  const reason = connection.error ?? connection.reason;
  const by = connection.policy && connection.verdict !== "failed" && `by ${connection.policy}`;
  return [
    element("span", { class: isGood ? "good" : "bad" }, [connection.verdict, by].filter(Boolean).join(" ")),
    reason && element("div", {}, reason), remedy(connection.hint),
  ];
}

function party(end) {
  const name = partyName(end);
  const identity = end.identity ?? (end.is_claimed ? "not proven" : undefined);
  return [element("span", { title: identity }, name), end.address && end.address !== name
    && element("div", { class: "muted mono" }, end.address)];
}

/** Open and recent connections, the newest first. */
export function connections(listed, words, onlyFailed) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = listed.filter((connection) => {
    if (onlyFailed && connection.verdict === "allowed") return false;
    const text = JSON.stringify(connection).toLowerCase();
    return wanted.every((word) => text.includes(word));
  }).reverse();
  const shown = matches.slice(0, MAX_ROWS);
  const caption = matches.length > shown.length
    ? `The newest ${shown.length} of ${matches.length} connections`
    : count(shown.length, "connection");
  return table(caption, [
    ["State", (connection) => connection.state],
    ["Source", (connection) => party(connection.source)],
    ["Destination", (connection) => party(connection.destination)],
    ["Direction", (connection) => connection.direction],
    ["Protocol", (connection) => connection.protocol],
    ["Verdict", verdict],
    ["Sent", (connection) => bytes(connection.bytes_sent), true],
    ["Received", (connection) => bytes(connection.bytes_received), true],
    ["First byte", (connection) => milliseconds(connection.first_byte_ms), true],
    ["Time", (connection) => milliseconds(connection.duration_ms), true],
  ], shown, "No connection matches.");
}

/** Failures of the last minutes: connections by reason, and names. */
export function failures({ failures: { minutes, connections: failed, dns } }) {
  const last = ({ last }) => last && [
    `${partyName(last.source)} → ${partyName(last.destination)}`,
    element("div", {}, optional(last.error)), remedy(last.hint)];
  return [
    table(`Connections in the last ${count(minutes, "minute")}, by reason`, [
      ["Reason", (failure) => failure.reason],
      ["Count", (failure) => String(failure.count), true],
      ["The last one", (failure) => last(failure) ?? "–"],
    ], failed, `No connection failed in the last ${count(minutes, "minute")}.`),
    table("Names that could not be resolved", [
      ["Name", (failure) => `${failure.name} ${failure.type ?? ""}`],
      ["Pod", (failure) => failure.pod],
      ["Reason", (failure) => [failure.error ?? failure.reason, remedy(failure.hint)]],
      ["Count", (failure) => String(failure.count), true],
      ["Last", (failure) => `${span(failure.last_seconds_ago)} ago`, true],
    ], dns, "No name failed to resolve."),
  ];
}

/** The pods of a node. */
export function pods(status) {
  if (status.command !== "node") return element("p", {}, `This proxy serves one pod: ${status.name}.`);
  const listed = status.pods ?? [];
  return table(count(listed.length, "pod"), [
    ["Pod", (pod) => pod.pod],
    ["State", (pod) => element("span", { class: pod.has_failed ? "bad" : undefined }, pod.state)],
    ["For", (pod) => (pod.for_seconds === undefined ? "–" : span(pod.for_seconds)), true],
    ["Detail", (pod) => [optional(pod.detail), remedy(pod.hint)]],
  ], listed, "This node has no pods.");
}

/** The tunnels to peers and of peers. */
export function tunnels({ tunnels: { outbound, inbound } }) {
  return [
    table("Tunnels to peers", [
      ["Pod", (peer) => peer.pod],
      ["Address", (peer) => element("span", { class: "mono" }, optional(peer.address))],
      ["Identity", (peer) => peer.identities.join(", ")],
      ["Tunnels", (peer) => String(peer.tunnels), true],
      ["Streams", (peer) => String(peer.streams), true],
      ["Problem", (peer) => [peer.error ?? (peer.dialing > 0 ? "connecting" : "–"), remedy(peer.hint)]],
    ], outbound, "No tunnel to a peer."),
    table("Tunnels of peers", [
      ["Pod", (peer) => peer.pod],
      ["Identity", (peer) => peer.identity],
      ["Tunnels", (peer) => String(peer.tunnels), true],
      ["Oldest", (peer) => span(peer.oldest_seconds), true],
    ], inbound, "No tunnel of a peer."),
  ];
}

/** The certificates of the pods. */
export function certificates(listed) {
  return table(count(listed.length, "certificate"), [
    ["Identity", (certificate) => certificate.identity],
    ["State", (certificate) =>
      element("span", { class: certificate.state === "valid" ? "good" : "bad" }, certificate.state)],
    ["Expires", (certificate) => (certificate.expires_in_seconds === undefined ? "–"
      : element("span", { title: certificate.expires }, expiry(certificate.expires_in_seconds)))],
    ["Pods", (certificate) => certificate.pods.join(", ")],
    ["Issued by roots of", (certificate) => [...new Set(certificate.roots.map((root) => root.trust_domain))].join(", ")],
  ], listed, "No certificate.");
}

function expiry(seconds) {
  return seconds < 0 ? span(seconds) : `in ${span(seconds)}`;
}
