"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const lossPlot = document.getElementById("loss-plot");
  const heatPlot = document.getElementById("heatmap-plot");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = {
    displaylogo: false,
    modeBarButtons: [["toImage"]],
    showSendToCloud: false, // Plotly's default bar offers to upload the chart
    plotlyServerURL: "",
    toImageButtonOptions: { filename: "rankwise", scale: 2 },
  };
  const printWidth = 700;
  let printing = false;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const width = (plot) => (printing ? printWidth : plot.clientWidth);

  function themed(layout, plot) {
    const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false };
    const narrow = width(plot) < 560;
    return {
      ...layout,
      width: width(plot),
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 13, color: css("--ink") },
      hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { family: getComputedStyle(document.body).fontFamily, color: css("--ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
  }

  function drawLosses() {
    const training = document.getElementById("show-training").checked;
    const colors = css("--series").split(/\s+/);
    const traces = figures.losses.data
      .filter((trace) => training || trace.meta.part !== "training")
      .map((trace) => {
        const color = colors[trace.meta.series % colors.length];
        const recolored = { ...trace, line: { ...trace.line, color } };
        if (trace.marker) recolored.marker = { ...trace.marker, color };
        return recolored;
      });
    const layout = themed(figures.losses.layout, lossPlot);
    layout.height = width(lossPlot) < 560 ? 380 : 420;
    Plotly.react(lossPlot, traces, layout, config);
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

  function drawHeatmap() {
    const [g, v] = document.querySelector('input[name="view"]:checked').value.split(".").map(Number);
    const group = figures.heatmaps[g];
    const view = group.views[v];
    const base = group.figure.data[0];
    const layout = themed(group.figure.layout, heatPlot);
    const narrow = width(heatPlot) < 560;
    const cellWidth = (width(heatPlot) - (narrow ? 70 : 170)) / base.x.length;
    const cellHeight = (layout.height - 70) / base.y.length;
    const colorbar = narrow
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
    if (narrow) layout.height += 60;
    layout.margin = { ...layout.margin, b: narrow ? 70 : 12, t: narrow ? 12 : 56 };
    layout.xaxis.range = [-0.5, base.x.length - 0.5];
    layout.yaxis.range = [base.y.length - 0.5, -0.5];
    layout.xaxis.tickangle = cellWidth >= 80 ? 0 : -60;
    if (cellWidth < 80) layout.xaxis.automargin = true;
    Plotly.react(heatPlot, traces, layout, { ...config, displayModeBar: !narrow });
    document.getElementById("view-reading").textContent = view.label + ": " + view.reading;
  }

  function draw() {
    if (lossPlot) drawLosses();
    if (heatPlot) drawHeatmap();
  }

  if (lossPlot) document.getElementById("show-training").addEventListener("change", drawLosses);
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
    const text = JSON.stringify(JSON.parse(document.getElementById("report").textContent), null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  draw();
})();
