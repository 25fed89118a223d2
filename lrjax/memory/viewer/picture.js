"use strict";
// Draws the stack of buffers, its axes and the overview.

// --- Rectangles ------------------------------------------------------------------------

const plot = $("plot");
let extent = { width: 1, height: 1 }; // of the plot, pixels; measured once per redraw
let density = devicePixelRatio; // reading the global for every rectangle is slow
const size = () => extent;
const xOf = (step) => ((step - state.view.x0) / (state.view.x1 - state.view.x0)) * size().width;
const yOf = (bytes) => (1 - (bytes - state.view.y0) / (state.view.y1 - state.view.y0)) * size().height;
const stepAt = (x) => state.view.x0 + (x / size().width) * (state.view.x1 - state.view.x0);
const bytesAt = (y) => state.view.y0 + (1 - y / size().height) * (state.view.y1 - state.view.y0);
const snap = (pixel) => Math.round(pixel * density) / density;

/** What is drawn from left to right: a column per step or, with more steps than pixels, per pixel
 * the step with the most memory in use, so that no peak is lost. */
function columns(width) {
  const { x0, x1 } = state.view;
  if (x1 - x0 <= width) {
    const first = Math.floor(x0);
    return Array.from({ length: Math.min(Math.ceil(x1), steps) - first }, (_, i) => ({
      step: first + i,
      left: snap(xOf(first + i)),
      right: snap(xOf(first + i + 1)),
    }));
  }
  return Array.from({ length: width }, (_, pixel) => {
    let step = Math.floor(stepAt(pixel));
    const end = Math.min(Math.max(Math.floor(stepAt(pixel + 1)), step + 1), steps);
    for (let other = step + 1; other < end; other++) {
      if (inUse[other] > inUse[step]) step = other;
    }
    return { step, left: pixel, right: pixel + 1 };
  });
}

/** Rectangles of the view. The work is bounded by pixels, not by the profile: what is lower than
 * a pixel is drawn with its neighbours, what stays where it is from column to column is one. */
function layOut() {
  const drawn = new Rectangles();
  const alive = new Sweep();
  for (const { step, left, right } of columns(size().width)) {
    drawn.startColumn(left, right);
    let bottom = 0;
    for (const place of alive.at(step)) {
      const top = bottom + order[place].bytes;
      drawn.add(place, bottom, top);
      bottom = top;
    }
    drawn.endPile();
  }
  runs = drawn.all;
}

/** Places in `order` of the buffers alive in a step, bottom first; steps must not decrease. */
class Sweep {
  constructor() {
    this.live = [];
    this.started = 0; // of byStart
  }

  at(step) {
    const { live } = this;
    let kept = 0;
    for (const place of live) {
      if (order[place].end >= step) live[kept++] = place;
    }
    live.length = kept;
    for (; this.started < byStart.length; this.started++) {
      const place = byStart[this.started];
      if (order[place].start > step) break;
      if (order[place].end >= step) live.push(place);
    }
    if (live.length > kept) live.sort((a, b) => a - b);
    return live;
  }
}

const LEAST_HEIGHT = 0.75; // pixels a buffer must have to be drawn by itself
const PILE_HEIGHT = 2;

class Rectangles {
  constructor() {
    this.all = [];
    this.open = new Array(order.length).fill(null); // the last rectangle of every place
    this.column = -1;
    this.pile = { place: -1, bottom: 0, top: 0 }; // of buffers too low to be drawn one by one
    this.height = size().height;
    this.scale = this.height / (state.view.y1 - state.view.y0); // pixels per byte
  }

  startColumn(left, right) {
    this.column += 1;
    this.left = left;
    this.right = right;
  }

