// Curves of metrics over epochs, several runs over each other.
const allMetrics = [...new Set(data.runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => name !== "epoch").sort();
const baseMetrics = allMetrics.filter((name) => !(name.endsWith("_ema") && allMetrics.includes(name.slice(0, -4))));

function panels() {
  const wanted = [data.metric.replace(/_ema$/, ""), ...data.others, "val/loss", "train/loss", "train/lr"];
  const known = (state.panels || []).filter((name) => baseMetrics.includes(name));
  if (known.length) return known;
  const found = [...new Set(wanted)].filter((name) => baseMetrics.includes(name));
  return found.length ? found : baseMetrics.slice(0, 2);
}

// Exponential smoothing without the bias towards the first value.
function smoothed(values, weight) {
  if (!weight) return values;
  let [mean, total] = [0, 0];
  return values.map((value) => {
    if (!isNumber(value)) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

function linesOf(metric) {
  const chosen = drawn();
  const kinds = { both: ["", "_ema"], raw: [""], ema: ["_ema"] }[state.weights];
  const hasEma = allMetrics.includes(`${metric}_ema`);
  return data.runs.filter((run) => chosen.has(run.name)).flatMap((run) =>
    (hasEma ? kinds : [""]).map((kind) => ({ run, ema: kind === "_ema", name: metric + kind, values: run.metrics[metric + kind] }))
      .filter((line) => line.values)
      .map((line) => {
        const values = smoothed(line.values, state.smooth);
        const points = run.metrics.epoch.map((epoch, index) => [epoch + 1, values[index]]);
        return { ...line, points: points.map((point) => (isNumber(point[1]) && (!state.log || point[1] > 0) ? point : null)) };
      }));
}

function drawPanel(place, metric) {
  const lines = linesOf(metric);
  const seen = lines.flatMap((line) => line.points.filter(Boolean));
  if (!seen.length) {
    place.replaceChildren(el("p", { class: "empty" }, "Nothing to draw: choose runs in the table."));
    return;
  }
  const width = widthOf(place);
  const box = { left: 58, right: width - 12, top: 10, bottom: 240 };
  const extent = (column) => seen.reduce(([low, high], point) => [Math.min(low, point[column]), Math.max(high, point[column])], [Infinity, -Infinity]);
  const x = scale(...extent(0), box.left, box.right, false, width < 500 ? 4 : 8);
  x.ticks = x.ticks.filter(Number.isInteger);
  const y = scale(...extent(1), box.bottom, box.top, state.log);
  const paths = lines.map((line) => {
    const pixels = line.points.map((point) => point && [x.at(point[0]), y.at(point[1])]);
    const single = pixels.filter(Boolean).length === 1 ? pixels.find(Boolean) : null;
    const look = { class: line.ema ? "curve ema" : "curve", stroke: colour(line.run), "data-run": line.run.name, "data-metric": line.name };
    const node = single ? el("circle", { ...look, cx: single[0], cy: single[1], r: 3 }) : el("path", { ...look, d: pathOf(pixels) });
    return { ...line, pixels, node };
  });
  const mark = el("circle", { class: "mark", r: 4, visibility: "hidden" });
  const picture = el("svg", { width, height: 276, role: "img", "aria-label": `${metric} over epochs` }, axes(x, y, box, "epoch"), paths.map((line) => line.node), mark);
  const leave = () => {
    hideTooltip();
    mark.setAttribute("visibility", "hidden");
    picture.classList.remove("hovered");
    paths.forEach((line) => line.node.classList.remove("near"));
  };
  picture.addEventListener("pointermove", (event) => hover(event, picture, paths, mark));
  picture.addEventListener("pointerleave", leave);
  place.replaceChildren(picture);
}

// Highlight the curve next to the pointer, and show its value.
function hover(event, picture, paths, mark) {
  const frame = picture.getBoundingClientRect();
  const [px, py] = [event.clientX - frame.left, event.clientY - frame.top];
  let best = null;
  for (const line of paths)
    line.pixels.forEach((pixel, index) => {
      if (!pixel) return;
      const distance = (2 * (pixel[0] - px)) ** 2 + (pixel[1] - py) ** 2;
      if (!best || distance < best.distance) best = { distance, line, index, pixel };
    });
  if (!best) return;
  picture.classList.add("hovered");
  paths.forEach((line) => line.node.classList.toggle("near", line.run === best.line.run));
  mark.setAttribute("cx", best.pixel[0]);
  mark.setAttribute("cy", best.pixel[1]);
  mark.setAttribute("fill", colour(best.line.run));
  mark.setAttribute("visibility", "visible");
  const [epoch, value] = best.line.points[best.index];
  const original = best.line.values[best.index];
  showTooltip(event, [best.line.run.name, `${best.line.name} ${shown(value)}${state.smooth ? ` (${shown(original)})` : ""}`, `epoch ${epoch}`]);
}

function curvesSection(update) {
  if (!allMetrics.length) return el("p", { class: "empty" }, "No run has finished an epoch.");
  const control = (label, node) => el("label", {}, label, " ", node);
  const logBox = el("input", { type: "checkbox", id: "log", onchange: () => update({ log: logBox.checked }) });
  logBox.checked = state.log;
  const smooth = el("input", { type: "range", id: "smooth", min: 0, max: 0.98, step: 0.02, value: state.smooth, oninput: () => update({ smooth: +smooth.value }) });
  const weights = el("select", { id: "weights", onchange: () => update({ weights: weights.value }) },
    [["both", "raw and EMA (dashed)"], ["raw", "raw"], ["ema", "EMA"]].map(([value, label]) => el("option", { value, selected: value === state.weights }, label)));
  const button = (label, names) => el("button", { type: "button", onclick: () => update({ drawn: names }) }, label);
  const controls = el("div", { class: "controls" },
    control("log scale", logBox), control("smoothing", smooth),
    allMetrics.some((name) => name.endsWith("_ema")) ? control("weights", weights) : null,
    button("best 8", bestRuns(8)), button("all", data.runs.map((run) => run.name)), button("none", []));
  const names = panels();
  const places = names.map((metric, number) => {
    const select = el("select", { "aria-label": "metric", onchange: () => update({ panels: names.map((name, other) => (other === number ? select.value : name)) }) },
      baseMetrics.map((name) => el("option", { value: name, selected: name === metric }, name)));
    return { metric, place: el("div", { class: "plot" }), select };
  });
  const section = el("div", {}, controls, el("div", { class: "panels" }, places.map((item) => el("figure", {}, el("figcaption", {}, item.select), item.place))));
  return { section, draw: () => places.forEach((item) => drawPanel(item.place, item.metric)) };
}
