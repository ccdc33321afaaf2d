// Parallel coordinates of a sweep, and the importance of its keys.
function heat(share) {
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [221, 190, 30]];
  const at = Math.max(0, Math.min(1, share)) * (stops.length - 1);
  const [low, rest] = [Math.min(Math.floor(at), stops.length - 2), at - Math.min(Math.floor(at), stops.length - 2)];
  return `rgb(${stops[low].map((value, part) => Math.round(value + rest * (stops[low + 1][part] - value))).join(" ")})`;
}

// The axis of one key: numbers on a line, on a log scale if they span a decade; other values one below the other.
function axisOf(label, values, top, bottom) {
  const present = values.filter((value) => value !== null && value !== undefined);
  const numbers = present.map((value) => (typeof value === "boolean" ? NaN : Number(value)));
  if (present.length && numbers.every(Number.isFinite)) {
    const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
    const axis = scale(low, high, bottom, top, low > 0 && high / low >= 10, 4);
    return { label, at: (value) => axis.at(Number(value)), ticks: axis.ticks.map((tick) => [axis.at(tick), shown(tick)]) };
  }
  const names = [...new Set(present.map(String))].sort();
  const step = names.length > 1 ? (bottom - top) / (names.length - 1) : 0;
  const at = (value) => (names.length > 1 ? top + names.indexOf(String(value)) * step : (top + bottom) / 2);
  return { label, at, ticks: names.slice(0, 24).map((name) => [at(name), name.length > 14 ? `${name.slice(0, 13)}…` : name]) };
}

function groupKeys(group) {
  const columns = data.columns.filter((column) => group.keys.includes(column.key));
  return columns.length ? columns : data.columns.filter((column) => column.shown);
}

function drawCoordinates(place, group) {
  const runs = group.runs.map((index) => data.runs[index]).filter((run) => isNumber(run.best) && matches(run));
  if (runs.length < 2) {
    place.replaceChildren(el("p", { class: "empty" }, "Fewer than two of these runs have results."));
    return;
  }
  const [top, bottom, left] = [34, 250, 46];
  const scores = runs.map((run) => run.best);
  const keys = groupKeys(group);
  const width = Math.max(widthOf(place), 110 * (keys.length + 1));
  const list = [...keys.map((column) => axisOf(column.key, runs.map((run) => column.values[run.index]), top, bottom)),
    axisOf(data.metric, scores, top, bottom)];
  const gap = (width - left - 90) / (list.length - 1);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const good = (score) => (high === low ? 1 : (score - low) / (high - low));
  const lines = [...runs].sort((a, b) => (data.larger ? a.best - b.best : b.best - a.best)).map((run) => {
    const values = [...keys.map((column) => column.values[run.index]), run.best];
    const points = values.map((value, number) => (value === null || value === undefined ? null : [left + number * gap, list[number].at(value)]));
    const node = el("path", { class: "coordinate", d: pathOf(points), stroke: heat(data.larger ? good(run.best) : 1 - good(run.best)), "data-run": run.name, tabindex: 0 });
    const about = [run.name, ...keys.map((column) => `${column.key} ${shown(column.values[run.index])}`), `${data.metric} ${shown(run.best)}`];
    node.addEventListener("pointermove", (event) => { node.classList.add("near"); showTooltip(event, about); });
    node.addEventListener("pointerleave", () => { node.classList.remove("near"); hideTooltip(); });
    node.addEventListener("click", () => open(run.name));
    return node;
  });
  const marks = list.flatMap((axis, number) => [
    el("line", { class: "axis", x1: left + number * gap, x2: left + number * gap, y1: top, y2: bottom }),
    el("text", { class: "name", x: left + number * gap, y: 14 + 12 * (number % 2), "text-anchor": number ? "middle" : "start" }, axis.label),
    ...axis.ticks.map(([at, label]) => el("text", { class: "tick", x: left + number * gap + 5, y: at + 4 }, label)),
  ]);
  place.replaceChildren(el("div", { class: "scroll" }, el("svg", { width, height: 264, role: "img", "aria-label": "parallel coordinates" }, lines, marks)));
}

function importanceBars(group) {
  const shares = Object.entries(group.importance);
  if (!shares.length) return el("p", { class: "hint" }, "Importance needs Optuna (pip install 'vitrail[sweep]'), five finished runs and two keys.");
  return el("div", { class: "bars" }, shares.map(([key, share]) => {
    const bar = el("span", { class: "bar" });
    bar.style.width = `${(100 * share).toFixed(1)}%`;
    return el("div", {}, el("span", { class: "key" }, key), el("span", { class: "track" }, bar), el("span", { class: "share" }, `${Math.round(100 * share)} %`));
  }));
}

function sweepSection(update) {
  const all = { name: "all runs", runs: data.runs.map((run) => run.index), keys: data.columns.filter((column) => column.shown).map((column) => column.key), importance: {} };
  const choices = data.groups.length ? [...data.groups, ...(data.groups.length > 1 ? [all] : [])] : all.keys.length && data.runs.length > 1 ? [all] : [];
  if (!choices.length) return null;
  const group = choices.find((item) => item.name === state.axes) || choices[0];
  const select = el("select", { "aria-label": "sweep", onchange: () => update({ axes: select.value }) },
    choices.map((item) => el("option", { value: item.name, selected: item === group }, item.name)));
  const place = el("div", { class: "plot" });
  const parts = [el("div", { class: "controls" }, select, el("span", { class: "hint" }, `lines are coloured by ${data.metric}; a click opens the run`)), place];
  if (group !== all) parts.push(el("h3", {}, "Importance"), importanceBars(group));
  return { section: el("div", {}, parts), draw: () => drawCoordinates(place, group) };
}