  /** One buffer of the column: all there is of it, or its share of a pile. */
  add(place, bottom, top) {
    if (top <= state.view.y0 || bottom >= state.view.y1) return;
    if ((top - bottom) * this.scale >= LEAST_HEIGHT) {
      this.endPile();
      this.put(place, bottom, top, true);
      return;
    }
    const { pile } = this;
    const high = (top - pile.bottom) * this.scale > PILE_HEIGHT;
    if (pile.place >= 0 && (high || groupOf(order[pile.place]) !== groupOf(order[place]))) this.endPile();
    if (pile.place < 0) Object.assign(pile, { place, bottom });
    pile.top = top;
  }

  endPile() {
    const { place, bottom, top } = this.pile;
    if (place >= 0) this.put(place, bottom, top, false);
    this.pile.place = -1;
  }

  put(place, bottom, top, whole) {
    const y0 = snap(Math.max(this.height - (top - state.view.y0) * this.scale, 0));
    const y1 = snap(Math.min(this.height - (bottom - state.view.y0) * this.scale, this.height));
    if (y1 <= y0) return;
    const { column, left, right } = this;
    const last = this.open[place];
    if (last && last.column === column - 1) {
      if (last.y0 === y0 && last.y1 === y1 && last.whole === whole) {
        last.column = column;
        last.right = right;
        return;
      }
      last.moves = true;
    }
    const made = { buffer: order[place], left, right, y0, y1, column, whole, moves: false };
    this.open[place] = made;
    this.all.push(made);
  }
}

// --- Drawing ---------------------------------------------------------------------------

const colourCache = new Map();
function css(variable) {
  if (!colourCache.has(variable)) {
    colourCache.set(variable, getComputedStyle(document.documentElement).getPropertyValue(variable).trim());
  }
  return colourCache.get(variable);
}

