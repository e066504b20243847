// The table of every module, made from the numbers of report.json when it is first opened.
const everyModule = document.querySelector("#modules details");

// Null where nothing says it, or where two models have a module of this name in other shapes.
function moduleShape(name) {
  let found = null;
  for (const part of ["profiles", "plans", "updates"]) {
    for (const view of report[part]) {
      const m = view.modules[name];
      if (m === undefined || m.d_in === null) continue;
      if (found !== null && (m.d_in !== found.d_in || m.d_out !== found.d_out)) return null;
      found = m;
    }
  }
  return found;
}

function moduleRow(name, shows) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = name;
  const cell = document.createElement("td");
  const shape = moduleShape(name);
  if (shape === null) cell.textContent = "–";
  else cell.append(dataTag(shape.d_out, String), " × ", dataTag(shape.d_in, String));
  row.append(head, cell);
  for (const column of figures.columns) {
    const value = report[column.part][column.index].modules[name]?.[column.key] ?? null;
    const number = document.createElement("td");
    number.append(value === null ? "–" : dataTag(value, shows[column.show]));
    row.append(number);
  }
  return row;
}

function fillModules() {
  const body = everyModule.querySelector("tbody");
  if (!everyModule.open || body.childElementCount) return;
  const shows = { whole, short, percent, scientific };
  body.append(...moduleNames.map((name) => moduleRow(name, shows)));
}

everyModule?.addEventListener("toggle", fillModules);
