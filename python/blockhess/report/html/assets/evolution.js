// One quantity over the checkpoints: JS0 in every comparison, or a statistic of each chosen block.

// title, key of the value (null: the middle of the interval), keys of the ends of the interval
const BLOCK_QUANTITIES = [
  ["largest eigenvalue", "lambda_max", "lambda_max", "lambda_max_upper"],
  ["smallest eigenvalue", "lambda_min", "lambda_min_lower", "lambda_min"],
  ["trace", "trace", "trace_lower", "trace_upper"],
  ["Frobenius norm", "frobenius", "frobenius_lower", "frobenius_upper"],
  ["share of negative eigenvalues", null, "negative_lower", "negative_upper"],
  ["share of zero eigenvalues", null, "zero_lower", "zero_upper"],
];

class Evolution {
  constructor(page) {
    this.page = page;
    this.canvas = $("history");
    this.cursor = null; // index of a checkpoint
    this.drawSoon = throttled(() => this.draw());
    $("evolution").hidden = page.results.length < 2;
    if ($("evolution").hidden) return;
    $("quantity").replaceChildren(
      element("option", { value: "js0" }, "JS0"),
      ...BLOCK_QUANTITIES.map(([title], i) => element("option", { value: i }, `${title}, by block`)),
    );
    $("quantity").addEventListener("change", () => this.draw());
    const steps = page.results.map((r) => r.step);
    const ascend = steps.every((s, i) => typeof s === "number" && (i === 0 || s > steps[i - 1]));
    this.positions = ascend ? steps : steps.map((_, i) => i);
    this.label = ascend ? "training step" : "checkpoint";
    this.listen();
  }

  // [{ name, stroke, dash, points: [[value, lower, upper] or null of each checkpoint] }]
  series() {
    const { results, chosen } = this.page;
    const quantity = $("quantity").value;
    if (quantity === "js0") {
      const titles = [...new Set(results.flatMap((r) => r.comparisons.map((c) => c.title)))];
      return titles.map((title, i) => ({
        name: title,
        stroke: color(`c${i}`),
        dash: [],
        points: results.map((r) => {
          const comparison = r.comparisons.find((c) => c.title === title);
          if (!comparison) return null;
          const [lower, upper] = comparison.interval || [comparison.value, comparison.value];
          return [comparison.value, lower, upper];
        }),
      }));
    }
    const [, key, lower, upper] = BLOCK_QUANTITIES[quantity];
    return chosen.map((index, i) => {
      const name = this.page.result().blocks[index].block;
      return {
        name,
        ...curveStyle(i, chosen.length),
        points: results.map((r) => {
          const block = r.byName.get(name);
          if (!block || block[key || lower] === null) return null;
          const value = key ? block[key] : (block[lower] + block[upper]) / 2;
          return [value, block[lower] ?? value, block[upper] ?? value];
        }),
      };
    });
  }

  draw() {
    if ($("evolution").hidden) return;
    const { ctx, width, height } = context(this.canvas);
    const box = { left: 56, right: width - 16, top: 24, bottom: height - 46 };
    const series = this.series();
    const known = series.flatMap((s) => s.points.filter((p) => p).map(([v]) => v));
    const [low, high] = extent([known.length ? known : [0]]);
    const isLog = low > 0 && high / low > 20;
    const [bottom, top] = isLog ? [low / 1.3, high * 1.3] : [Math.min(0, low * 1.08), Math.max(high, 0) * 1.08 || 1];
    const y = isLog
      ? (v) => box.bottom - (Math.log(Math.max(v, bottom) / bottom) / Math.log(top / bottom)) * (box.bottom - box.top)
      : (v) => box.bottom - ((v - bottom) / (top - bottom)) * (box.bottom - box.top);
    const first = this.positions[0];
    const span = this.positions[this.positions.length - 1] - first;
    const x = (i) => box.left + 14 + ((this.positions[i] - first) / span) * (box.right - box.left - 28);
    const title = $("quantity").selectedOptions[0].textContent.replace(", by block", "");
    drawAxes(
      ctx,
      box,
      {
        ticks: this.positions.map((_, i) => i),
        at: x,
        text: (i) => (this.label === "checkpoint" ? this.page.results[i].label : String(this.positions[i])),
        label: this.label,
      },
      { ticks: isLog ? powerTicks(bottom, top, 5) : roundTicks(bottom, top, 5), at: y, text: tickText, label: title },
    );
    for (const i of [this.page.current, this.cursor]) {
      if (i === null) continue;
      ctx.fillStyle = color("accent");
      ctx.globalAlpha = i === this.page.current ? 0.16 : 0.08;
      ctx.fillRect(x(i) - 8, box.top, 16, box.bottom - box.top);
      ctx.globalAlpha = 1;
    }
    for (const { stroke, dash, points } of series) {
      ctx.strokeStyle = ctx.fillStyle = stroke;
      ctx.lineWidth = 1.7;
      ctx.setLineDash(dash);
      ctx.beginPath();
      let down = false;
      points.forEach((point, i) => {
        if (point) ctx[down ? "lineTo" : "moveTo"](x(i), y(point[0]));
        down = Boolean(point);
      });
      ctx.stroke();
      ctx.setLineDash([]);
      points.forEach((point, i) => {
        if (!point) return;
        const [value, lower, upper] = point;
        ctx.beginPath();
        ctx.arc(x(i), y(value), 3, 0, 2 * Math.PI);
        ctx.fill();
        ctx.lineWidth = 1;
        ctx.beginPath();
        ctx.moveTo(x(i), Math.min(y(lower), box.bottom));
        ctx.lineTo(x(i), Math.max(y(upper), box.top));
        ctx.stroke();
      });
    }
    this.drawLegend(series);
    if (!series.length) {
      ctx.fillStyle = color("quiet");
      ctx.textAlign = "center";
      ctx.fillText("No block is chosen.", (box.left + box.right) / 2, (box.top + box.bottom) / 2);
    }
    this.frame = { x };
  }

  drawLegend(series) {
    const shown = series.length <= MOST_COLORS ? series : [];
    $("history-legend").replaceChildren(
      ...shown.map(({ name, stroke }) => {
        const swatch = element("span", { class: "swatch" });
        swatch.style.background = stroke;
        return element("span", { class: "key" }, swatch, bdi(name));
      }),
    );
  }

  read() {
    const rows = this.series().map(({ name, stroke, points }) => [stroke, name, number(points[this.cursor]?.[0])]);
    return [this.page.results[this.cursor].label, rows.slice(0, 12)];
  }

  listen() {
    const canvas = this.canvas;
    const find = (event) => {
      const px = event.clientX - canvas.getBoundingClientRect().left;
      const far = this.positions.map((_, i) => Math.abs(this.frame.x(i) - px));
      return far.indexOf(Math.min(...far));
    };
    canvas.addEventListener("pointermove", (event) => {
      this.cursor = find(event);
      showTip(event, ...this.read());
      this.drawSoon();
    });
    canvas.addEventListener("pointerleave", () => {
      this.cursor = null;
      showTip(null, null);
      this.drawSoon();
    });
    canvas.addEventListener("click", (event) => this.page.show(find(event)));
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (move) {
        const from = this.cursor === null ? this.page.current : this.cursor;
        this.cursor = Math.min(Math.max(from + move, 0), this.positions.length - 1);
        const [label, rows] = this.read();
        $("history-readout").textContent = [label, ...rows.map(([, name, value]) => `${name} ${value}`)].join("; ");
        this.draw();
      } else if (event.key === "Enter" && this.cursor !== null) this.page.show(this.cursor);
      else return;
      event.preventDefault();
    });
  }
}