function prepare(canvas, width = canvas.clientWidth, height = canvas.clientHeight) {
  const [across, down] = [Math.round(width * density), Math.round(height * density)];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const pen = canvas.getContext("2d");
  pen.setTransform(density, 0, 0, density, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

function drawBase() {
  const pen = prepare($("base"));
  const { width } = size();
  pen.fillStyle = css("--grid");
  for (const { at } of byteTicks()) pen.fillRect(0, snap(yOf(at)), width, 1);
  layOut();
  for (const run of runs) {
    const w = run.right - run.left;
    const h = run.y1 - run.y0;
    const group = groupOf(run.buffer);
    pen.globalAlpha = matches(run.buffer) ? 1 : 0.13;
    pen.fillStyle = group.shades[run.buffer.shade];
    const ends = w > 4 && !run.moves; // a gap to the next buffer, none where this one only moves
    pen.fillRect(run.left, run.y0, ends ? w - 1 : w, h > 4 ? h - 1 : h);
  }
  pen.globalAlpha = 1;
  drawLabels(pen);
}

const LABEL_HEIGHT = 14;

/** Every buffer's label where it is widest, if it fits there: what the colour does not say. */
function drawLabels(pen) {
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  pen.textBaseline = "middle";
  pen.fillStyle = "rgb(12 18 28 / 0.88)";
  for (const [b, { left, right, y0, y1 }] of roomForLabels()) {
    const label = (state.grouping === "kind" && b.layer) || b.name;
    const texts = [`${label}   ${formatBytes(b.bytes)}`, label];
    const text = texts.find((candidate) => pen.measureText(candidate).width <= right - left - 12);
    if (text) pen.fillText(text, left + 6, (y0 + y1) / 2);
  }
}

/** The widest box within every buffer, across rectangles that overlap enough. */
function roomForLabels() {
  const widest = new Map();
  const current = new Map();
  for (const run of runs) {
    const { buffer: b, left, right, y0, y1 } = run;
    if (!run.whole || y1 - y0 < LABEL_HEIGHT || !matches(b)) continue;
    let box = current.get(b);
    const [top, bottom] = box ? [Math.max(box.y0, y0), Math.min(box.y1, y1)] : [y0, y1];
    if (box && box.right === left && bottom - top >= LABEL_HEIGHT) {
      Object.assign(box, { right, y0: top, y1: bottom });
    } else {
      box = { left: Math.max(left, 0), right, y0, y1 };
      current.set(b, box);
    }
    const best = widest.get(b);
    if (!best || box.right - box.left > best.right - best.left) widest.set(b, box);
  }
  return widest;
}

function drawOverlay() {
  const pen = prepare($("overlay"));
  const { width, height } = size();
  const column = (step) => [xOf(step), Math.max(xOf(step + 1) - xOf(step), 1)];
  const [x, w] = column(state.step);
  pen.fillStyle = css("--text");
  pen.globalAlpha = 0.16;
  if (w > 3) pen.fillRect(x, 0, w, height);
  pen.globalAlpha = 1;
  pen.fillRect(snap(x + w / 2) - 0.5, 0, 1, height);
  const peak = xOf(profile.peak_step + 0.5);
  line(pen, css("--muted"), [3, 4], [peak, 0], [peak, height]);
  if (profile.capacity_bytes) {
    const capacity = yOf(profile.capacity_bytes);
    line(pen, css("--bad"), [7, 4], [0, capacity], [width, capacity]);
  }
  for (const b of new Set([state.held, state.hovered])) {
    const rectangles = runs.filter((run) => run.buffer === b && run.whole);
    outline(pen, rectangles, css("--panel"), 4.5);
    outline(pen, rectangles, css("--text"), 2);
  }
  if (state.drag && state.drag.box) {
    const { left, top, right, bottom } = state.drag.box;
    pen.fillStyle = pen.strokeStyle = css("--accent");
    pen.lineWidth = 1;
    pen.globalAlpha = 0.15;
    pen.fillRect(left, top, right - left, bottom - top);
    pen.globalAlpha = 1;
    pen.strokeRect(left + 0.5, top + 0.5, right - left - 1, bottom - top - 1);
  }
  placeMarks();
}

function line(pen, colour, dashes, from, to) {
  pen.strokeStyle = colour;
  pen.lineWidth = 1.5;
  pen.setLineDash(dashes);
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
  pen.setLineDash([]);
}

/** The contour of a buffer: upper and lower edge of its rectangles, closed where it starts and ends. */
function outline(pen, rectangles, colour, width) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.lineCap = "square";
  pen.beginPath();
  rectangles.forEach((run, i) => {
    const previous = rectangles[i - 1];
    const next = rectangles[i + 1];
    pen.moveTo(run.left, run.y0);
    pen.lineTo(run.right, run.y0);
    pen.moveTo(run.left, run.y1);
    pen.lineTo(run.right, run.y1);
    for (const [x, other] of [[run.left, previous], [run.right, next]]) {
      const touches = other && (other.left === x || other.right === x);
      for (const edge of touches ? ["y0", "y1"] : []) {
        pen.moveTo(x, run[edge]);
        pen.lineTo(x, other[edge]);
      }
      if (!touches) {
        pen.moveTo(x, run.y0);
        pen.lineTo(x, run.y1);
      }
    }
  });
  pen.stroke();
}

function placeMarks() {
  const { width, height } = size();
  const label = $("peak-label");
  const x = xOf(profile.peak_step + 0.5);
  label.hidden = x < 0 || x > width;
  label.textContent = `peak ${formatBytes(profile.peak_bytes)}`;
  label.style.top = "4px";
  label.style.left = `${x + 8 + label.offsetWidth > width ? x - 8 - label.offsetWidth : x + 8}px`;
  const limit = $("capacity-label");
  const y = profile.capacity_bytes ? yOf(profile.capacity_bytes) : -1;
  limit.hidden = y < 0 || y > height;
  limit.textContent = `${profile.target} ${formatBytes(profile.capacity_bytes || 0)}`;
  limit.style.top = `${y < 28 ? y + 5 : y - 25}px`;
}

function drawOverview() {
  const canvas = $("overview");
  const pen = prepare(canvas);
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const most = inUse.reduce((a, b) => Math.max(a, b), 1);
  pen.fillStyle = css("--muted");
  pen.globalAlpha = 0.55;
  for (let pixel = 0; pixel < width; pixel++) {
    const first = Math.floor((pixel / width) * steps);
    const end = Math.max(Math.floor(((pixel + 1) / width) * steps), first + 1);
    let bytes = 0;
    for (let step = first; step < end; step++) bytes = Math.max(bytes, inUse[step]);
    pen.fillRect(pixel, height - (bytes / most) * height, 1, (bytes / most) * height);
  }
  pen.globalAlpha = 1;
  const left = (state.view.x0 / steps) * width;
  const right = (state.view.x1 / steps) * width;
  pen.fillStyle = css("--accent");
  pen.globalAlpha = 0.12;
  pen.fillRect(left, 0, right - left, height);
  pen.globalAlpha = 1;
  pen.strokeStyle = css("--accent");
  pen.lineWidth = 1.5;
  pen.strokeRect(left + 0.75, 0.75, Math.max(right - left - 1.5, 2), height - 1.5);
}

let wanted = new Set();
const parts = { axes: drawAxes, base: drawBase, overlay: drawOverlay, overview: drawOverview };

/** Draw some parts of the picture (default: all) with the next frame, once. */
function redraw(...names) {
  if (wanted.size === 0) requestAnimationFrame(drawWanted);
  for (const name of names.length ? names : Object.keys(parts)) wanted.add(name);
}

function drawWanted() {
  extent = { width: plot.clientWidth, height: plot.clientHeight };
  density = devicePixelRatio;
  const names = Object.keys(parts).filter((name) => wanted.has(name));
  wanted = new Set();
  for (const name of names) parts[name]();
}

// --- Axes ---------------------------------------------------------------------------------------

/** The nicest distance (1, 2 or 5 times a power of ten) that is at least `least`. */
function niceDistance(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least * 0.999);
}

