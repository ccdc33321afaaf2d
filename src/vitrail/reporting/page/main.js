// Put the page together, and redraw what a change concerns.
data.runs.forEach((run, index) => { run.index = index; });
const places = Object.fromEntries(["table", "chooser", "curves", "sweep", "run"].map((name) => [name, el("div", { id: name })]));
const count = el("span", { class: "hint", id: "count" });
const filter = el("input", { type: "search", id: "filter", placeholder: "filter: words, epochs>10, status=failed", "aria-label": "filter", value: state.filter });
filter.addEventListener("input", () => { state.filter = filter.value; drawTable(); drawSweep(); save(); });

function matches(run) {
  return matcher(state.filter, runColumns())(run);
}

function drawTable() {
  drawn(); // assigns the colours
  const columns = runColumns();
  const test = matcher(state.filter, columns);
  const rows = data.runs.filter(test);
  count.textContent = rows.length === data.runs.length ? `${rows.length} runs` : `${rows.length} of ${data.runs.length} runs`;
  const sort = (next) => { state.sort = next; drawTable(); save(); };
  const look = (run) => ({ "data-run": run.name, class: run.name === state.open ? "open" : null });
  const before = places.table.firstChild;
  const position = before && [before.scrollLeft, before.scrollTop];
  places.table.replaceChildren(sortedTable(columns, rows, state.sort, sort, look));
  scrollTable(position);
}

function drawChooser() {
  const chosen = (columns) => { state.columns = columns; drawTable(); save(); };
  places.chooser.replaceChildren(...[columnChooser(chosen)].filter(Boolean));
}

function drawCurves() {
  const made = curvesSection((change) => {
    Object.assign(state, change);
    save();
    if ("drawn" in change) drawTable();
    if ("smooth" in change) made.draw();
    else drawCurves();
  });
  places.curves.replaceChildren(made.section || made);
  if (made.draw) made.draw();
}

function drawSweep() {
  const made = sweepSection((change) => { Object.assign(state, change); save(); drawSweep(); });
  places.sweep.hidden = !made;
  if (!made) return;
  places.sweep.replaceChildren(el("h2", {}, data.groups.length ? "Sweep" : "What differs"), made.section);
  made.draw();
}

// Draw or remove the curves of a run.
function draw(name, on) {
  const names = drawn();
  if (on) names.add(name);
  else names.delete(name);
  state.drawn = [...names];
  drawCurves();
  for (const row of places.table.querySelectorAll("tr[data-run]"))
    row.querySelector(".swatch").style.background = colour({ name: row.dataset.run });
  save();
}

function open(name, jump = true) {
  const run = data.runs.find((item) => item.name === name);
  state.open = run ? name : null;
  places.run.hidden = !run;
  if (run) places.run.replaceChildren(el("h2", {}, run.name), runSection(run, widthOf(places.run)));
  for (const row of places.table.querySelectorAll("tr[data-run]")) row.classList.toggle("open", row.dataset.run === name);
  if (run && jump) places.run.scrollIntoView({ behavior: "smooth" });
  save();
}

const written = new Date(data.written).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const many = data.runs.length > 1;
document.body.append(
  el("header", {}, el("h1", {}, data.title), el("p", { class: "hint" }, `written ${written}${data.reload ? ", reloads itself" : ""}`)),
  el("main", {},
    el("section", {}, many ? el("div", { class: "controls" }, filter, count) : null, many ? places.chooser : null, places.table),
    el("section", {}, el("h2", {}, "Curves"), places.curves),
    el("section", {}, places.sweep),
    el("section", {}, places.run)),
  tooltip);
drawChooser();
drawTable();
drawCurves();
drawSweep();
open(many ? state.open : data.runs[0].name, false);
restore();

let resized = 0;
let lastWidth = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === lastWidth) return; // phones hide their address bar while scrolling
  lastWidth = window.innerWidth;
  clearTimeout(resized);
  resized = setTimeout(() => { drawCurves(); drawSweep(); open(state.open, false); }, 150);
});
if (data.reload) {
  let lastActive = 0;
  for (const kind of ["pointermove", "pointerdown", "keydown", "wheel"]) window.addEventListener(kind, () => { lastActive = Date.now(); }, { passive: true });
  setInterval(() => {
    if (document.hidden || Date.now() - lastActive < 2000) return; // not under the user's hands
    save();
    location.reload();
  }, 1000 * data.reload);
}
document.documentElement.dataset.ready = "true";
