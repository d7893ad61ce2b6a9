// The spectra of the chosen blocks on one axis, smoothed in the page.

// Slider values are hundredths of a decade relative to the default. Many curves are sampled on a coarser grid than a few.
const POINTS_PER_SIGMA = 6;
const POINTS_PER_SIGMA_OF_MANY = 2;
const MANY = 24;
const MOST_POINTS = 6000;
const FEWEST_POINTS = 200;
const TIP_ROWS = 8;

class SpectraPlot {
  // page: shared state with result(), chosen (indices in order of choice) and choose(indices).
  constructor(page) {
    this.page = page;
    this.canvas = $("density");
    this.zoom = null; // [low, high] on the axis
    this.cursor = null; // position on the axis
    this.drag = null;
    this.drawSoon = throttled(() => this.draw());
    for (const name of ["axis", "height", "bands"]) {
      $(name).addEventListener("change", () => {
        if (name === "axis") this.zoom = this.cursor = null;
        this.update();
      });
    }
    for (const id of ["sigma", "scale"]) {
      $(id).addEventListener("input", () => {
        if (id === "scale") this.zoom = this.cursor = null;
        this.updateSoon();
      });
    }
    this.updateSoon = throttled(() => this.update());
    $("reset").addEventListener("click", () => this.reset());
    this.listen();
    if (page.condensed) $("sigma").min = String(Math.ceil(100 * Math.log10(400 / page.condensed)));
  }

  reset() {
    $("sigma").value = $("scale").value = "0";
    this.zoom = this.cursor = null;
    this.update();
  }

  get isAsinh() {
    return document.querySelector('input[name="axis"]:checked').value === "asinh";
  }

  get isLog() {
    return document.querySelector('input[name="height"]:checked').value === "log";
  }

  // After a change of the blocks, the axis or a slider: compute nodes on the axis and sigma, set the texts.
  update() {
    const result = this.page.result();
    const blocks = this.page.chosen.map((i) => result.blocks[i]).filter((b) => b && b.nodes.length);
    this.scale = this.isAsinh ? defaultScale(blocks) * 10 ** (Number($("scale").value) / 100) : null;
    this.curves = blocks.map((block, i) => ({
      block,
      nodes: placed(block, this.scale),
      ...curveStyle(i, blocks.length),
    }));
    this.range = extent(this.curves.map((c) => c.nodes));
    const factor = 10 ** (Number($("sigma").value) / 100);
    this.sigma = defaultSigma(this.range) * factor;
    $("scale-row").hidden = !this.isAsinh;
    $("bands-row").hidden = !(blocks.length <= MOST_COLORS && blocks.some((b) => b.probes.length > 1));
    $("sigma-readout").textContent = `${number(this.sigma)}, ${number(factor, 2)} % of the range`;
    $("scale").setAttribute("aria-valuetext", number(this.scale));
    $("sigma").setAttribute("aria-valuetext", $("sigma-readout").textContent);
    $("scale-readout").textContent = this.isAsinh ? `|eigenvalue| ${number(this.scale)}` : "";
    this.drawLegend();
    this.draw();
  }

  drawLegend() {
    const legend = $("legend");
    if (!this.curves.length) {
      legend.replaceChildren(element("span", { class: "quiet" }, "Choose blocks in the table or the heat map below."));
      return;
    }
    const key = this.curves.map((c) => c.stroke + c.block.block).join("\n");
    if (key === this.legendKey) return;
    this.legendKey = key;
    legend.replaceChildren(
      ...this.curves.map(({ block, stroke }) => {
        const swatch = element("span", { class: "swatch" });
        swatch.style.background = stroke;
        const remove = () => this.page.toggle(this.page.result().blocks.indexOf(block));
        return element("button", { type: "button", onclick: remove }, swatch, bdi(block.block), "×");
      }),
    );
  }

  // The part of the axis in view.
  view() {
    if (this.zoom) return this.zoom;
    const [low, high] = this.range;
    const margin = high - low > 10 * this.sigma ? 6 * this.sigma : 50 * this.sigma;
    return [low - margin, high + margin];
  }

