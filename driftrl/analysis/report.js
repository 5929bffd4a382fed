"use strict";
// Draws the learning curves of a report page from the JSON in #data, and shows the values under the pointer.

const SHAPE = { height: 360, left: 62, right: 12, top: 10, bottom: 44 };
const COLORS = 8;

/** The color of a group, by its place; the style sheet has eight for light and for dark, the rest suit both. */
function color(group) {
  return group < COLORS ? `var(--c${group})` : `hsl(${(group * 137.5) % 360} 60% 50%)`;
}

/** All lines of a section: every run, its evaluations, and each group's IQM. Points are [step, return, seconds]. */
function lines(section) {
  return section.groups.flatMap((group, i) => [
    ...group.runs
      .filter((run) => run.curve.length)
      .map((run) => ({ group: i, name: group.name, label: run.label, dashed: !run.complete, points: run.curve })),
    ...group.runs
      .filter((run) => run.evaluations.length)
      .map((run) => ({
        group: i, name: group.name, label: `${run.label}, evaluated`, dots: true,
        points: run.evaluations.map(([x, y]) => [x, y, null]),
      })),
    ...(group.mean
      ? [{ group: i, name: group.name, label: "IQM", thick: true, points: group.mean.map(([x, y]) => [x, y, null]) }]
      : []),
  ]);
}

/** Round numbers from low to high, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((each) => each * power >= raw) * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

/** A number for readers. */
function text(value) {
  return Math.abs(value) >= 1000
    ? Math.round(value).toLocaleString("en-US")
    : String(Number(value.toPrecision(4)));
}

/** A number for an axis, where 200,000 is 200k. */
function short(value) {
  const [unit, word] = Math.abs(value) >= 1e6 ? [1e6, "M"] : Math.abs(value) >= 1e4 ? [1e3, "k"] : [1, ""];
  return String(Number((value / unit).toPrecision(4))) + word;
}

/** Where steps and returns lie in a drawing of some width. */
function scales(shown, threshold, width) {
  const points = shown.flatMap((line) => line.points);
  const values = points.map((point) => point[1]).concat(threshold === null ? [] : [threshold]);
  const span = (list) => list.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  const [, last] = span(points.map((point) => point[0]));
  let [low, high] = span(values);
  const margin = (high - low || Math.abs(high) || 1) * 0.05;
  [low, high] = [low - margin, high + margin];
  const inner = { width: width - SHAPE.left - SHAPE.right, height: SHAPE.height - SHAPE.top - SHAPE.bottom };
  return {
    width,
    x: (step) => SHAPE.left + (step / last) * inner.width,
    y: (value) => SHAPE.top + ((high - value) / (high - low)) * inner.height,
    xTicks: ticks(0, last, Math.max(4, inner.width / 110)),
    yTicks: ticks(low, high, 6),
  };
}

/** The point of the shown lines nearest to a place in the drawing; null if there is none. */
function nearest(shown, scale, x, y) {
  let best = null;
  for (const line of shown)
    for (const point of line.points) {
      const distance = Math.hypot(scale.x(point[0]) - x, scale.y(point[1]) - y);
      if (best === null || distance < best.distance) best = { line, point, distance };
    }
  return best;
}

/** What the tip says of a point. */
function describe(line, [step, value, seconds]) {
  const time = seconds === null ? "" : `, ${text(seconds)} s`;
  return [`${line.name}, ${line.label}`, `step ${text(step)}${time}`, `return ${text(value)}`];
}

function element(name, attributes, parent, content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (content !== undefined) made.textContent = content;
  parent.append(made);
  return made;
}

