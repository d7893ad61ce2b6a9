// The table of blocks: sorted by any column, filtered by name, with a sparkline of each spectrum; a row chooses its block.

const SPARK = { width: 120, height: 26, points: 120 };

function withError(value, error) {
  return error === "0" ? [value] : [value, element("small", {}, ` ± ${error}`)];
}

// title, key to sort by, cell content; the largest value comes first in columns of numbers.
const COLUMNS = [
  ["block", "block", (b) => [b.block]],
  ["spectrum", null, () => []],
  ["shape", "dim", (b) => [b.shape.replaceAll("x", "×")]],
  ["λ min", "lambda_min", (b) => [b.texts.lambda_min]],
  ["λ max", "lambda_max", (b) => [b.texts.lambda_max]],
  ["trace", "trace", (b) => withError(b.texts.trace, b.texts.trace_error)],
  ["negative", "negative_lower", (b) => [b.texts.negative]],
  ["zero", "zero_lower", (b) => [b.texts.zero]],
  ["W1 probes", "w1_probes", (b) => [number(b.w1_probes, 2)]],
  ["W1 steps ≤", "w1_steps", (b) => [number(b.w1_steps, 2)]],
  ["steps", "steps", (b) => [String(b.steps)]],
  ["note", "note", (b) => [b.note]],
];

const TEXT_COLUMNS = ["block", "note"];

class Table {
  constructor(page) {
    this.page = page;
    this.sort = { key: null, sign: 1 };
    $("filter").addEventListener("input", () => this.filter());
    $("choose-none").addEventListener("click", () => page.choose([]));
    $("choose-all").addEventListener("click", () => page.choose(this.rows.filter((r) => !r.row.hidden).map((r) => r.index)));
    this.head();
    this.sparks = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        this.sparks.unobserve(target);
        this.spark(target);
      }
    });
  }

  head() {
    const chosen = element("th", { scope: "col" }, element("span", { class: "hidden" }, "shown"));
    const headings = COLUMNS.map(([title, key]) => {
      const attributes = { scope: "col", class: TEXT_COLUMNS.includes(title) || !key ? `text ${title}` : null };
      if (!key) return element("th", attributes, element("span", {}, title));
      const button = element("button", { type: "button", onclick: () => this.sortBy(key) }, title);
      return element("th", { ...attributes, "data-key": key }, button);
    });
    $("blocks").querySelector("thead tr").replaceChildren(chosen, ...headings);
  }

  // After a change of result.
  update() {
    this.rows = this.page.result().blocks.map((block, index) => {
      const box = element("input", { type: "checkbox", "aria-label": `Show the spectrum of ${block.block}` });
      box.addEventListener("change", () => this.page.toggle(index));
      const cells = COLUMNS.map(([title, , content]) => {
        if (title !== "spectrum") {
          const kind = title === "block" ? "text name" : title === "note" ? "text note" : null;
          return element("td", { class: kind, title: title === "block" ? block.block : null }, ...content(block));
        }
        const spark = element("canvas", { "aria-hidden": "true" });
        spark.block = block;
        this.sparks.observe(spark);
        return element("td", {}, spark);
      });
      cells[0].replaceChildren(element("bdi", {}, block.block));
      const row = element("tr", {}, element("td", {}, box), ...cells);
      row.addEventListener("click", (event) => event.target === box || this.page.toggle(index));
      return { index, block, row, box };
    });
    const isEmpty = this.page.result().blocks.every((b) => !b.note);
    for (const cell of $("blocks").querySelectorAll("th.note")) cell.hidden = isEmpty;
    for (const { row } of this.rows) row.querySelector("td.note").hidden = isEmpty;
    this.arrange();
    this.filter();
    this.mark();
  }

  sortBy(key) {
    const isText = typeof this.rows[0].block[key] === "string";
    const first = isText || key === "lambda_min" ? 1 : -1;
    if (this.sort.key !== key) this.sort = { key, sign: first };
    else if (this.sort.sign === first) this.sort.sign = -first;
    else this.sort = { key: null, sign: 1 };
    this.arrange();
  }

  arrange() {
    const { key, sign } = this.sort;
    const sorted = [...this.rows];
    if (key) {
      sorted.sort(({ block: a }, { block: b }) => {
        if (typeof a[key] === "string") return sign * a[key].localeCompare(b[key], "en", { numeric: true });
        if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null);
        return sign * (a[key] - b[key]);
      });
    }
    $("blocks").querySelector("tbody").replaceChildren(...sorted.map((r) => r.row));
    for (const th of $("blocks").querySelectorAll("th[data-key]")) {
      const isSorted = th.dataset.key === key;
      if (isSorted) th.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else th.removeAttribute("aria-sort");
      const button = th.firstChild;
      button.textContent = button.textContent.replace(/ [▲▼]$/, "") + (isSorted ? (sign > 0 ? " ▲" : " ▼") : "");
    }
  }

  filter() {
    const text = $("filter").value.toLowerCase();
    for (const { block, row } of this.rows) row.hidden = !block.block.toLowerCase().includes(text);
  }

  // After a change of the chosen blocks.
  mark() {
    const chosen = new Set(this.page.chosen);
    for (const { index, row, box } of this.rows) {
      box.checked = chosen.has(index);
      row.classList.toggle("chosen", box.checked);
    }
  }

  // Draw the log-density over the range of the block, with the sigma that its steps resolve.
  spark(canvas) {
    const { block } = canvas;
    const { ctx, width, height } = context(canvas);
    if (!block.nodes.length) return;
    const nodes = placed(block, null);
    const [low, high] = extent([nodes]);
    const sigma = block.sigma;
    const margin = high - low > 10 * sigma ? 4 * sigma : 30 * sigma;
    const step = (high - low + 2 * margin) / (SPARK.points - 1);
    const values = density(nodes, block.weights, low - margin, step, SPARK.points, Math.max(sigma, step));
    const share = Math.max(sigma, step) / PEAK;
    const floor = 0.1 / Math.max(10, block.dim);
    const x = (t) => ((t - low + margin) / (high - low + 2 * margin)) * width;
    const y = (v) => height - 1 - (Math.log(Math.max(v * share, floor) / floor) / Math.log(2 / floor)) * (height - 3);
    if (low - margin < 0 && high + margin > 0) {
      ctx.fillStyle = color("line");
      ctx.fillRect(Math.round(x(0)), 0, 1, height);
    }
    ctx.beginPath();
    values.forEach((v, i) => ctx.lineTo((i / (SPARK.points - 1)) * width, y(v)));
    ctx.strokeStyle = ctx.fillStyle = color("accent");
    ctx.lineWidth = 1.2;
    ctx.stroke();
    ctx.lineTo(width, height);
    ctx.lineTo(0, height);
    ctx.globalAlpha = 0.15;
    ctx.fill();
  }

  drawSparks() {
    for (const { row } of this.rows) this.spark(row.querySelector("canvas"));
  }

  redraw() {
    for (const { row } of this.rows) this.sparks.observe(row.querySelector("canvas"));
  }
}
