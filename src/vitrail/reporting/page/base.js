// Elements, numbers and the state that survives a reload.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const svgTags = new Set(["svg", "path", "line", "text", "circle", "rect", "g", "title"]);

// Create an element; strings among the children become text, never HTML.
function el(tag, attributes = {}, ...children) {
  const node = svgTags.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children.flat(9)) if (child !== null && child !== undefined && child !== "") node.append(child);
  return node;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e5 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(5)));
}

const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits) : "");
const hours = (value) => (!isNumber(value) ? "" : value < 1 ? `${(60 * value).toFixed(1)} min` : `${value.toFixed(1)} h`);

// State by run name, because the numbers of runs change when new ones start.
const defaults = {
  sort: data.runs.length > 1 ? { key: "best", down: data.larger } : { key: "name", down: false },
  filter: "", drawn: null, open: null, columns: null, panels: null, log: false, smooth: 0, weights: "both", axes: null,
};
const storageKey = `vitrail report ${location.pathname} ${data.title}`; // files share one storage
let state = { ...defaults };
try {
  state = { ...defaults, ...JSON.parse(sessionStorage.getItem(storageKey) || "{}") };
} catch { /* no storage: the page works without it */ }

function save() {
  const table = document.querySelector("#table .scroll");
  const opened = [...document.querySelectorAll("details")].map((node) => node.open);
  const seen = { scroll: window.scrollY, tableScroll: table && [table.scrollLeft, table.scrollTop], opened };
  try {
    sessionStorage.setItem(storageKey, JSON.stringify({ ...state, ...seen }));
  } catch { /* as above */ }
}

// Return to where the page was before a reload.
function restore() {
  const nodes = [...document.querySelectorAll("details")];
  if (state.opened && state.opened.length === nodes.length) nodes.forEach((node, index) => { node.open = state.opened[index]; });
  scrollTable(state.tableScroll);
  if (state.scroll) window.scrollTo(0, state.scroll);
}

function scrollTable(position) {
  const table = document.querySelector("#table .scroll");
  if (table && position) [table.scrollLeft, table.scrollTop] = position;
}

// Colours of the drawn runs: a run keeps its colour while it is drawn, and a new one gets the first that is free.
const palette = ["#1f6fc4", "#d9541e", "#2a9d4e", "#a03bb5", "#b8860b", "#c2255c", "#0b8f96", "#6b5b2e", "#5f5fd9", "#57606a"];
const slots = new Map();

function assignColours(names) {
  for (const name of [...slots.keys()]) if (!names.has(name)) slots.delete(name);
  let free = 0;
  for (const name of names) {
    if (slots.has(name)) continue;
    const taken = new Set(slots.values());
    while (taken.has(free)) free += 1;
    slots.set(name, free);
  }
}

function colour(run) {
  const slot = slots.get(run.name);
  if (slot === undefined) return "transparent";
  return slot < palette.length ? palette[slot] : `hsl(${(slot * 137.5) % 360} 62% 42%)`;
}

const tooltip = el("div", { class: "tooltip", role: "status", hidden: true });

function showTooltip(event, lines) {
  tooltip.replaceChildren(...lines.map((line) => el("div", {}, line)));
  tooltip.hidden = false;
  const left = Math.min(event.clientX + 14, window.innerWidth - tooltip.offsetWidth - 8);
  const top = Math.min(event.clientY + 14, window.innerHeight - tooltip.offsetHeight - 8);
  tooltip.style.left = `${Math.max(4, left)}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

// Return a row's test for a filter: words that occur in it, and comparisons such as "epochs>10" or "lr=0.001".
function matcher(filter, columns) {
  const tests = filter.trim().split(/\s+/).filter(Boolean).map((term) => {
    const found = /^(.+?)(<=|>=|<|>|=)(.+)$/.exec(term);
    const column = found && columns.find((item) => item.label.replaceAll(" ", "") === found[1] || item.key === found[1]);
    if (!column) return (row) => columns.some((item) => text(item, row).toLowerCase().includes(term.toLowerCase()));
    const [, , operator, wanted] = found;
    return (row) => {
      const value = column.value(row);
      if (operator === "=") return String(value) === wanted || text(column, row) === wanted || (isNumber(value) && value === Number(wanted));
      if (!isNumber(value)) return false;
      return { "<": value < +wanted, ">": value > +wanted, "<=": value <= +wanted, ">=": value >= +wanted }[operator];
    };
  });
  return (row) => tests.every((test) => test(row));
}

const text = (column, row) => (column.show ? column.show(column.value(row), row) : shown(column.value(row)));
