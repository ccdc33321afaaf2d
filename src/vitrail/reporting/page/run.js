// Everything about one run.
function tree(value) {
  return el("ul", { class: "tree" }, Object.entries(value).map(([key, branch]) => {
    const isBranch = branch !== null && typeof branch === "object" && !Array.isArray(branch) && Object.keys(branch).length;
    if (isBranch) return el("li", {}, el("details", { open: Object.keys(branch).length < 6 }, el("summary", {}, key), tree(branch)));
    const leaf = Array.isArray(branch) ? JSON.stringify(branch) : branch === null ? "null" : typeof branch === "object" ? "{}" : String(branch);
    return el("li", {}, el("span", { class: "key" }, key), ": ", el("span", { class: "leaf" }, leaf));
  }));
}

const date = (seconds) => new Date(1000 * seconds).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });

function timeline(run, width) {
  if (!run.stretches.length) return null;
  const [start, end] = [run.stretches[0][0], Math.max(run.stretches[0][0] + 1, ...run.stretches.map((item) => item[1]))];
  const at = (time) => 8 + ((time - start) / (end - start)) * (width - 16);
  const endings = { preempted: "stopped", failed: "failed", "": "trained" };
  const bars = run.stretches.map(([from, to, first, last, ending], number) => {
    const isLast = number === run.stretches.length - 1;
    const kind = ending || (!isLast || run.status === "stopped" ? "killed" : "trained");
    const epochs = first === null ? "no finished epoch" : `epochs ${first} to ${last}`;
    const bar = el("rect", { class: `stretch ${kind}`, x: at(from), y: 12, width: Math.max(2, at(to) - at(from)), height: 18, rx: 3 });
    const about = [`${date(from)} to ${date(to)}`, epochs, endings[ending] && !ending ? kind : endings[ending] || kind];
    bar.addEventListener("pointermove", (event) => showTooltip(event, about));
    bar.addEventListener("pointerleave", hideTooltip);
    return bar;
  });
  const marks = run.events.map(([time, kind, note]) => {
    const mark = el("circle", { class: `event ${kind}`, cx: at(time), cy: 21, r: 4 });
    mark.addEventListener("pointermove", (event) => showTooltip(event, [date(time), note]));
    mark.addEventListener("pointerleave", hideTooltip);
    return mark;
  });
  return el("svg", { width, height: 42, role: "img", "aria-label": "time line" }, bars, marks);
}

function pictures(entry) {
  return Object.entries(entry.pictures).map(([name, picture]) => {
    const label = name.replaceAll("_", " ");
    const image = picture.data
      ? el("img", { src: `data:image/jpeg;base64,${picture.data}`, alt: label, loading: "lazy" })
      : el("p", { class: "hint" }, `not in this page, to keep it small: ${picture.file}`);
    return el("figure", {}, el("figcaption", {}, label), image);
  });
}

function calibration(points, width) {
  const size = Math.min(width, 340);
  const box = { left: 44, right: size - 10, top: 8, bottom: size - 44 };
  const [x, y] = [scale(0, 100, box.left, box.right, false, 5), scale(0, 100, box.bottom, box.top, false, 5)];
  const most = Math.max(...points.map((point) => point[2]));
  const bars = points.map(([confidence, accuracy, images]) => {
    const wide = 3 + 14 * (images / most); // the width shows the number of images
    const bar = el("rect", { class: "bin", x: x.at(100 * confidence) - wide / 2, y: y.at(100 * accuracy), width: wide, height: Math.max(1, box.bottom - y.at(100 * accuracy)) });
    bar.addEventListener("pointermove", (event) => showTooltip(event, [`confidence ${(100 * confidence).toFixed(1)} %`, `accuracy ${(100 * accuracy).toFixed(1)} %`, `${images} images`]));
    bar.addEventListener("pointerleave", hideTooltip);
    return bar;
  });
  const line = el("line", { class: "diagonal", x1: x.at(0), y1: y.at(0), x2: x.at(100), y2: y.at(100) });
  return el("figure", {}, el("figcaption", {}, "accuracy over confidence, %"),
    el("svg", { width: size, height: size, role: "img", "aria-label": "calibration" }, axes(x, y, box, "confidence, %"), bars, line));
}

function evaluation(entry, width, isOpen) {
  const number = (key, label, index) => ({ key, label, number: true, value: (row) => row[index], show: (value) => shown(value) });
  const name = (key, label, index) => ({ key, label, value: (row) => row[index] });
  const classes = entry.classes && localTable(
    [name("class", "class", 0), number("images", "images", 1), number("top1", "top-1 %", 2), number("top5", "top-5 %", 3), number("confidence", "confidence %", 4)],
    entry.classes, { key: "top1", down: false });
  const ious = entry.ious && localTable([name("class", "class", 0), number("iou", "IoU %", 1), number("accuracy", "accuracy %", 2)], entry.ious, { key: "iou", down: false });
  const pairs = entry.pairs && entry.pairs.length ? localTable([name("class", "class", 0), name("called", "called", 1), number("images", "images", 2)], entry.pairs, { key: "images", down: true }) : null;
  const summary = Object.entries(entry.summary).filter(([, value]) => value !== null).map(([key, value]) => `${key.replaceAll("_", " ")} ${shown(value)}`).join(", ");
  return el("details", { open: isOpen }, el("summary", {}, `Evaluation, ${entry.weights} weights`), el("p", {}, summary),
    el("div", { class: "pictures" }, entry.calibration && entry.calibration.length ? calibration(entry.calibration, width) : null, pictures(entry)),
    pairs && part("Confused pairs", pairs), classes && part("Classes", classes), ious && part("Classes", ious));
}

const part = (title, ...content) => el("details", { open: true }, el("summary", {}, title), content);

function runSection(run, width) {
  const listed = run.skipped.length < run.skipped_count ? `, the first ${run.skipped.length} of them` : "";
  const events = run.events.length ? el("ul", { class: "events" }, run.events.map(([time, kind, note]) => el("li", { class: kind }, `${date(time)}: ${note}`))) : null;
  return el("div", {},
    el("p", {}, statusCell(run)), el("p", { class: "path" }, run.path),
    run.has_config ? part("Command", run.command ? el("pre", {}, run.command) : null, el("p", { class: "hint" }, "repeat it exactly, and compare:"), el("pre", {}, run.reproduce)) : null,
    run.events.length || run.stretches.length ? part("Time line", timeline(run, width), events) : null,
    Object.keys(run.pictures).length ? part("Pictures", el("div", { class: "pictures" }, pictures(run))) : null,
    run.evaluations.length ? run.evaluations.map((entry, number) => evaluation(entry, width, number === run.evaluations.length - 1)) : el("p", { class: "hint" }, "Not evaluated: eval.py ckpt=<run> adds the results of each class, and more."),
    run.skipped_count ? part(`Skipped files: ${run.skipped_count}${listed}`, el("pre", {}, run.skipped.join("\n"))) : null,
    run.has_config ? el("details", {}, el("summary", {}, "Config"), tree(run.config)) : null,
    Object.keys(run.versions).length ? el("details", {}, el("summary", {}, "Versions"), tree(run.versions)) : null);
}
