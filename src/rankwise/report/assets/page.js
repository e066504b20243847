const heatPlot = document.getElementById("heatmap-plot");
const byPlainName = new Map(moduleNames.map((name) => [plain(name), name]));
const marker = document.createElement("div");
marker.className = "chosen-cell";
marker.hidden = true;

// Beside the plot; below it where the page is narrow.
function scaleBar(bar, plot) {
  return narrow(plot)
    ? { outlinewidth: 0, ...bar, orientation: "h", y: -0.18, yanchor: "top", thickness: 10, title: { ...bar.title, side: "bottom" } }
    : { outlinewidth: 0, ...bar, thickness: 14, title: { ...bar.title, side: "right" } };
}

function drawPlot(plot) {
  const name = plot.dataset.plot;
  const radio = document.querySelector(`input[name="plot-${name}"]:checked`);
  const variant = figures.plots[name][radio ? Number(radio.value) : 0];
  const training = document.getElementById("show-training")?.checked ?? true;
  const traces = variant.figure.data
    .filter((trace) => training || trace.meta?.part !== "training")
    .map(colored)
    .map((trace) => (trace.colorbar ? { ...trace, colorbar: scaleBar(trace.colorbar, plot) } : trace));
  const layout = themed(variant.figure.layout, plot);
  // A legend above takes rows away from the plot on a narrow page.
  layout.height += narrow(plot) ? Math.min(22 * traces.length, 330) : 0;
  Plotly.react(plot, traces, layout, { ...config, displayModeBar: narrow(plot) ? false : "hover" });
  document.querySelector(`[data-reading="${name}"]`).textContent = variant.reading;
}

// Plotly writes grey on grey in the middle of the scale; black and white read better.
function cellTexts(trace) {
  const painted = trace.z.flat().filter((z) => z !== null);
  const low = trace.zmin ?? Math.min(...painted);
  const high = trace.zmax ?? Math.max(...painted);
  const sides = ["#ffffff", "#000000"].map((color) => ({
    type: "scatter", mode: "text", x: [], y: [], text: [], textfont: { color, size: 12 },
    hoverinfo: "skip", showlegend: false,
  }));
  trace.z.forEach((row, i) => row.forEach((z, j) => {
    if (z === null) return;
    const side = sides[Number((z - low) / (high - low) > 0.45)];
    side.x.push(trace.x[j]);
    side.y.push(trace.y[i]);
    side.text.push(trace.text[i][j]);
  }));
  return sides;
}

function chosenView() {
  const [g, v] = document.querySelector('input[name="view"]:checked').value.split(".").map(Number);
  return [figures.heatmaps[g], figures.heatmaps[g].views[v]];
}

function drawHeatmap() {
  const [group, view] = chosenView();
  const base = group.figure.data[0];
  const layout = themed(group.figure.layout, heatPlot);
  const small = narrow(heatPlot);
  const cellWidth = (width(heatPlot) - (small ? 70 : 170)) / base.x.length;
  const cellHeight = (layout.height - 70) / base.y.length;
  const colorbar = small
    ? { orientation: "h", y: 0, yanchor: "top", thickness: 10, title: { ...view.trace.colorbar.title, side: "bottom" } }
    : { thickness: 14, title: { ...view.trace.colorbar.title, side: "right" } };
  const trace = {
    ...base,
    ...view.trace,
    colorbar: { outlinewidth: 0, ...view.trace.colorbar, ...colorbar },
  };
  if (cellHeight < 8) trace.ygap = 0; // gaps would outweigh the cells
  const traces = [trace];
  if (cellWidth >= 56 && cellHeight >= 14) traces.push(...cellTexts(trace));
  if (small) layout.height += 60;
  layout.margin = { ...layout.margin, b: small ? 70 : 12, t: small ? 12 : 56 };
  layout.xaxis.range = [-0.5, base.x.length - 0.5];
  layout.yaxis.range = [base.y.length - 0.5, -0.5];
  layout.xaxis.tickangle = cellWidth >= 80 ? 0 : -60;
  if (cellWidth < 80) layout.xaxis.automargin = true;
  Plotly.react(heatPlot, traces, layout, { ...config, displayModeBar: false });
  document.getElementById("view-reading").textContent = view.label + ": " + view.reading;
  if (!marker.isConnected) heatPlot.append(marker);
  markChosen();
}