  draw() {
    const { ctx, width, height } = context(this.canvas);
    if (!this.curves) return;
    const box = { left: 52, right: width - 12, top: 24, bottom: height - 48 };
    const [low, high] = this.view();
    const x = (t) => box.left + ((t - low) / (high - low)) * (box.right - box.left);
    const isMany = this.curves.length > MANY;
    const step = Math.min(
      Math.max(this.sigma / (isMany ? POINTS_PER_SIGMA_OF_MANY : POINTS_PER_SIGMA), (high - low) / MOST_POINTS),
      (high - low) / FEWEST_POINTS,
    );
    const count = Math.ceil((high - low) / step) + 1;
    const share = this.sigma / PEAK;
    let top = 0;
    for (const curve of this.curves) {
      const { block, nodes } = curve;
      curve.values = density(nodes, block.weights, low, step, count, this.sigma);
      curve.errors = this.hasBand(curve) ? densityErrors(block, nodes, curve.values, low, step, count, this.sigma) : null;
      for (let i = 0; i < count; i++) top = Math.max(top, (curve.values[i] *= share));
      if (curve.errors) for (let i = 0; i < count; i++) curve.errors[i] *= share;
    }
    const floor = 0.1 / Math.max(10, ...this.curves.map((c) => c.block.dim));
    const yTop = this.isLog ? 2 : Math.max(top * 1.08, 1e-12);
    // Draw values below the floor just below the frame.
    const y = this.isLog
      ? (v) => (v > floor ? box.bottom - (Math.log(v / floor) / Math.log(yTop / floor)) * (box.bottom - box.top) : box.bottom + 3)
      : (v) => box.bottom - (v / yTop) * (box.bottom - box.top);
    const columns = Math.max(2, Math.floor((box.right - box.left) / 70));
    drawAxes(
      ctx,
      box,
      {
        ticks: this.scale === null ? roundTicks(low, high, columns) : signedTicks(low, high, this.scale, columns),
        at: (v) => x(place(v, this.scale)),
        origin: 0,
        text: tickText,
        label: this.scale === null ? "eigenvalue" : "eigenvalue, signed-log axis",
      },
      {
        ticks: this.isLog ? powerTicks(floor, yTop, 6) : roundTicks(0, yTop, 5),
        at: y,
        text: tickText,
        label: "share of eigenvalues",
      },
    );
    ctx.save();
    ctx.beginPath();
    ctx.rect(box.left, box.top - 4, box.right - box.left, box.bottom - box.top + 4);
    ctx.clip();
    ctx.lineJoin = "round";
    for (const curve of this.curves) {
      this.trace(ctx, curve.values, (i) => x(low + i * step), y);
      ctx.strokeStyle = curve.stroke;
      ctx.setLineDash(curve.dash);
      ctx.lineWidth = isMany ? 1 : 1.7;
      ctx.globalAlpha = isMany ? 0.6 : 1;
      ctx.stroke();
      if (curve.errors) this.shade(ctx, curve, (i) => x(low + i * step), y);
      else if (this.curves.length <= MOST_COLORS) {
        ctx.lineTo(box.right + 2, box.bottom);
        ctx.lineTo(box.left - 2, box.bottom);
        ctx.globalAlpha = 0.07;
        ctx.fillStyle = curve.stroke;
        ctx.fill();
      }
    }
    ctx.setLineDash([]);
    ctx.globalAlpha = 1;
    ctx.fillStyle = ctx.strokeStyle = color("ink");
    if (this.cursor !== null) {
      ctx.globalAlpha = 0.5;
      ctx.beginPath();
      ctx.moveTo(x(this.cursor), box.top);
      ctx.lineTo(x(this.cursor), box.bottom);
      ctx.stroke();
    }
    if (this.drag && this.drag.to !== null) {
      ctx.globalAlpha = 0.12;
      ctx.fillRect(x(this.drag.from), box.top, x(this.drag.to) - x(this.drag.from), box.bottom - box.top);
    }
    ctx.restore();
    this.frame = { box, low, high, y };
  }

  // Whether to draw standard errors around a curve: if there are few curves and the block has two probes or more.
  hasBand({ block }) {
    return $("bands").checked && this.curves.length <= MOST_COLORS && block.probes.length > 1;
  }

  // The band of one standard error.
  shade(ctx, { values, errors, stroke }, x, y) {
    ctx.beginPath();
    values.forEach((v, i) => ctx.lineTo(x(i), y(v + errors[i])));
    for (let i = values.length - 1; i >= 0; i--) ctx.lineTo(x(i), y(Math.max(values[i] - errors[i], 0)));
    ctx.globalAlpha = 0.2;
    ctx.fillStyle = stroke;
    ctx.fill();
  }