function path(points, scale) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${scale.x(x).toFixed(1)},${scale.y(y).toFixed(1)}`).join("");
}

/** Draw a section's chart; returns what the pointer needs. */
function draw(svg, section, shown, scale) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${scale.width} ${SHAPE.height}`);
  svg.setAttribute("height", SHAPE.height);
  const [right, bottom] = [scale.width - SHAPE.right, SHAPE.height - SHAPE.bottom];
  for (const value of scale.yTicks) {
    const y = scale.y(value);
    element("line", { x1: SHAPE.left, x2: right, y1: y, y2: y, stroke: "var(--line)" }, svg);
    element("text", { x: SHAPE.left - 6, y: y + 4, "text-anchor": "end" }, svg, short(value));
  }
  for (const step of scale.xTicks) {
    const x = scale.x(step);
    element("line", { x1: x, x2: x, y1: bottom, y2: bottom + 4, stroke: "var(--quiet)" }, svg);
    const anchor = x > right - 15 ? "end" : "middle";
    element("text", { x, y: bottom + 18, "text-anchor": anchor }, svg, short(step));
  }
  const middle = (SHAPE.top + bottom) / 2;
  element("text", { x: (SHAPE.left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, svg, "environment steps");
  const side = { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` };
  element("text", side, svg, section.curve === "training" ? "return while training" : "return of evaluations");
  if (section.threshold !== null) {
    const y = scale.y(section.threshold);
    const dots = { x1: SHAPE.left, x2: right, y1: y, y2: y, stroke: "var(--quiet)", "stroke-dasharray": "2 4" };
    element("line", dots, svg);
  }
  for (const i of new Set(shown.filter((line) => line.thick).map((line) => line.group))) {
    const mean = section.groups[i].mean;
    const edge = mean.map(([x, , low]) => [x, low]).concat(mean.map(([x, , , high]) => [x, high]).reverse());
    element("path", { d: `${path(edge, scale)}Z`, fill: color(i), opacity: 0.15 }, svg);
  }
  for (const line of shown.filter((each) => each.dots))
    for (const [x, y] of line.points)
      element("circle", { cx: scale.x(x), cy: scale.y(y), r: 2.5, fill: color(line.group), opacity: 0.7 }, svg);
  for (const line of shown.filter((each) => !each.dots)) {
    const style = { d: path(line.points, scale), fill: "none", stroke: color(line.group), "stroke-linejoin": "round" };
    const alone = !section.groups[line.group].mean; // nothing thicker tells this group from others
    const kind = line.thick ? { "stroke-width": 2.5 } : alone ? { "stroke-width": 1.75 } : { "stroke-width": 1, opacity: 0.6 };
    element("path", { ...style, ...kind, "stroke-dasharray": line.dashed ? "5 4" : "none" }, svg);
  }
  const dot = element("circle", { r: 4, stroke: "var(--ground)", "stroke-width": 1.5, visibility: "hidden" }, svg);
  return { scale, dot };
}

function chart(figure, section) {
  const all = lines(section);
  if (!all.length) {
    figure.textContent = "No run has a curve.";
    return;
  }
  const hidden = new Set();
  const legend = document.createElement("div");
  legend.className = "legend";
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(legend);
  const svg = element("svg", { role: "img", "aria-label": `Learning curves on ${section.env}` }, figure);
  figure.append(tip);
  let shown, drawn;
  const redraw = () => {
    tip.hidden = true;
    shown = all.filter((line) => !hidden.has(line.group));
    drawn = draw(svg, section, shown, scales(shown.length ? shown : all, section.threshold, figure.clientWidth));
  };
  section.groups.forEach((group, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const key = document.createElement("i");
    key.className = "key";
    key.style.background = color(i);
    button.append(key, group.name);
    button.addEventListener("click", () => {
      if (!hidden.delete(i)) hidden.add(i);
      button.setAttribute("aria-pressed", String(!hidden.has(i)));
      redraw();
    });
    legend.append(button);
  });
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const found = nearest(shown, drawn.scale, event.clientX - box.left, event.clientY - box.top);
    if (found === null) return;
    const [x, y] = [drawn.scale.x(found.point[0]), drawn.scale.y(found.point[1])];
    for (const [key, value] of [["cx", x], ["cy", y], ["fill", color(found.line.group)], ["visibility", "visible"]])
      drawn.dot.setAttribute(key, value);
    tip.replaceChildren();
    for (const words of describe(found.line, found.point)) {
      const row = document.createElement("div");
      row.textContent = words;
      tip.append(row);
    }
    tip.hidden = false;
    const left = x + 12 + tip.offsetWidth > figure.clientWidth ? x - 12 - tip.offsetWidth : x + 12;
    tip.style.left = `${Math.max(0, left)}px`;
    const above = box.top - figure.getBoundingClientRect().top;
    tip.style.top = `${above + Math.min(y + 12, SHAPE.height - tip.offsetHeight)}px`;
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    drawn.dot.setAttribute("visibility", "hidden");
  });
  let width = 0;
  new ResizeObserver(() => {
    if (figure.clientWidth !== width) redraw();
    width = figure.clientWidth;
  }).observe(figure);
  redraw();
}

const { sections } = JSON.parse(document.getElementById("data").textContent);
for (const key of document.querySelectorAll(".key[data-group]")) key.style.background = color(Number(key.dataset.group));
for (const figure of document.querySelectorAll(".chart")) chart(figure, sections[Number(figure.dataset.section)]);