function cellName(i, j) {
  const cell = chosenView()[0].figure.data[0].customdata[i]?.[j];
  return cell ? byPlainName.get(cell[0]) : undefined;
}

function chosenCell() {
  const rows = chosenView()[0].figure.data[0].customdata;
  for (let i = 0; i < rows.length; i += 1) {
    const j = rows[i].findIndex((cell) => cell && byPlainName.get(cell[0]) === chosen);
    if (j >= 0) return [i, j];
  }
  return null;
}

// A frame over the chosen cell: moving it is quicker than drawing the heatmap again.
function markChosen() {
  const cell = heatPlot && chosen !== null ? chosenCell() : null;
  marker.hidden = cell === null;
  if (cell === null) return;
  const { xaxis, yaxis } = heatPlot._fullLayout;
  const [i, j] = cell;
  const [left, right] = [j - 0.5, j + 0.5].map((at) => xaxis._offset + xaxis.l2p(at));
  const [top, bottom] = [i - 0.5, i + 0.5].map((at) => yaxis._offset + yaxis.l2p(at));
  Object.assign(marker.style, {
    left: `${left}px`, top: `${top}px`, width: `${right - left}px`, height: `${Math.max(bottom - top, 3)}px`,
  });
}

function choose(name) {
  if (name === undefined) return;
  showModule(name);
  markChosen();
}

const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
function moveChosen(event) {
  const by = arrows[event.key];
  if (by === undefined) return;
  event.preventDefault();
  const rows = chosenView()[0].figure.data[0].customdata;
  let [i, j] = chosenCell() ?? [-by[0], -by[1]];
  do {
    i += by[0];
    j += by[1];
  } while (rows[i] !== undefined && j >= 0 && j < rows[i].length && !rows[i][j]);
  choose(cellName(i, j));
}

const plots = [...document.querySelectorAll("[data-plot]")];

function draw() {
  plots.forEach(drawPlot);
  if (heatPlot) drawHeatmap();
  if (chosen !== null) showModule(chosen);
}

for (const plot of plots) {
  for (const input of document.querySelectorAll(`input[name="plot-${plot.dataset.plot}"]`)) {
    input.addEventListener("change", () => drawPlot(plot));
  }
}
document.getElementById("show-training")?.addEventListener("change", () => {
  drawPlot(document.querySelector('[data-plot="loss"]'));
});
for (const input of document.querySelectorAll('input[name="view"]')) {
  input.addEventListener("change", drawHeatmap);
}
dark.addEventListener("change", draw);
let seen = document.documentElement.clientWidth;
let waiting = 0;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (document.documentElement.clientWidth === seen || printing) return;
    seen = document.documentElement.clientWidth;
    draw();
  }, 120);
});
addEventListener("beforeprint", () => {
  printing = true;
  document.documentElement.dataset.theme = "light";
  draw();
});
addEventListener("afterprint", () => {
  printing = false;
  delete document.documentElement.dataset.theme;
  draw();
});
document.getElementById("save-json").addEventListener("click", () => {
  const text = JSON.stringify(report, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
draw();
if (heatPlot) {
  heatPlot.on("plotly_click", (event) => choose(cellName(event.points[0].pointIndex[0], event.points[0].pointIndex[1])));
  heatPlot.addEventListener("keydown", moveChosen);
  const first = figures.heatmaps[0].figure.data[0].customdata.flat().find((cell) => cell);
  choose(byPlainName.get(first[0]));
}
