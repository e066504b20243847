// Colours, sizes and digits, shared by every plot.
const report = JSON.parse(document.getElementById("report").textContent);
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const group of figures.heatmaps) group.figure.data[0].customdata = figures.cells[group.cells];
const dark = matchMedia("(prefers-color-scheme: dark)");
const config = {
  displaylogo: false,
  modeBarButtons: [["toImage"]],
  showSendToCloud: false, // Plotly's default bar offers to upload the chart
  plotlyServerURL: "",
  toImageButtonOptions: { filename: "rankwise", scale: 2 },
};
const printWidth = 700;
const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star"];
let printing = false;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const width = (plot) => (printing ? plot.closest(".pair") ? printWidth / 2 - 20 : printWidth : plot.clientWidth);
const narrow = (plot) => width(plot) < 560;

// Plotly reads a subset of HTML in names.
function plain(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, " ");
}

function whole(value) {
  return Math.round(value).toLocaleString("en-US");
}

// Three significant digits, as the words of the page have them.
function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 999999.5 || size < 0.01) {
    return value.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2");
  }
  const digits = size >= 99.95 ? 0 : size >= 9.995 ? 1 : size >= 0.9995 ? 2 : 3;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function percent(value) {
  const shown = (100 * value).toFixed(1);
  if (shown !== "100.0") return shown + " %";
  return value >= 1 ? "100 %" : (100 * Math.min(value, 0.99999)).toFixed(3) + " %";
}

function scientific(value) {
  return value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2");
}

function dataTag(value, show) {
  const data = document.createElement("data");
  data.value = String(value);
  data.textContent = show(value);
  return data;
}

function themed(layout, plot) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false };
  const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
  const font = { family: getComputedStyle(document.body).fontFamily, color: css("--ink") };
  return {
    ...layout,
    width: width(plot),
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { ...font, size: narrow(plot) ? 12 : 13 },
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
    ...Object.fromEntries(axes.map((key) => [key, { ...axis, ...layout[key] }])),
    // shapes without a colour of their own are marks that belong to the page's colours
    shapes: (layout.shapes ?? []).map((shape) => ({ ...shape, line: { color: css("--soft"), ...shape.line } })),
  };
}

// Traces know their series; the colours of the series belong to the light or dark page.
function colored(trace) {
  const colors = css("--series").split(/\s+/);
  const meta = trace.meta ?? {};
  if (meta.keep || trace.z) return trace;
  const color = meta.soft ? css("--soft") : meta.ink ? css("--ink") : colors[(meta.series ?? 0) % colors.length];
  const made = { ...trace, marker: { ...trace.marker, color } };
  if (trace.type !== "bar") made.line = { ...trace.line, color };
  if (meta.ink) made.marker.line = { ...trace.marker?.line, color };
  return made;
}
