"use strict";
// The profile that the page holds, what of it is shown, and how its figures read.
// Text from the profile enters the page as text nodes only.

// --- Data ---------------------------------------------------------------------------------------

const profile = JSON.parse(document.getElementById("profile").textContent);
const steps = Math.max(profile.instructions.length, 1);
const buffers = profile.buffers.map((row, index) => {
  const [name, bytes, ...rest] = row;
  const [shape, operation, layer, kind, source] = rest.slice(0, 5).map((i) => profile.strings[i]);
  const [start, end] = rest.slice(5);
  const text = [name, layer, operation, source, shape, kind].join("\n").toLowerCase();
  return { index, name, bytes, shape, operation, layer, kind, source, start, end, text };
});

/** Groups of buffers per way of grouping: what they are called and their colour, bottom first. */
const groupings = { kind: kindGroups(), layer: layerGroups() };

function kindGroups() {
  return profile.kinds.map(([key, colour]) => ({ key, label: key, colour }));
}

/** The largest layers (bytes times steps alive) have a colour each; the rest share one. */
function layerGroups() {
  const weight = new Map();
  for (const b of buffers) {
    weight.set(b.layer, (weight.get(b.layer) || 0) + b.bytes * (b.end - b.start + 1));
  }
  const named = [...weight.keys()].filter((layer) => layer);
  named.sort((a, b) => weight.get(b) - weight.get(a));
  const groups = named
    .slice(0, profile.palette.length)
    .map((key, i) => ({ key, label: key, colour: profile.palette[i] }));
  if (named.length > groups.length) {
    const label = `${named.length - groups.length} smaller layers`;
    groups.push({ key: "\0rest", label, colour: profile.rest_colour });
  }
  if (weight.has("")) {
    groups.push({ key: "", label: "no layer", colour: profile.none_colour });
  }
  return groups;
}

for (const [grouping, groups] of Object.entries(groupings)) {
  const places = new Map(groups.map((group, place) => [group.key, place]));
  groups.forEach((group) => Object.assign(group, { shades: shades(group.colour), hidden: false }));
  for (const b of buffers) {
    b[grouping + "Group"] = places.get(b[grouping]) ?? places.get("\0rest");
  }
}

/** Neighbours in a stack are told apart by shade. */
function shades(colour) {
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return [0, 0.1, -0.1].map((by) => {
    const mixed = parts.map((p) => Math.round(by > 0 ? p + (255 - p) * by : p * (1 + by)));
    return `rgb(${mixed.join()})`;
  });
}

// --- State --------------------------------------------------------------------------------------

const state = {
  grouping: "kind",
  query: "",
  step: Math.min(profile.peak_step, steps - 1),
  view: null, // {x0, x1: steps, y0, y1: bytes}
  hovered: null,
  held: null, // the buffer last clicked
  sort: { column: "bytes", descending: true },
  showAll: false,
  drag: null,
};
let order = []; // visible buffers, bottom of the stack first
let byStart = []; // their places in `order`, by first step
let inUse = new Float64Array(steps); // bytes of the visible buffers in every step
let runs = []; // rectangles of the current picture

const groupOf = (b) => groupings[state.grouping][b.group];
const matches = (b) => !state.query || b.text.includes(state.query);
const isAlive = (b, step) => b.start <= step && step <= b.end;

/** Decide who lies on whom: groups in order, in each the longest-lived at the bottom. */
function restack() {
  for (const b of buffers) b.group = b[state.grouping + "Group"];
  const life = (b) => b.end - b.start;
  order = buffers.filter((b) => b.bytes > 0 && !groupOf(b).hidden);
  order.sort(
    (a, b) => a.group - b.group || life(b) - life(a) || a.start - b.start || a.index - b.index,
  );
  order.forEach((b, place) => (b.shade = place % groupOf(b).shades.length));
  byStart = order.map((_, place) => place).sort((a, b) => order[a].start - order[b].start);
  const change = new Float64Array(steps + 1);
  for (const b of order) {
    change[b.start] += b.bytes;
    change[b.end + 1] -= b.bytes;
  }
  let total = 0;
  inUse = Float64Array.from({ length: steps }, (_, step) => (total += change[step]));
}

function fullView() {
  const most = inUse.reduce((a, b) => Math.max(a, b), 1);
  const capacity = profile.capacity_bytes || 0;
  const inRange = capacity && capacity < 1.5 * most && !groupings[state.grouping].some((g) => g.hidden);
  return { x0: 0, x1: steps, y0: 0, y1: 1.08 * Math.max(most, inRange ? capacity : 0) };
}

/** The stack at a step, bottom first: [buffer, first byte]. */
function stackAt(step) {
  let bytes = 0;
  return order.filter((b) => isAlive(b, step)).map((b) => [b, (bytes += b.bytes) - b.bytes]);
}

// --- Text ---------------------------------------------------------------------------------------

const units = ["B", "KiB", "MiB", "GiB", "TiB"];

function unitOf(bytes) {
  let unit = 0;
  while (unit < units.length - 1 && Math.abs(bytes) >= 1024 ** (unit + 1)) unit++;
  return unit;
}

function formatBytes(bytes) {
  const unit = unitOf(bytes);
  const value = bytes / 1024 ** unit;
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}

const formatCount = (n) => n.toLocaleString("en-US");
const plural = (n, noun) => `${formatCount(n)} ${noun}${n === 1 ? "" : "s"}`;

function formatShare(part, whole) {
  const percent = whole ? (100 * part) / whole : 0;
  return percent > 0 && percent < 0.1 ? "< 0.1 %" : `${percent.toFixed(1)} %`;
}


function formatLife(b) {
  const start = formatCount(b.start);
  return b.start === b.end ? start : `${start} to ${formatCount(b.end)}`;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function swatch(colour) {
  const made = element("span", { className: "swatch" });
  made.style.background = colour;
  return made;
}

const $ = (id) => document.getElementById(id);
