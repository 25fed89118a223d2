"use strict";
// What the page does: selecting, zooming, finding, and the text around the picture.

// --- Selecting ----------------------------------------------------------------------------------

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function select(step) {
  state.step = clamp(step, 0, steps - 1);
  state.showAll = false;
  listGroups();
  listAlive();
  redraw("overlay");
}

/** Bring a step into view, the zoom as it is. */
function reveal(step) {
  const { x0, x1 } = state.view;
  if (step < x0 || step + 1 > x1) moveTo({ x0: step + 0.5 - (x1 - x0) / 2, x1: step + 0.5 + (x1 - x0) / 2 });
}

function hold(buffer) {
  state.held = buffer;
  for (const row of $("alive").tBodies[0].rows) {
    row.classList.toggle("held", row.buffer !== undefined && row.buffer === buffer);
  }
  redraw("overlay");
}

// --- Zooming ------------------------------------------------------------------------------------

/** Change the view, kept within the schedule and above zero bytes. */
function moveTo(change) {
  const view = { ...state.view, ...change };
  const full = fullView();
  const span = clamp(view.x1 - view.x0, Math.min(2, steps), steps);
  const height = clamp(view.y1 - view.y0, full.y1 / 1e6, full.y1);
  view.x0 = clamp(view.x0, 0, steps - span);
  view.y0 = clamp(view.y0, 0, full.y1 - height);
  state.view = { x0: view.x0, x1: view.x0 + span, y0: view.y0, y1: view.y0 + height };
  redraw();
}

/** Zoom by a factor (below 1: closer) around a point of the plot. */
function zoomSteps(factor, x = size().width / 2) {
  const { x0, x1 } = state.view;
  const share = x / size().width;
  const span = clamp((x1 - x0) * factor, Math.min(2, steps), steps);
  const start = x0 + (x1 - x0 - span) * share;
  moveTo({ x0: start, x1: start + span });
}

function zoomBytes(factor, y) {
  const { y0, y1 } = state.view;
  const share = 1 - y / size().height;
  const span = Math.min((y1 - y0) * factor, fullView().y1);
  const start = y0 + (y1 - y0 - span) * share;
  moveTo({ y0: start, y1: start + span });
}

function reset() {
  state.view = fullView();
  redraw();
}

// --- Pointer ------------------------------------------------------------------------------------

const pointIn = (target, event) => {
  const box = target.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

function bufferAt(x, y) {
  const bytes = bytesAt(y);
  const stack = stackAt(Math.floor(stepAt(x)));
  const hit = stack.find(([b, bottom]) => bottom <= bytes && bytes < bottom + b.bytes);
  return hit ? hit[0] : null;
}

plot.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  const [x, y] = pointIn(plot, event);
  state.drag = { x, y, view: { ...state.view }, moved: false, box: null };
  plot.setPointerCapture(event.pointerId);
});

plot.addEventListener("pointermove", (event) => {
  const [x, y] = pointIn(plot, event);
  const { drag } = state;
  if (drag) {
    drag.moved ||= Math.hypot(x - drag.x, y - drag.y) > 4;
    if (!drag.moved) return;
    hideTooltip();
    if (event.shiftKey && !drag.box) {
      const dx = ((drag.x - x) / size().width) * (drag.view.x1 - drag.view.x0);
      const dy = ((y - drag.y) / size().height) * (drag.view.y1 - drag.view.y0);
      const { x0, x1, y0, y1 } = drag.view;
      moveTo({ x0: x0 + dx, x1: x1 + dx, y0: y0 + dy, y1: y1 + dy });
    } else {
      drag.box = boxBetween(drag, { x, y });
      redraw("overlay");
    }
    return;
  }
  const buffer = bufferAt(x, y);
  if (buffer) showTooltip(buffer, event.clientX, event.clientY);
  else hideTooltip();
});

/** A box that is hardly higher than a line means steps only. */
function boxBetween(from, to) {
  const { width, height } = size();
  const flat = Math.abs(from.y - to.y) < 24;
  return {
    left: clamp(Math.min(from.x, to.x), 0, width),
    right: clamp(Math.max(from.x, to.x), 0, width),
    top: flat ? 0 : clamp(Math.min(from.y, to.y), 0, height),
    bottom: flat ? height : clamp(Math.max(from.y, to.y), 0, height),
  };
}

plot.addEventListener("pointerup", (event) => {
  const { drag } = state;
  state.drag = null;
  if (!drag) return;
  const [x, y] = pointIn(plot, event);
  if (drag.box) {
    const { left, right, top, bottom } = drag.box;
    const across = right - left > 6 ? { x0: stepAt(left), x1: stepAt(right) } : {};
    moveTo({ ...across, y0: bytesAt(bottom), y1: bytesAt(top) });
  } else if (!drag.moved) {
    state.held = bufferAt(x, y);
    select(Math.floor(stepAt(x)));
  }
});

