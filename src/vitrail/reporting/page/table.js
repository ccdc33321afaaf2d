// A table whose headers sort it. Columns: key, label, value(row), and optionally show(value, row), cell(row), title.
function order(rows, column, down) {
  const value = (row) => {
    const found = column.value(row);
    return found === "" || found === undefined ? null : found;
  };
  return [...rows].sort((first, second) => {
    const [a, b] = [value(first), value(second)];
    if (a === null || b === null) return (a === null) - (b === null); // missing values last, in both directions
    const difference = isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
    return down ? -difference : difference;
  });
}

function sortedTable(columns, rows, sort, onSort, rowAttributes = () => ({})) {
  const column = columns.find((item) => item.key === sort.key) || columns[0];
  const head = columns.map((item) => {
    const active = item.key === sort.key;
    const direction = active ? (sort.down ? "descending" : "ascending") : null;
    const click = () => onSort({ key: item.key, down: active ? !sort.down : Boolean(item.down) });
    const label = [item.label, active ? (sort.down ? " ▼" : " ▲") : ""];
    const content = item.unsorted ? item.label : el("button", { type: "button", title: item.title, onclick: click }, label);
    return el("th", { "aria-sort": direction, "data-key": item.key, class: item.number ? "number" : null }, content);
  });
  const body = order(rows, column, sort.down).map((row) =>
    el("tr", rowAttributes(row), columns.map((item) =>
      el("td", { class: item.number ? "number" : null }, item.cell ? item.cell(row) : text(item, row)))));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
}

// A sortable table that keeps its own order; used where nothing else depends on it.
function localTable(columns, rows, sort) {
  const place = el("div", { class: "local" });
  const draw = (current) => place.replaceChildren(sortedTable(columns, rows, current, draw));
  draw(sort);
  return place;
}

const percent = (metric) => /top\d|accuracy|mIoU|mAcc|aAcc/.test(metric);

function runColumns() {
  const best = (label, key, value = (run) => run[key], metric = data.metric, down = data.larger) => ({
    key, label, number: true, down, value, show: (found) => (percent(metric) ? fixed(found, 2) : shown(found)),
  });
  const hasEma = data.runs.some((run) => run.best_ema !== null);
  const visible = new Set(state.columns || data.columns.filter((column) => column.shown).map((column) => column.key));
  return [
    { key: "name", label: "run", value: (run) => run.name, cell: runCell },
    { key: "status", label: "status", value: (run) => run.status, show: (value, run) => [value, run.sentence, ...run.problems].join(" "), cell: statusCell },
    best(`best ${data.metric}`, "best"),
    ...(hasEma ? [best("best EMA", "best_ema")] : []),
    ...data.others.map((metric) => best(`best ${metric}`, `best ${metric}`, (run) => run.others[metric], metric, true)),
    ...data.columns.filter((column) => visible.has(column.key)).map((column) => ({
      key: `config ${column.key}`, label: column.key, number: column.values.some(isNumber),
      value: (run) => column.values[run.index],
    })),
    { key: "epochs", label: "epochs", number: true, value: (run) => run.epochs, show: (value, run) => (run.planned && run.planned !== value ? `${value}/${run.planned}` : `${value}`) },
    { key: "hours", label: "time", number: true, value: (run) => run.hours, show: hours },
    { key: "speed", label: "images/s", number: true, down: true, value: (run) => run.speed, show: (value) => fixed(value, 0) },
  ];
}

function runCell(run) {
  const box = el("input", { type: "checkbox", "aria-label": `draw the curves of ${run.name}`, onchange: () => draw(run.name, box.checked) });
  box.checked = slots.has(run.name);
  const swatch = el("span", { class: "swatch" });
  swatch.style.background = colour(run);
  return el("span", { class: "run" }, box, swatch, el("button", { type: "button", class: "link", onclick: () => open(run.name) }, run.name));
}

function statusCell(run) {
  const notes = [run.sentence, ...run.problems].filter(Boolean);
  return [el("span", { class: `status ${run.status}` }, run.status), notes.map((note) => el("div", { class: "note" }, note))];
}

// The names of the runs whose curves are drawn: the best ones until the user chooses.
function drawn() {
  const known = new Set(data.runs.map((run) => run.name));
  const names = new Set((state.drawn || bestRuns(8)).filter((name) => known.has(name)));
  assignColours(names);
  return names;
}

function bestRuns(count) {
  const column = { value: (run) => run.best };
  return order(data.runs.filter((run) => run.metrics.epoch), column, data.larger).slice(0, count).map((run) => run.name);
}

function columnChooser(onChange) {
  if (!data.columns.length) return null;
  const visible = new Set(state.columns || data.columns.filter((column) => column.shown).map((column) => column.key));
  const boxes = data.columns.map((column) => {
    const box = el("input", { type: "checkbox" });
    box.checked = visible.has(column.key);
    box.addEventListener("change", () => {
      if (box.checked) visible.add(column.key);
      else visible.delete(column.key);
      onChange([...visible]);
    });
    return el("label", {}, box, " ", column.key);
  });
  return el("details", { class: "chooser" }, el("summary", {}, `columns (${data.columns.length} keys differ)`), el("div", { class: "boxes" }, boxes));
}
