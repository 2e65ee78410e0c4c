// Reads the state of the proxy every few seconds and shows it.

import { bytes, count, element, replace, span } from "./dom.js";
import { drawing, traffic, trafficTable } from "./graph.js";
import { rules } from "./rules.js";
import * as sections from "./sections.js";

const INTERVAL_MS = 3000;
const TIMEOUT_MS = 5000;
/** The number of connections that are listed. */
const LAST = 2000;

const byId = (id) => document.getElementById(id);
const content = (id) => byId(id).querySelector(".content");
const state = { connections: [], isPaused: false, refreshes: 0 };

async function read(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
  const text = await response.text();
  if (!response.ok) throw new Error(`${path}: ${response.status} ${text.trim()}`);
  return text;
}

const readJson = async (path) => JSON.parse(await read(path));
const readLines = async (path) => (await read(path)).split("\n").filter(Boolean).map((line) => JSON.parse(line));

function showHeader(status) {
  byId("name").textContent = status.name;
  document.title = `${status.healthy ? "" : "⚠ "}${status.name} – underpass`;
  const health = byId("health");
  health.className = status.healthy ? "good" : "bad";
  const text = status.healthy ? "Healthy" : `Not healthy: ${count(status.problems.length, "problem")}`;
  // A screen reader announces each change of this text.
  if (health.textContent !== text) health.textContent = text;
  const { mesh, connections } = status;
  const open = connections.outbound_hbone + connections.outbound_tcp + connections.inbound_hbone + connections.inbound_tcp;
  const plane = mesh.control_plane;
  const facts = [
    `version ${status.version}`,
    `running for ${span(status.uptime_seconds)}`,
    status.readiness,
    `${count(mesh.workloads, "workload")}, ${count(mesh.services, "service")}, ${count(mesh.policies, "policy", "policies")}`,
    plane && `control plane ${plane.address} ${plane.connected ? "connected" : "disconnected"} for ${span(plane.for_seconds)}`,
    `${count(open, "open connection")}`,
  ];
  byId("facts").textContent = facts.filter(Boolean).join(" · ");
}

function showConnections() {
  const listed = sections.connections(state.connections, byId("words").value, byId("only-failed").checked);
  replace(content("connections"), listed);
}

/** Offers the pods of a node, and keeps the selection. */
function showPods({ command, pods = [] }) {
  byId("rules-of").hidden = command !== "node";
  const names = pods.filter((pod) => ["serving", "draining"].includes(pod.state)).map((pod) => pod.pod);
  const selected = byId("rules-pod").value;
  replace(byId("rules-pod"), names.map((name) => element("option", { value: name }, name)));
  if (names.includes(selected)) byId("rules-pod").value = selected;
}

/** The rules of the selected pod, or the reason why there are none. */
async function readRules({ command }) {
  const pod = byId("rules-pod").value;
  if (command === "node" && !pod) return element("p", { class: "muted" }, "No pod is served.");
  try {
    return rules(await readJson(command === "node" ? `rules?pod=${encodeURIComponent(pod)}` : "rules"));
  } catch (error) {
    return element("p", { class: "muted" }, error.message);
  }
}

/** Shows the current state, unless a later call has begun meanwhile: it may have another pod. */
async function refresh() {
  state.refreshes += 1;
  const own = state.refreshes;
  try {
    const status = await readJson("status");
    if (own !== state.refreshes) return;
    showHeader(status);
    showPods(status);
    const [connections, certificates, drawnRules] = await Promise.all([
      readLines(`connections?last=${LAST}`), readJson("certificates"), readRules(status),
    ]);
    if (own !== state.refreshes) return;
    show(status, connections, certificates, drawnRules);
    byId("alert").hidden = true;
  } catch (error) {
    if (own !== state.refreshes) return;
    byId("alert").textContent = `This page cannot be updated: ${error.message}`;
    byId("alert").hidden = false;
  }
}

function show(status, connections, certificates, drawnRules) {
  state.connections = connections;
  replace(content("problems"), sections.problems(status));
  const groups = traffic(connections);
  replace(byId("graph"), drawing(groups));
  replace(content("traffic"), trafficTable(groups, bytes));
  showConnections();
  replace(content("failures"), sections.failures(status));
  replace(content("rules"), drawnRules);
  replace(content("pods"), sections.pods(status));
  replace(content("tunnels"), sections.tunnels(status));
  replace(content("certificates"), sections.certificates(certificates));
  byId("updated").textContent = `Updated at ${new Date().toLocaleTimeString()}`;
}

async function run() {
  for (;;) {
    if (!state.isPaused && !document.hidden) await refresh();
    await new Promise((resolve) => { setTimeout(resolve, INTERVAL_MS); });
  }
}

byId("pause").addEventListener("click", ({ currentTarget }) => {
  state.isPaused = !state.isPaused;
  currentTarget.setAttribute("aria-pressed", String(state.isPaused));
});
byId("filter").addEventListener("submit", (event) => event.preventDefault());
byId("words").addEventListener("input", showConnections);
byId("only-failed").addEventListener("change", showConnections);
byId("rules-pod").addEventListener("change", refresh);
run();