plot.addEventListener("pointercancel", () => {
  state.drag = null;
  redraw("overlay");
});
plot.addEventListener("pointerleave", hideTooltip);
plot.addEventListener("dblclick", reset);
plot.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    hideTooltip();
    const [x, y] = pointIn(plot, event);
    const scale = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 30 : 1;
    if (event.shiftKey) {
      zoomBytes(Math.exp((event.deltaY || event.deltaX) * scale * 0.0015), y);
    } else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      const by = ((event.deltaX * scale) / size().width) * (state.view.x1 - state.view.x0);
      moveTo({ x0: state.view.x0 + by, x1: state.view.x1 + by });
    } else {
      zoomSteps(Math.exp(event.deltaY * scale * 0.0015), x);
    }
  },
  { passive: false },
);

for (const type of ["pointerdown", "pointermove"]) {
  $("overview").addEventListener(type, (event) => {
    if (event.buttons !== 1) return;
    $("overview").setPointerCapture(event.pointerId);
    const middle = (pointIn($("overview"), event)[0] / $("overview").clientWidth) * steps;
    const span = state.view.x1 - state.view.x0;
    moveTo({ x0: middle - span / 2, x1: middle + span / 2 });
  });
}

// --- Keyboard -----------------------------------------------------------------------------------

const keys = {
  ArrowLeft: (event) => goTo(state.step - (event.shiftKey ? 10 : 1)),
  ArrowRight: (event) => goTo(state.step + (event.shiftKey ? 10 : 1)),
  ArrowUp: () => walk(1),
  ArrowDown: () => walk(-1),
  Home: () => goTo(0),
  End: () => goTo(steps - 1),
  p: () => goTo(profile.peak_step),
  "+": () => zoomSteps(0.7, xOf(state.step + 0.5)),
  "=": () => zoomSteps(0.7, xOf(state.step + 0.5)),
  "-": () => zoomSteps(1 / 0.7, xOf(state.step + 0.5)),
  0: reset,
  Escape: () => {
    hideTooltip();
    hold(null);
  },
};

plot.addEventListener("keydown", (event) => {
  const act = keys[event.key] || keys[event.key.toLowerCase()];
  if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act(event);
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input[type=search]")) return;
  event.preventDefault();
  $("query").focus();
});

function goTo(step) {
  hideTooltip();
  select(step);
  reveal(state.step);
}

/** Hover the next buffer up or down the stack of the selected step. */
function walk(by) {
  const stack = stackAt(state.step).filter(([b]) => matches(b));
  if (stack.length === 0) return;
  reveal(state.step);
  const at = stack.findIndex(([b]) => b === state.hovered);
  const next = at < 0 ? (by > 0 ? 0 : stack.length - 1) : clamp(at + by, 0, stack.length - 1);
  const [buffer, bottom] = stack[next];
  const box = plot.getBoundingClientRect();
  const y = clamp(yOf(bottom + buffer.bytes / 2), 0, size().height);
  showTooltip(buffer, box.left + xOf(state.step + 0.5), box.top + y);
  $("announcement").textContent = $("tooltip").innerText; // a screen reader does not see it appear
}

// --- Tooltip ------------------------------------------------------------------------------------

function showTooltip(buffer, x, y) {
  const tooltip = $("tooltip");
  if (buffer !== state.hovered || tooltip.hidden) {
    state.hovered = buffer;
    const life = plural(buffer.end - buffer.start + 1, "step");
    const facts = {
      size: `${formatBytes(buffer.bytes)}  (${plural(buffer.bytes, "byte")})`,
      shape: buffer.shape,
      layer: buffer.layer,
      operation: buffer.operation,
      source: buffer.source,
      kind: buffer.kind,
      alive: `steps ${formatLife(buffer)}  (${life})`,
    };
    const rows = Object.entries(facts).flatMap(([key, value]) => [
      element("dt", { textContent: key }),
      element("dd", { textContent: value || "\u2013" }),
    ]);
    const name = element("span", { textContent: buffer.name });
    const head = element("div", { className: "head" }, swatch(groupOf(buffer).colour), name);
    tooltip.replaceChildren(head, element("dl", {}, ...rows));
    tooltip.hidden = false;
    redraw("overlay");
  }
  const { offsetWidth: w, offsetHeight: h } = tooltip;
  const left = x + 16 + w > innerWidth ? x - 16 - w : x + 16;
  const top = y + 16 + h > innerHeight ? y - 16 - h : y + 16;
  tooltip.style.left = `${Math.max(left, 4)}px`;
  tooltip.style.top = `${Math.max(top, 4)}px`;
}