function ticks(from, to, distance) {
  const first = Math.ceil(from / distance);
  const length = Math.max(Math.floor(to / distance) - first + 1, 0);
  return Array.from({ length }, (_, i) => (first + i) * distance);
}

function byteTicks() {
  const { y0, y1 } = state.view;
  const unit = 1024 ** unitOf(y1);
  const distance = niceDistance((y1 - y0) / unit / 6);
  const digits = Math.max(0, -Math.floor(Math.log10(distance)));
  return ticks(y0 / unit, y1 / unit, distance)
    .filter((value) => yOf(value * unit) > 6) // room for half a line of text
    .map((value) => ({
      at: value * unit,
      text: value === 0 ? "0" : `${value.toFixed(digits)} ${units[unitOf(y1)]}`,
    }));
}

function drawAxes() {
  const { x0, x1 } = state.view;
  const { width } = size();
  const labels = byteTicks().map(({ at, text }) => {
    const label = element("span", { textContent: text });
    label.style.top = `${yOf(at)}px`;
    return label;
  });
  $("bytes-axis").replaceChildren(...labels);
  const distance = Math.max(niceDistance(((x1 - x0) / width) * 90), 1);
  const last = Math.min(Math.ceil(x1) - 1, steps - 1);
  const names = ticks(Math.max(Math.floor(x0), 0), last, distance)
    .filter((step) => xOf(step + 0.5) >= 0 && xOf(step + 0.5) <= width)
    .map((step) => {
      const label = element("span", { textContent: formatCount(step) });
      label.style.left = `${xOf(step + 0.5)}px`;
      return label;
    });
  $("step-axis").replaceChildren(...names);
  const shown = `${formatCount(Math.floor(x0))} to ${formatCount(last)}`;
  $("range").textContent = `steps ${shown} of ${formatCount(steps)}`;
  Object.assign(plot.dataset, { ...state.view });
}
