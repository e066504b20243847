// One module: its numbers, its spectra and where the cuts fell. All of it is read from the
// numbers of report.json when a module is chosen.
const detail = document.getElementById("detail");
const chooser = document.getElementById("choose-module");
const moduleNames = [
  ...new Set(["profiles", "plans", "updates"].flatMap((part) => report[part].flatMap((view) => Object.keys(view.modules)))),
];
let chosen = null;

function factList(title, facts) {
  const list = document.createElement("dl");
  list.className = "facts";
  for (const [name, value, show] of [["", title, null], ...facts]) {
    if (value === null || value === undefined) continue;
    const row = document.createElement("div");
    const term = document.createElement("dt");
    const shown = document.createElement("dd");
    term.textContent = name;
    if (show === null) {
      const strong = document.createElement("strong");
      strong.textContent = value;
      shown.append(strong);
    } else {
      shown.append(dataTag(value, show));
    }
    row.append(term, shown);
    list.append(row);
  }
  return list;
}

function moduleFacts(name) {
  const lists = [];
  for (const view of report.profiles) {
    const m = view.modules[name];
    if (m === undefined) continue;
    lists.push(factList(view.label, [
      ["GID", m.gid, short], ["stable rank", m.stable_rank, short],
      ["participation ratio", m.participation_ratio, short],
      ["directions for 90 %", m.directions, whole], ["energy rank (batches)", m.energy_rank, whole],
      ["sensitivity, loss", m.sensitivity, short], ["gradient norm", m.gradient_norm, short],
      ["Fisher", m.fisher, short],
    ]));
  }
  for (const view of report.plans) {
    const m = view.modules[name];
    if (m === undefined) continue;
    lists.push(factList("plan " + view.label, [
      ["rank", m.rank, whole], ["blocks", m.blocks, whole], ["reach n × r", m.reach, whole],
      ["parameters", m.parameters, whole], ["captured energy", m.captured, percent],
    ]));
  }
  for (const view of report.updates) {
    const m = view.modules[name];
    if (m === undefined) continue;
    lists.push(factList("learned " + view.label, [
      ["stable rank", m.update_stable_rank, short], ["effective rank", m.update_rank, short],
      ["update norm", m.update_norm, short], ["condition number", m.condition_number, short],
      ["directions above 1e-6", m.precise_directions, whole],
    ]));
  }
  return lists;
}

function gradientCurves(name, key) {
  const found = [];
  report.profiles.forEach((view, series) => {
    const m = view.modules[name];
    if (m === undefined || m.gradient_norm === 0) return;
    const at = view.sampled_at[String(Math.min(m.d_in, m.d_out))];
    found.push({ x: at, y: m[key], name: plain(view.label), series });
  });
  return found;
}

function updateCurves(name) {
  const found = [];
  report.updates.forEach((view, series) => {
    const m = view.modules[name];
    if (m === undefined || m.update_norm === 0) return;
    const side = Math.min(m.d_in, m.d_out);
    const most = view.kind === "lrlora" ? side : Math.min(m.rank * m.blocks, side);
    const at = view.sampled_at[String(most)];
    found.push({ x: at, y: m.singular_values, name: plain(view.label), series });
  });
  return found;
}

// Cuts of plans that agree share one line, so that their names do not overprint.
function cuts(name) {
  const at = new Map();
  for (const view of report.plans) {
    const m = view.modules[name];
    if (m === undefined || view.serving.adapter === "lr-lora") continue;
    at.set(m.reach, [...(at.get(m.reach) ?? []), view.label]);
  }
  return [...at].sort((a, b) => a[0] - b[0]).map(([reach, labels]) => ({ reach, label: labels.join(", ") }));
}

function drawCurves(id, lines, marks, yaxis, hover) {
  const plot = document.getElementById(id);
  plot.hidden = lines.length === 0;
  if (plot.hidden) return;
  const legend = lines.length > 1;
  const traces = lines.map((curve) => colored({
    type: "scatter", mode: curve.x.length > 16 ? "lines" : "lines+markers", x: curve.x, y: curve.y, name: curve.name,
    marker: { size: 4, symbol: symbols[curve.series % symbols.length] }, line: { width: 2 },
    meta: { series: curve.series }, hovertemplate: hover,
  }));
  const layout = themed({
    height: 360 + (legend ? 40 : 0), margin: { l: 76, r: 12, t: 16 + 16 * marks.length, b: 48 }, dragmode: false,
    hovermode: "closest", showlegend: legend, legend: { orientation: "h", y: -0.25, yanchor: "top", x: 0 },
    xaxis: { title: { text: "rank, dimensions" }, type: "log", dtick: "D2", tickformat: ",d" },
    yaxis,
    shapes: marks.map((mark, i) => ({
      type: "line", x0: mark.reach, x1: mark.reach, y0: 0, y1: 1, yref: "paper",
      line: { color: css("--ink"), width: 1.5, dash: ["dash", "dot", "dashdot", "longdash"][i % 4] },
    })),
    annotations: marks.map((mark, i) => ({
      x: Math.log10(mark.reach), y: 1, yref: "paper", yshift: 2 + 15 * i, text: plain(`${mark.label}: ${mark.reach}`),
      showarrow: false, yanchor: "bottom",
      xanchor: mark.reach ** 2 > Math.max(...lines[0].x) ? "right" : "left", font: { size: 11, color: css("--ink") },
    })),
  }, plot);
  Plotly.react(plot, traces, layout, { ...config, displayModeBar: false });
}

