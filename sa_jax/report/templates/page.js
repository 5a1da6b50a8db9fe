"use strict";
// Sort, filter and group what the page holds; save its plots; reload where it is served live.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const form = document.querySelector("form.controls");
  const lists = all("[data-list]"); // table bodies and grids of plots, whose children are the items
  const state = { q: "", by: "", sort: "", down: false, axes: {} };
  const original = new Map(lists.map((list) => [list, [...list.children]]));

  const number = (text) => (text === "" || text === undefined ? NaN : Number(text));

  function compare(a, b, key) {
    const [x, y] = [a.dataset[key] ?? "", b.dataset[key] ?? ""];
    const [m, n] = [number(x), number(y)];
    if (!Number.isNaN(m) && !Number.isNaN(n)) return m - n;
    return x.localeCompare(y, undefined, { numeric: true });
  }

  function sorted(items, key, down) {
    const empty = (item) => (item.dataset[key] ?? "") === "";
    const full = items.filter((item) => !empty(item)).sort((a, b) => (down ? -1 : 1) * compare(a, b, key));
    return [...full, ...items.filter(empty)]; // what was not measured comes last, either way
  }

  function matches(item) {
    for (const [axis, value] of Object.entries(state.axes)) {
      const own = item.dataset[axis];
      if (value !== "" && own !== undefined && own !== value) return false;
    }
    return state.q === "" || item.textContent.toLowerCase().includes(state.q.toLowerCase());
  }

  function heading(list, text) {
    if (list.tagName !== "TBODY") {
      const title = document.createElement("h3");
      title.className = "group";
      title.textContent = text;
      return title;
    }
    const row = document.createElement("tr");
    row.className = "group";
    const cell = document.createElement("th");
    cell.colSpan = 99;
    cell.textContent = text;
    row.append(cell);
    return row;
  }

  function show() {
    for (const list of lists) {
      let items = original.get(list);
      const table = list.closest("table");
      const sorts = state.sort !== "" && items.some((item) => state.sort in item.dataset);
      if (sorts) items = sorted(items, state.sort, state.down);
      const groups = state.by !== "" && items.some((item) => state.by in item.dataset);
      if (groups) items = sorted(items, state.by, false);
      table?.classList.toggle("sorted", sorts || groups);
      const rows = [];
      let last;
      let shown = 0;
      for (const item of items) {
        item.hidden = !matches(item);
        if (!item.hidden) shown += 1;
        const group = groups ? item.dataset[state.by] || "not on record" : undefined;
        if (groups && !item.hidden && group !== last) rows.push(heading(list, (last = group)));
        rows.push(item);
      }
      list.replaceChildren(...rows);
      const count = document.getElementById(`${list.dataset.list}-count`);
      if (count) count.textContent = `${shown} of ${items.length} ${list.dataset.list}`;
      for (const head of all("th[data-key]", table ?? document.createElement("i"))) {
        if (sorts && head.dataset.key === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      }
    }
  }

  function remember() {
    const chosen = Object.entries({ q: state.q, by: state.by, sort: state.sort, down: state.down ? "1" : "", ...state.axes });
    const words = new URLSearchParams(chosen.filter(([, value]) => value !== "")).toString();
    history.replaceState(null, "", words ? `#${words}` : location.pathname + location.search);
  }

  function read() {
    state.q = form.elements.namedItem("q").value.trim();
    for (const select of all("select", form)) {
      if (select.name === "by") state.by = select.value;
      else state.axes[select.name] = select.value;
    }
  }

  if (form) {
    const given = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    for (const field of all("input, select", form)) if (given.has(field.name)) field.value = given.get(field.name);
    state.sort = given.get("sort") ?? "";
    state.down = given.has("down");
    read();
    form.hidden = false;
    form.addEventListener("input", () => { read(); show(); remember(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => { state.sort = ""; state.down = false; read(); show(); remember(); }));
  }
  for (const head of all("th[data-key]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const same = state.sort === head.dataset.key;
      if (same && state.down) { state.sort = ""; state.down = false; } else { state.down = same; state.sort = head.dataset.key; }
      show();
      if (form) remember();
    });
  }
  if (lists.length) show();

  // ---- Plots: as SVG, and as PNG with 3 pixels a unit, in the colours of the page.
  const rules = document.getElementById("plot-style").textContent;

  function standalone(plot) {
    const copy = plot.cloneNode(true);
    const [, , width, height] = plot.getAttribute("viewBox").split(" ").map(Number);
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    const colours = getComputedStyle(document.documentElement);
    const style = document.createElementNS("http://www.w3.org/2000/svg", "style");
    style.textContent = rules.replace(/var\((--[a-z-]+)\)/g, (_, name) => colours.getPropertyValue(name).trim());
    const paper = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ width: "100%", height: "100%", fill: colours.getPropertyValue("--paper").trim() })) paper.setAttribute(name, value);
    copy.prepend(style, paper);
    return { width, height, source: new XMLSerializer().serializeToString(copy) };
  }

  function download(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function savePng(plot, name) {
    const { width, height, source } = standalone(plot);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [3 * width, 3 * height];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => download(blob, `${name}.png`));
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source)}`;
  }

  for (const figure of all("figure[data-plot]")) {
    const plot = figure.querySelector("svg.plot");
    const name = figure.dataset.plot;
    const box = document.createElement("div");
    box.className = "save";
    const actions = {
      SVG: () => download(new Blob([standalone(plot).source], { type: "image/svg+xml" }), `${name}.svg`),
      PNG: () => savePng(plot, name),
    };
    for (const [kind, action] of Object.entries(actions)) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = kind;
      button.title = `Save this plot as ${kind}`;
      button.addEventListener("click", action);
      box.append(button);
    }
    figure.append(box);
  }

  // ---- Live: `report.py --serve` writes this page again when a run has changed.
  if (["127.0.0.1", "localhost"].includes(location.hostname)) {
    let written;
    setInterval(async () => {
      try {
        const answer = await fetch(location.href, { method: "HEAD", cache: "no-store" });
        if (!answer.ok) return; // the page is being written
        const now = answer.headers.get("Last-Modified");
        if (written !== undefined && now !== written) location.reload();
        written = now;
      } catch { /* the server is being restarted */ }
    }, 4000);
  }
})();
