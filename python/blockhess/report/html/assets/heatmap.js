// The matrix of Jensen-Shannon distances between the blocks, in clustered order or the model's.

// Minimum row height, in pixels, for block names beside the rows.
const LABEL_HEIGHT = 11;
const LARGEST_SIDE = 560;
const LEGEND_HEIGHT = 34;

class Heatmap {
  constructor(page) {
    this.page = page;
    this.canvas = $("heatmap");
    this.cell = null; // [row, column] under the pointer, or moved to by keys
    this.drawSoon = throttled(() => this.draw());
    $("compared-on").addEventListener("change", () => this.update());
    $("order").addEventListener("change", () => this.update());
    $("stretch").addEventListener("change", () => this.update());
    this.listen();
  }

  // After a change of result, comparison or order.
  update() {
    const { comparisons, blocks } = this.page.result();
    $("comparison").hidden = !comparisons.length;
    if (!comparisons.length) return;
    const select = $("compared-on");
    const selected = select.value;
    select.replaceChildren(...comparisons.map((c) => element("option", { value: c.title }, c.title)));
    const comparison = comparisons.find((c) => c.title === selected) || comparisons[0];
    select.value = comparison.title;
    const n = comparison.blocks.length;
    const clustered = document.querySelector('input[name="order"]:checked').value === "clustered";
    this.order = clustered ? comparison.order : comparison.blocks.map((_, i) => i);
    this.rows = this.order.map((i) => comparison.blocks[i]); // index of the block in each row
    this.names = this.rows.map((i) => blocks[i].block);
    const upper = comparison.values;
    this.value = (row, column) => {
      const [i, j] = [this.order[row], this.order[column]].sort((a, b) => a - b);
      return i === j ? 0 : upper[i * n - (i * (i + 1)) / 2 + (j - i - 1)] / 65535;
    };
    this.top = $("stretch").checked ? upper.reduce((a, b) => Math.max(a, b), 1) / 65535 : 1; // upper end of the color scale
    this.pixels = this.paint(n);
    $("js0").textContent = comparison.text;
    this.cell = null;
    $("heatmap-readout").textContent = "";
    this.draw();
  }

  // Draw one pixel per cell; drawImage scales it.
  paint(n) {
    const pixels = element("canvas", { width: n, height: n });
    const ctx = pixels.getContext("2d");
    const image = ctx.createImageData(n, n);
    for (let row = 0; row < n; row++) {
      for (let column = 0; column < n; column++) {
        image.data.set([...viridis(this.value(row, column) / this.top), 255], 4 * (row * n + column));
      }
    }
    ctx.putImageData(image, 0, 0);
    return pixels;
  }

  draw() {
    if (!this.pixels) return;
    const n = this.rows.length;
    const { width } = this.canvas.parentElement.querySelector(".head").getBoundingClientRect();
    const room = Math.round(Math.min(0.4 * width, 210));
    const fits = Math.min(width - room, LARGEST_SIDE) / n >= LABEL_HEIGHT;
    const left = fits ? room : 0;
    const side = Math.floor(Math.min(width - left - 8, LARGEST_SIDE));
    this.canvas.style.height = `${side + LEGEND_HEIGHT}px`;
    const { ctx } = context(this.canvas);
    ctx.font = ctx.font.replace("12px", "11px");
    const size = side / n;
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(this.pixels, left, 0, side, side);
    ctx.textBaseline = "middle";
    if (fits) {
      ctx.textAlign = "right";
      this.names.forEach((name, row) => {
        const isChosen = this.page.chosen.includes(this.rows[row]);
        ctx.fillStyle = color(isChosen ? "accent" : "quiet");
        ctx.fillText(shortened(ctx, name, left - 8), left - 6, (row + 0.5) * size);
      });
    } else {
      ctx.fillStyle = color("accent");
      this.rows.forEach((block, row) => {
        if (this.page.chosen.includes(block)) ctx.fillRect(left + side + 2, row * size, 4, Math.max(2, size));
      });
    }
    if (this.cell) {
      const [row, column] = this.cell;
      ctx.strokeStyle = "#fff";
      ctx.lineWidth = 1;
      ctx.globalAlpha = 0.55;
      ctx.strokeRect(left, row * size, side, size);
      ctx.strokeRect(left + column * size, 0, size, side);
      ctx.globalAlpha = 1;
      ctx.lineWidth = 2;
      ctx.strokeRect(left + column * size, row * size, size, size);
    }
    this.drawScale(ctx, side + 14);
    this.frame = { left, size };
  }

  drawScale(ctx, top) {
    const barWidth = 120;
    for (let i = 0; i < barWidth; i++) {
      ctx.fillStyle = `rgb(${viridis(i / barWidth).join(" ")})`;
      ctx.fillRect(i, top, 1.5, 8);
    }
    ctx.fillStyle = color("quiet");
    ctx.textAlign = "left";
    const end = this.top === 1 ? "1 disjoint" : `${number(this.top, 2)}, the largest here`;
    ctx.fillText(`0 identical … ${end}`, barWidth + 8, top + 5);
  }

  listen() {
    const canvas = this.canvas;
    const find = (event) => {
      const { left, size } = this.frame;
      const spot = canvas.getBoundingClientRect();
      const cell = [event.clientY - spot.top, event.clientX - spot.left - left].map((at) => Math.floor(at / size));
      this.cell = cell.every((i) => i >= 0 && i < this.rows.length) ? cell : null;
    };
    canvas.addEventListener("pointermove", (event) => {
      find(event);
      if (this.cell) {
        const [value, ...names] = this.read();
        showTip(event, value, names.map((name, i) => [i ? color("c1") : color("c0"), name, ""]));
      } else showTip(null, null);
      this.drawSoon();
    });
    canvas.addEventListener("pointerleave", () => {
      this.cell = null;
      showTip(null, null);
      this.drawSoon();
    });
    canvas.addEventListener("click", (event) => {
      find(event); // a finger does not hover first
      this.choose();
    });
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (move) {
        const last = this.rows.length - 1;
        this.cell = (this.cell || [0, 0]).map((v, i) => Math.min(Math.max(v + move[i], 0), last));
        $("heatmap-readout").textContent = this.read().join(", ");
        this.draw();
      } else if (event.key === "Enter" || event.key === " ") this.choose();
      else return;
      event.preventDefault();
    });
  }

  read() {
    const [row, column] = this.cell;
    return [`distance ${number(this.value(row, column))}`, this.names[row], this.names[column]];
  }

  // Show the two spectra of the cell.
  choose() {
    if (!this.cell) return;
    const pair = [...new Set(this.cell.map((i) => this.rows[i]))];
    $("heatmap-readout").textContent = `Showing ${this.read().join(", ")}`;
    this.page.choose(pair);
    if ($("spectra").getBoundingClientRect().top < 0) $("spectra").scrollIntoView({ block: "start" });
  }
}

// Keep both ends of a name that is too wide.
function shortened(ctx, name, width) {
  if (ctx.measureText(name).width <= width) return name;
  let keep = name.length;
  const cut = () => `${name.slice(0, Math.floor(keep / 3))}…${name.slice(name.length - Math.ceil((2 * keep) / 3))}`;
  while (keep > 2 && ctx.measureText(cut()).width > width) keep--;
  return cut();
}
