"use strict";
// Draws the error maps when their case is opened. Everything else stands in the page without a script.
const maps = JSON.parse(document.getElementById("maps").textContent);
const bounds = [1, 2, 4, 16, 64]; // the steps of the scale in σ

function step(value, unit) {
  if (value === null) return "none";
  if (typeof value === "string") return "infinite";
  if (unit !== "σ") return value ? "p5" : "s0";
  const size = bounds.filter((b) => Math.abs(value) >= b).length;
  return size ? (value > 0 ? "p" : "n") + size : "s0";
}

function said(value, unit) {
  if (value === null) return "not judged";
  if (typeof value === "string") return "not finite, or nonzero where no rounding leads";
  if (unit !== "σ") return value ? "differs" : "agrees";
  return (value > 0 ? "+" : "") + value + " σ";
}

function range(index, view, axis) {
  const first = index * view.cell[axis];
  const last = Math.min(first + view.cell[axis], view.count[axis]) - 1;
  return view.axes[axis] + " " + (first === last ? first : first + "–" + last);
}

function make(tag, cls, text) {
  const element = document.createElement(tag);
  if (cls) element.className = cls;
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw(view, unit, name) {
  const rows = view.cells.length, columns = view.cells[0].length;
  const wide = Math.max(4, Math.min(18, Math.floor(576 / columns)));
  const high = Math.max(wide, Math.ceil(54 / rows));
  const figure = make("div", "grid");
  const top = make("div", "columns"), side = make("div", "rows"), canvas = make("canvas");
  top.append(make("span", "", "0"), make("span", "", view.axes[1] + " →"), make("span", "", view.count[1] - 1));
  side.append(make("span", "", "0"), make("span", "", view.axes[0] + " ↓"), make("span", "", view.count[0] - 1));
  const told = make("output");
  told.setAttribute("aria-live", "polite");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", name + ": error by " + view.axes[0] + " and " + view.axes[1] + ". Arrow keys read the cells.");
  canvas.width = columns * wide;
  canvas.height = rows * high;
  let at = null;
  function paint() {
    const colours = getComputedStyle(document.documentElement), context = canvas.getContext("2d");
    view.cells.forEach((row, i) => row.forEach((value, j) => {
      context.fillStyle = colours.getPropertyValue("--" + step(value, unit));
      context.fillRect(j * wide, i * high, wide, high);
      if (typeof value === "string") { // a cross: not by colour alone
        context.strokeStyle = colours.getPropertyValue("--page");
        context.beginPath();
        context.moveTo(j * wide, i * high); context.lineTo((j + 1) * wide, (i + 1) * high);
        context.moveTo((j + 1) * wide, i * high); context.lineTo(j * wide, (i + 1) * high);
        context.stroke();
      }
    }));
    if (at) {
      context.lineWidth = 2;
      context.strokeStyle = colours.getPropertyValue("--page");
      context.strokeRect(at[1] * wide, at[0] * high, wide, high);
      context.strokeStyle = colours.getPropertyValue("--focus");
      context.strokeRect(at[1] * wide - 1, at[0] * high - 1, wide + 2, high + 2);
    }
  }
  function read(row, column) {
    at = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
    told.textContent = range(at[0], view, 0) + ", " + range(at[1], view, 1) + ": " + said(view.cells[at[0]][at[1]], unit);
    paint();
  }
  const worst = () => {
    let best = [0, 0], size = -1;
    view.cells.forEach((row, i) => row.forEach((v, j) => {
      const s = v === null ? -1 : typeof v === "string" ? Infinity : Math.abs(v);
      if (s > size) { size = s; best = [i, j]; }
    }));
    return best;
  };
  canvas.addEventListener("focus", () => { if (!at) read(...worst()); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move || !at) return;
    event.preventDefault();
    read(at[0] + move[0], at[1] + move[1]);
  });
  canvas.addEventListener("pointerdown", (event) => {
    const box = canvas.getBoundingClientRect();
    read(Math.floor((event.clientY - box.top) / box.height * rows), Math.floor((event.clientX - box.left) / box.width * columns));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  figure.append(top, side, canvas);
  paint();
  const both = make("div", "map");
  both.append(figure, told);
  return both;
}

function fill(details) {
  for (const place of details.querySelectorAll("[data-map]:empty")) {
    if (place.closest("details") !== details) continue;
    const map = maps[place.dataset.map];
    for (const view of map.views) place.append(draw(view, map.unit, place.dataset.name));
  }
}

for (const details of document.querySelectorAll("details.case")) {
  if (details.open) fill(details);
  details.addEventListener("toggle", () => { if (details.open) fill(details); });
}
function follow() { // a link into a closed case opens it
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let d = target.closest("details"); d; d = d.parentElement.closest("details")) d.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", follow);
follow();