// The shape of each plan's update: the outline is the weight, the squares are where it can change.
function blockDrawings(name) {
  const place = document.getElementById("detail-blocks");
  place.replaceChildren();
  const drawn = new Set();
  for (const view of [...report.plans, ...report.updates]) {
    const m = view.modules[name];
    if (m === undefined || m.d_in === null || m.blocks < 2) continue;
    // an adapter has the blocks of its plan, which is drawn already where it is known
    if (report.updates.includes(view) && drawn.has(`${m.blocks} ${m.rank}`)) continue;
    drawn.add(`${m.blocks} ${m.rank}`);
    const scale = 150 / Math.max(m.d_in, m.d_out);
    const [w, h] = [m.d_in * scale, m.d_out * scale];
    const figure = document.createElement("figure");
    const svg = document.getElementById("drawing").content.firstElementChild.cloneNode(true);
    const blank = svg.firstElementChild;
    svg.replaceChildren();
    const add = (attributes) => {
      const rect = blank.cloneNode();
      for (const [key, value] of Object.entries(attributes)) rect.setAttribute(key, value);
      svg.append(rect);
    };
    svg.setAttribute("viewBox", `-1 -1 ${w + 2} ${h + 2}`);
    svg.setAttribute("width", w + 2);
    svg.setAttribute("height", h + 2);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${m.blocks} diagonal blocks`);
    add({ x: 0, y: 0, width: w, height: h, class: "outline" });
    for (let i = 0; i < m.blocks; i += 1) {
      add({ x: (i * w) / m.blocks, y: (i * h) / m.blocks, width: w / m.blocks, height: h / m.blocks, class: "block" });
    }
    const caption = document.createElement("figcaption");
    caption.textContent = `${view.label}: ${m.blocks} blocks of ${m.d_out / m.blocks} × ${m.d_in / m.blocks}, each of rank ${m.rank}. `
      + "The frame is the weight; the update is zero outside the blocks.";
    figure.append(svg, caption);
    place.append(figure);
  }
}

function showModule(name) {
  chosen = name;
  detail.hidden = false;
  chooser.value = name;
  document.getElementById("detail-name").textContent = name;
  document.getElementById("detail-facts").replaceChildren(...moduleFacts(name));
  const some = report.profiles.some((view) => name in view.modules);
  document.getElementById("detail-reading").textContent = some
    ? "Singular values σ of the mean gradient, and how much of its energy the first so many hold. "
      + "Vertical lines are where each plan cuts: what lies to the right of a line is beyond its rank "
      + "(n × r with blocks). " + (report.updates.length ? "The last plot is what training learned. " : "")
      + "Long spectra are shown at up to 64 ranks, evenly spaced on the logarithmic axis."
    : "";
  const marks = cuts(name);
  const value = "%{fullData.name}, rank %{x}<br>%{y:.3e}<extra></extra>";
  const log = { type: "log", exponentformat: "power" };
  drawCurves("spectrum-plot", gradientCurves(name, "singular_values"), marks, { ...log, title: { text: "gradient σ, loss per weight" } }, value);
  drawCurves(
    "energy-plot", gradientCurves(name, "energy"), marks,
    { title: { text: "energy held, %" }, tickformat: ".0%", rangemode: "tozero" },
    "%{fullData.name}, rank %{x}<br>%{y:.2%}<extra></extra>",
  );
  drawCurves("update-plot", updateCurves(name), [], { ...log, title: { text: "learned update σ, weight" } }, value);
  blockDrawings(name);
}

function stepModule(by) {
  const next = moduleNames.indexOf(chosen) + by;
  if (next >= 0 && next < moduleNames.length) showModule(moduleNames[next]);
  markChosen();
}

if (detail) {
  chooser.append(...moduleNames.map((name) => {
    const option = document.createElement("option");
    option.value = name;
    option.textContent = name;
    return option;
  }));
  // a list that measures itself would measure every name again at each choice
  chooser.style.width = `${Math.max(...moduleNames.map((name) => name.length)) + 4}ch`;
  chooser.addEventListener("change", () => { showModule(chooser.value); markChosen(); });
  document.getElementById("previous-module").addEventListener("click", () => stepModule(-1));
  document.getElementById("next-module").addEventListener("click", () => stepModule(1));
}
