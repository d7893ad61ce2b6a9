// Shared by all plots: colors, canvases at the resolution of the screen, axes with ticks, number formats, the tooltip.

const MOST_COLORS = 8;

const DASHES = [[], [6, 3], [2, 3]];

// viridis, sampled.
const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121],
  [110, 206, 88], [181, 222, 43], [253, 231, 37],
];

function $(id) {
  return document.getElementById(id);
}

// An element with text children; text is never parsed.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function bdi(text) {
  return element("bdi", { title: text }, text);
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[i].map((v, c) => Math.round(v + (at - i) * (VIRIDIS[i + 1][c] - v)));
}

// Color and dashes of curve i of n: distinct ones for a few, viridis in order for many.
function curveStyle(i, n) {
  if (n <= MOST_COLORS) return { stroke: color(`c${i}`), dash: [] };
  // Skip the end of viridis that is close to the background color.
  const [first, last] = matchMedia("(prefers-color-scheme: dark)").matches ? [0.25, 1] : [0, 0.92];
  return { stroke: `rgb(${viridis(first + (last - first) * (i / (n - 1))).join(" ")})`, dash: n <= 24 ? DASHES[i % 3] : [] };
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const plain = size >= 1e-3 && size < 1e5;
  const text = plain ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 1);
  return text.replace("-", "−").replace("e-", "e−").replace("e+", "e");
}

// Text of a tick: 10^p for powers of ten far from 1.
function tickText(value) {
  const power = Math.log10(Math.abs(value));
  if (value === 0 || Math.abs(power) < 3.5 || Math.abs(power - Math.round(power)) > 1e-9) return number(value, 2);
  const digits = [...String(Math.round(power))].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] || "⁻").join("");
  return `${value < 0 ? "−" : ""}10${digits}`;
}

// Clear a canvas; return its context, scaled to CSS pixels.
function context(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  return { ctx, width, height };
}

// Round numbers in [low, high], about `count`.
function roundTicks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12); i++) ticks.push(i * step);
  return ticks;
}

// Positions on a signed-log axis of 0 and +- powers of ten beyond the linear part, thinned to about `count`.
function signedTicks(low, high, scale, count) {
  const first = Math.ceil(Math.log10(scale) - 1e-9);
  const last = Math.floor(Math.log10(Math.max(Math.abs(unplace(low, scale)), Math.abs(unplace(high, scale)))));
  const decades = Math.max(1, last - first + 1) * (low < 0 && high > 0 ? 2 : 1);
  const every = Math.max(1, Math.ceil(decades / count));
  const ticks = [0];
  for (let p = first; p <= last; p += every) ticks.push(10 ** p, -(10 ** p));
  const shown = ticks.filter((v) => place(v, scale) >= low && place(v, scale) <= high).sort((a, b) => a - b);
  return shown.length > 1 ? shown : roundTicks(unplace(low, scale), unplace(high, scale), count);
}

// Powers of ten in [low, high], thinned to about `count`.
function powerTicks(low, high, count) {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const every = Math.max(1, Math.ceil((last - first + 1) / count));
  const ticks = [];
  for (let p = first; p <= last; p += every) ticks.push(Number(`1e${p}`));
  return ticks.length > 1 ? ticks : roundTicks(low, high, count);
}

// Draw axes with ticks and labels. x and y: { ticks, at(value), label, text(value) }; the line at x.origin is darker.
function drawAxes(ctx, box, x, y) {
  ctx.lineWidth = 1;
  ctx.fillStyle = color("quiet");
  ctx.strokeStyle = color("grid");
  ctx.textBaseline = "middle";
  ctx.textAlign = "right";
  let lastTop = Infinity;
  for (const value of y.ticks) {
    const py = y.at(value);
    ctx.beginPath();
    ctx.moveTo(box.left, py);
    ctx.lineTo(box.right, py);
    ctx.stroke();
    if (lastTop - py > 14) {
      ctx.fillText(y.text(value), box.left - 7, py);
      lastTop = py;
    }
  }
  ctx.textBaseline = "top";
  ctx.textAlign = "center";
  let lastRight = -Infinity;
  for (const value of x.ticks) {
    const px = x.at(value);
    ctx.strokeStyle = color(value === x.origin ? "quiet" : "grid");
    ctx.globalAlpha = value === x.origin ? 0.6 : 1;
    ctx.beginPath();
    ctx.moveTo(px, box.top);
    ctx.lineTo(px, box.bottom);
    ctx.stroke();
    ctx.globalAlpha = 1;
    const half = ctx.measureText(x.text(value)).width / 2;
    const middle = Math.min(px, ctx.canvas.clientWidth - half);
    if (middle - half > lastRight + 8) {
      ctx.fillText(x.text(value), middle, box.bottom + 7);
      lastRight = middle + half;
    }
  }
  ctx.strokeStyle = color("line");
  ctx.beginPath();
  ctx.moveTo(box.left, box.bottom + 0.5);
  ctx.lineTo(box.right, box.bottom + 0.5);
  ctx.stroke();
  ctx.fillText(x.label, (box.left + box.right) / 2, box.bottom + 25);
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  ctx.fillText(y.label, box.left - 44, box.top - 9);
}

// Show a tooltip at the pointer: a heading and rows of [color, name, value]. The heading null hides it.
function showTip(event, heading, rows = []) {
  const tip = $("tip");
  tip.hidden = heading === null;
  if (tip.hidden) return;
  tip.replaceChildren(element("strong", {}, heading));
  for (const [stroke, name, value] of rows) {
    const swatch = element("span", { class: "swatch" });
    swatch.style.background = stroke;
    tip.append(element("div", { class: "row" }, swatch, bdi(name), element("span", {}, value)));
  }
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
  const top = event.clientY + 16 + height > innerHeight ? event.clientY - 16 - height : event.clientY + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}

// Return a function that runs `call` at most once per animation frame.
function throttled(call) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      call();
    });
  };
}