  // Add a path through the values; of several values in one pixel column, through their minimum and maximum.
  trace(ctx, values, x, y) {
    ctx.beginPath();
    let column = null;
    let least = 0;
    let most = 0;
    for (let i = 0; i < values.length; i++) {
      const here = Math.round(2 * x(i)) / 2;
      if (here === column) {
        least = Math.min(least, values[i]);
        most = Math.max(most, values[i]);
        continue;
      }
      if (column !== null && most > least) {
        ctx.lineTo(column, y(least));
        ctx.lineTo(column, y(most));
      }
      ctx.lineTo(x(i), y(values[i]));
      column = here;
      least = most = values[i];
    }
  }

  listen() {
    const canvas = this.canvas;
    const at = (event) => {
      const { box, low, high } = this.frame;
      const share = (event.clientX - canvas.getBoundingClientRect().left - box.left) / (box.right - box.left);
      return low + Math.min(Math.max(share, 0), 1) * (high - low);
    };
    const hover = (event) => {
      if (!this.curves.length) return;
      this.cursor = at(event);
      if (this.drag) this.drag.to = this.cursor;
      const { heading, rows } = this.read(event.clientY - canvas.getBoundingClientRect().top);
      if (event.pointerType === "touch") this.announce(heading, rows); // a finger would cover the tooltip
      else showTip(event, heading, rows);
      this.drawSoon();
    };
    canvas.addEventListener("pointermove", hover);
    canvas.addEventListener("pointerleave", () => {
      this.cursor = this.drag = null;
      showTip(null, null);
      this.drawSoon();
    });
    canvas.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch") hover(event);
      else if (event.button === 0) this.drag = { from: at(event), to: null };
    });
    canvas.addEventListener("pointerup", () => {
      const { from, to } = this.drag || { to: null };
      this.drag = null;
      if (to === null) return;
      const { low, high, box } = this.frame;
      if (Math.abs(to - from) > (8 * (high - low)) / (box.right - box.left)) this.zoom = [Math.min(from, to), Math.max(from, to)];
      this.drawSoon();
    });
    canvas.addEventListener("dblclick", () => this.zoomBy(null));
    canvas.addEventListener("keydown", (event) => {
      const [low, high] = this.view();
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!this.curves.length || event.ctrlKey || event.metaKey || event.altKey) return;
      if (move) {
        const from = this.cursor === null ? (low + high) / 2 : this.cursor;
        this.cursor = Math.min(Math.max(from + (move * (high - low)) / (event.shiftKey ? 20 : 100), low), high);
        const { heading, rows } = this.read(null);
        this.announce(heading, rows);
        this.draw();
      } else if (event.key === "+" || event.key === "=") this.zoomBy(0.5);
      else if (event.key === "-") this.zoomBy(2);
      else if (event.key === "0" || event.key === "Escape") this.zoomBy(null);
      else return;
      event.preventDefault();
    });
  }

  announce(heading, rows) {
    $("density-readout").textContent = [heading, ...rows.map(([, name, value]) => `${name} ${value}`)].join("; ");
  }

  // Narrow or widen the view around the cursor; null shows all.
  zoomBy(factor) {
    const [low, high] = this.view();
    const middle = this.cursor === null ? (low + high) / 2 : this.cursor;
    this.zoom = factor === null ? null : [middle - (middle - low) * factor, middle + (high - middle) * factor];
    this.draw();
  }

  // The values of the curves at the cursor, those nearest to the pointer first.
  read(py) {
    const { y } = this.frame;
    const share = this.sigma / PEAK;
    const rows = this.curves.map((curve) => {
      const { block, nodes, stroke } = curve;
      const height = densityAt(nodes, block.weights, this.cursor, this.sigma);
      const value = share * height;
      let reading = number(value);
      if (this.hasBand(curve)) {
        const [error] = densityErrors(block, nodes, [height], this.cursor, this.sigma, 1, this.sigma);
        reading += ` ± ${number(share * error, 2)}`;
      }
      return { value, far: py === null ? -value : Math.abs(y(value) - py), row: [stroke, block.block, reading] };
    });
    rows.sort((a, b) => a.far - b.far);
    const more = rows.length > TIP_ROWS ? `, nearest ${TIP_ROWS} of ${rows.length}` : "";
    return {
      heading: `eigenvalue ${number(unplace(this.cursor, this.scale))}${more}`,
      rows: rows.slice(0, TIP_ROWS).map((r) => r.row),
    };
  }
}
