"use strict";
// Elements, numbers as a person reads them, and line charts in SVG. Text is always text: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

function short(value) {
  if (!known(value)) return "-";
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toFixed(1) + " G";
  if (size >= 1e6) return (value / 1e6).toFixed(1) + " M";
  if (size >= 1e4) return (value / 1e3).toFixed(1) + " k";
  if (size >= 100 || Number.isInteger(value)) return String(Math.round(value));
  if (size >= 1) return value.toFixed(2);
  return size >= 1e-3 || size === 0 ? value.toFixed(3) : value.toExponential(1);
}

function percent(share, digits = 0) {
  if (!known(share)) return "-";
  const value = share * 100;
  if (share > 0 && value < (digits ? 0.05 : 0.5)) return digits ? "<0.1 %" : "<1 %";
  return value.toFixed(digits) + " %";
}

const clock = (milliseconds) => new Date(milliseconds).toTimeString().slice(0, 8);

function duration(seconds) {
  if (!known(seconds)) return "-";
  const s = Math.max(0, Math.round(seconds));
  const two = (value) => String(value).padStart(2, "0");
  return s >= 3600 ? `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}` : `${Math.floor(s / 60)}:${two(s % 60)}`;
}

// Shares in whole percent that add up to 100: the largest remainders are rounded up.
function wholePercents(shares) {
  const total = shares.reduce((sum, share) => sum + share, 0);
  const exact = shares.map((share) => (total ? (share / total) * 100 : 0));
  const found = exact.map(Math.floor);
  let left = (total ? 100 : 0) - found.reduce((sum, value) => sum + value, 0);
  const order = exact.map((value, index) => [value - found[index], index]).sort((a, b) => b[0] - a[0]);
  for (const [, index] of order) if (left-- > 0) found[index] += 1;
  return found;
}

function roundStep(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * (1 - 1e-9));
}

function ticks(low, high, step) {
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

// As many decimals as the distance between two ticks has.
function tickWords(mark, step) {
  if (Math.abs(mark) >= 1e4) return short(mark);
  return mark.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
}

// series: [{name, color, points: [[x, y]], dots, faint}]; x and y are words for the axes, with their units.
function lineChart(place, series, { x, y, zero = false }) {
  const points = series.flatMap((one) => one.points).filter(([, value]) => known(value));
  const width = place.clientWidth, height = place.clientHeight;
  if (!points.length || width < 80) {
    place.replaceChildren(element("div", { class: "empty" }, "no step yet"));
    return;
  }
  let low = Math.min(...points.map((p) => p[1])), high = Math.max(...points.map((p) => p[1]));
  if (zero) low = Math.min(0, low);
  if (high - low < 1e-9) [low, high] = [low - (zero ? 0 : 0.5), high + 0.5];
  const step = roundStep(low, high, 5);
  low = Math.floor(low / step + 1e-9) * step;
  high = Math.ceil(high / step - 1e-9) * step;
  const marks = ticks(low, high, step);
  const first = Math.min(...points.map((p) => p[0])), last = Math.max(first + 1, ...points.map((p) => p[0]));
  const words = marks.map((mark) => tickWords(mark, step));
  const left = 12 + Math.max(...words.map((word) => word.length)) * 7, right = width - 8, top = 20, bottom = height - 30;
  const toX = (value) => left + ((value - first) / (last - first)) * (right - left);
  const toY = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  const said = series.map((one) => {
    const values = one.points.filter(([, value]) => known(value));
    return values.length ? `${one.name}: from ${short(values[0][1])} to ${short(values[values.length - 1][1])}` : "";
  });
  const svg = drawn("svg", { role: "img", "aria-label": `${y} by ${x}. ${said.filter(Boolean).join("; ")}` });
  marks.forEach((mark, index) => {
    svg.append(drawn("line", { class: "rule", x1: left, x2: right, y1: toY(mark), y2: toY(mark) }));
    svg.append(drawn("text", { x: left - 6, y: toY(mark) + 4, "text-anchor": "end" }, words[index]));
  });
  for (const mark of ticks(first, last, roundStep(first, last, Math.max(2, Math.floor(width / 110)))).filter(Number.isInteger)) {
    svg.append(drawn("line", { class: "axis", x1: toX(mark), x2: toX(mark), y1: bottom, y2: bottom + 4 }));
    svg.append(drawn("text", { x: toX(mark), y: bottom + 16, "text-anchor": "middle" }, short(mark)));
  }
  svg.append(drawn("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  svg.append(drawn("text", { x: 0, y: 10 }, y));
  svg.append(drawn("text", { x: right, y: height - 1, "text-anchor": "end" }, x));
  for (const one of series) {
    const at = one.points.filter(([, value]) => known(value)).map(([px, py]) => [toX(px), toY(py)]);
    const path = at.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join(" ");
    const stroke = { fill: "none", stroke: one.color, "stroke-width": one.faint ? 1 : 2, "stroke-linejoin": "round", opacity: one.faint ? 0.35 : 1 };
    if (at.length > 1) svg.append(drawn("polyline", { points: path, ...stroke }));
    if (one.dots || at.length === 1) for (const [px, py] of at) svg.append(drawn("circle", { cx: px, cy: py, r: 3.5, fill: one.color }));
  }
  place.replaceChildren(svg);
}

// An average that forgets, so that a noisy curve shows where it goes.
function smooth(points, keep) {
  let mean = null;
  return points.map(([at, value]) => {
    if (known(value)) mean = mean === null ? value : keep * mean + (1 - keep) * value;
    return [at, mean];
  });
}