function hideTooltip() {
  if ($("tooltip").hidden) return;
  $("tooltip").hidden = true;
  state.hovered = null;
  redraw("overlay");
}

// --- What is alive ------------------------------------------------------------------------------

const FIRST_ROWS = 200; // the rest on demand: a table of many thousands of rows is slow to lay out

const tableColumns = [
  { key: "name", title: "Buffer", className: "name" },
  { key: "bytes", title: "Size", className: "number", text: (b) => formatBytes(b.bytes) },
  {
    key: "share",
    title: "Share",
    className: "number",
    value: (b) => b.bytes,
    text: (b, all) => formatShare(b.bytes, all),
  },
  { key: "shape", title: "Shape", className: "code" },
  { key: "kind", title: "Kind" },
  { key: "layer", title: "Layer" },
  { key: "operation", title: "Operation" },
  { key: "source", title: "Source", className: "code", text: (b) => b.source.split(/[/\\]/).at(-1) },
  { key: "start", title: "Alive in steps", text: formatLife },
];

function makeTableHead() {
  const heads = tableColumns.map(({ key, title, className }) => {
    const button = element("button", { type: "button", textContent: title });
    button.addEventListener("click", () => {
      const numeric = ["bytes", "share"].includes(key);
      const again = state.sort.column === key;
      state.sort = { column: key, descending: again ? !state.sort.descending : numeric };
      listAlive();
    });
    return element("th", { scope: "col", className: className === "number" ? "number" : "" }, button);
  });
  $("alive").tHead.rows[0].replaceChildren(...heads);
}

function sorted(rows) {
  const { column, descending } = state.sort;
  const value = tableColumns.find(({ key }) => key === column).value || ((b) => b[column]);
  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  const sign = descending ? -1 : 1;
  return rows.sort(
    (a, b) => sign * compare(value(a), value(b)) || b.bytes - a.bytes || a.index - b.index,
  );
}

function listAlive() {
  const alive = buffers.filter((b) => isAlive(b, state.step));
  const all = alive.reduce((sum, b) => sum + b.bytes, 0);
  const rows = sorted(alive.filter((b) => matches(b) && !groupOf(b).hidden));
  const shown = state.showAll ? rows : rows.slice(0, FIRST_ROWS);
  const made = shown.map((b) => tableRow(b, all));
  if (rows.length === 0) made.push(emptyRow(alive.length));
  $("alive").tBodies[0].replaceChildren(...made);
  $("show-all").hidden = shown.length === rows.length;
  $("show-all").textContent = `Show all ${plural(rows.length, "buffer")}`;
  [...$("alive").tHead.rows[0].cells].forEach((cell, i) => {
    if (tableColumns[i].key !== state.sort.column) cell.removeAttribute("aria-sort");
    else cell.ariaSort = state.sort.descending ? "descending" : "ascending";
  });
  describeAlive(alive.length, all, rows);
}

function tableRow(buffer, all) {
  const cells = tableColumns.map(({ key, className = "", text }) => {
    const content = text ? text(buffer, all) : buffer[key];
    const title = key === "source" ? buffer.source : content;
    if (key !== "name") return element("td", { className, textContent: content, title });
    const button = element("button", { type: "button", textContent: content });
    const name = element("div", {}, swatch(groupOf(buffer).colour), button);
    return element("td", { className, title: content }, name);
  });
  const row = element("tr", { buffer, className: buffer === state.held ? "held" : "" }, ...cells);
  row.addEventListener("click", () => hold(state.held === buffer ? null : buffer));
  row.addEventListener("pointerenter", () => point(buffer));
  row.addEventListener("pointerleave", () => point(null));
  return row;
}

/** Outline a buffer in the picture, no tooltip. */
function point(buffer) {
  state.hovered = buffer;
  redraw("overlay");
}

function emptyRow(alive) {
  const textContent = alive
    ? "None of the buffers alive here is shown: change the search or the legend."
    : "Nothing is alive in this step.";
  const cell = { className: "empty", colSpan: tableColumns.length, textContent };
  return element("tr", {}, element("td", cell));
}

function describeAlive(count, all, rows) {
  const name = profile.instructions[state.step];
  const step = `Alive in step ${formatCount(state.step)}`;
  $("alive-title").textContent = name ? `${step}: ${name}` : step;
  const sum = rows.reduce((total, b) => total + b.bytes, 0);
  const part = `, ${formatCount(rows.length)} of them shown (${formatBytes(sum)})`;
  const listed = rows.length < count ? part : "";
  const peak = state.step === profile.peak_step ? ", the peak" : "";
  $("alive-summary").textContent = `${plural(count, "buffer")}, ${formatBytes(all)}${listed}${peak}`;
}

