// Scales and axes of figures.
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const factors = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const factor of factors) {
      const tick = Number((factor * 10 ** power).toPrecision(12));
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  return ticks.length > 1 ? ticks : niceTicks(low, high, 4);
}

// Return { at(value), ticks } of an axis that maps low..high to from..to in pixels.
function scale(low, high, from, to, log = false, count = 6) {
  if (low === high) {
    const margin = log ? low * 0.1 : Math.abs(low) * 0.1 || 1;
    [low, high] = [low - margin, high + margin];
  }
  const transform = log ? Math.log10 : (value) => value;
  const [start, end] = [transform(low), transform(high)];
  return {
    at: (value) => from + ((transform(value) - start) / (end - start)) * (to - from),
    ticks: log ? logTicks(low, high) : niceTicks(low, high, count),
  };
}

function axes(x, y, box, label) {
  const parts = [];
  for (const tick of y.ticks) {
    const at = y.at(tick);
    parts.push(el("line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at }));
    parts.push(el("text", { class: "tick", x: box.left - 6, y: at + 4, "text-anchor": "end" }, shown(tick)));
  }
  for (const tick of x.ticks)
    parts.push(el("text", { class: "tick", x: x.at(tick), y: box.bottom + 16, "text-anchor": "middle" }, shown(tick)));
  parts.push(el("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  parts.push(el("text", { class: "tick", x: (box.left + box.right) / 2, y: box.bottom + 31, "text-anchor": "middle" }, label));
  return parts;
}

// The path through points [x, y] in pixels; null breaks it.
function pathOf(points) {
  let path = "";
  let pen = "M";
  for (const point of points) {
    if (!point) pen = "M";
    else {
      path += `${pen}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
      pen = "L";
    }
  }
  return path;
}

const widthOf = (place) => Math.max(280, Math.floor(place.clientWidth || 600));