// --- Legend, totals, search ---------------------------------------------------------------------

function listGroups() {
  const groups = groupings[state.grouping];
  const bytes = groups.map(() => 0);
  for (const b of buffers) {
    if (isAlive(b, state.step)) bytes[b.group] += b.bytes;
  }
  $("legend-title").textContent = state.grouping === "kind" ? "Kinds of buffers" : "Layers";
  if (state.grouping !== $("groups").dataset.grouping) makeGroups(groups);
  [...$("groups").children].forEach((item) => {
    const place = Number(item.dataset.place);
    const [button] = item.children;
    button.ariaPressed = String(!groups[place].hidden);
    button.lastChild.textContent = bytes[place] ? formatBytes(bytes[place]) : "\u2013";
  });
}

/** From the top, as they lie on each other. */
function makeGroups(groups) {
  $("groups").dataset.grouping = state.grouping;
  const items = groups.map((group, place) => {
    const name = element("span", { className: "name", textContent: group.label, title: group.label });
    const amount = element("span", { className: "bytes" });
    const button = element("button", { type: "button" }, swatch(group.colour), name, amount);
    button.addEventListener("click", () => {
      group.hidden = !group.hidden;
      refresh();
    });
    const item = element("li", {}, button);
    item.dataset.place = place;
    return item;
  });
  $("groups").replaceChildren(...items.reverse());
}

/** Everything anew: what is visible, or how it is grouped, has changed. */
function refresh() {
  const { x0, x1 } = state.view || { x0: 0, x1: steps };
  restack();
  state.view = { ...fullView(), x0, x1 };
  listGroups();
  listAlive();
  redraw();
}

function showTotals() {
  const capacity = profile.capacity_bytes;
  const peak = formatBytes(profile.peak_bytes);
  const totals = {
    Peak: peak,
    ...(profile.allocated_bytes && { Allocated: formatBytes(profile.allocated_bytes) }),
    Arguments: formatBytes(profile.argument_bytes),
    Outputs: formatBytes(profile.output_bytes),
    Temporaries: formatBytes(profile.temp_bytes),
    ...(profile.alias_bytes && { Aliased: formatBytes(profile.alias_bytes) }),
    ...(profile.host_bytes && { Host: formatBytes(profile.host_bytes) }),
    ...(profile.generated_code_bytes && { Program: formatBytes(profile.generated_code_bytes) }),
    Schedule: `${plural(profile.instructions.length, "step")}, ${plural(buffers.length, "buffer")}`,
  };
  const made = Object.entries(totals).map(([key, value]) =>
    element("div", {}, element("dt", { textContent: key }), element("dd", { textContent: value })),
  );
  $("totals").replaceChildren(...made);
  $("target").textContent = profile.target;
  document.title = `Memory on ${profile.target}: ${peak}`;
  if (capacity) {
    const needed = Math.max(profile.peak_bytes, profile.allocated_bytes || 0);
    const share = `${formatShare(needed, capacity)} of ${formatBytes(capacity)}`;
    $("verdict").className = `chip ${profile.fits ? "fits" : "exceeds"}`;
    $("verdict").textContent = `${profile.fits ? "fits" : "does not fit"}: ${share}`;
  }
}

let searching = 0;
$("query").addEventListener("input", () => {
  clearTimeout(searching);
  searching = setTimeout(() => {
    state.query = $("query").value.trim().toLowerCase();
    const found = buffers.filter(matches).length;
    const share = `${formatCount(found)} of ${plural(buffers.length, "buffer")}`;
    $("matches").textContent = state.query ? share : "";
    listAlive();
    redraw("base", "overlay");
  }, 80);
});

// --- Controls -----------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  colourCache.clear();
  redraw();
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
prefersDark.addEventListener("change", () => setTheme(prefersDark.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
});

for (const radio of document.querySelectorAll("[name=grouping]")) {
  radio.addEventListener("change", () => {
    state.grouping = radio.value;
    refresh();
  });
}
$("to-peak").addEventListener("click", () => goTo(profile.peak_step));
$("zoom-in").addEventListener("click", () => zoomSteps(0.5, clamp(xOf(state.step + 0.5), 0, size().width)));
$("zoom-out").addEventListener("click", () => zoomSteps(2, clamp(xOf(state.step + 0.5), 0, size().width)));
$("reset").addEventListener("click", reset);
$("show-all").addEventListener("click", () => {
  state.showAll = true;
  listAlive();
});

makeTableHead();
showTotals();
refresh();
setTheme(prefersDark.matches ? "dark" : "light");
new ResizeObserver(() => redraw()).observe(plot);
