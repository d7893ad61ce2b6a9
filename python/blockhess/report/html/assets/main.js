// The page: unpacks the data, holds the chosen blocks and result, and updates every part when these change.

const FIRST_CHOICE = 6;

class Page {
  constructor(data) {
    this.condensed = data.condensed;
    this.results = data.results.map(unpack);
    this.current = this.results.length - 1;
    this.chosen = representative(this.result());
    this.names = this.chosen.map((i) => this.result().blocks[i].block);
    $("version").textContent = data.blockhess;
    const select = $("checkpoint");
    select.replaceChildren(...this.results.map((r, i) => element("option", { value: i }, r.label)));
    select.addEventListener("change", () => this.show(Number(select.value)));
    $("checkpoint-control").hidden = this.results.length < 2;
    if (this.condensed) {
      $("condensed").hidden = false;
      $("condensed").textContent = `To keep this page small, each spectrum is drawn from about ${this.condensed} points, merged so that mass and trace are unchanged; the result files hold all nodes.`;
    }
    this.spectra = new SpectraPlot(this);
    this.heatmap = new Heatmap(this);
    this.evolution = new Evolution(this);
    this.table = new Table(this);
    const redraw = throttled(() => this.redraw());
    window.addEventListener("resize", redraw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.spectra.update();
      this.redraw();
    });
    window.addEventListener("beforeprint", () => this.table.drawSparks());
    this.show(this.current);
  }

  result() {
    return this.results[this.current];
  }

  // Show another checkpoint, with those of the chosen blocks that it has.
  show(index) {
    this.current = index;
    $("checkpoint").value = String(index);
    const result = this.result();
    const index_of = new Map(result.blocks.map((b, i) => [b.block, i]));
    this.chosen = this.names.filter((name) => index_of.has(name)).map((name) => index_of.get(name));
    this.describe(result);
    this.table.update();
    this.spectra.update();
    this.heatmap.update();
    this.evolution.draw();
  }

  choose(indices) {
    this.chosen = indices;
    this.names = indices.map((i) => this.result().blocks[i].block);
    this.table.mark();
    this.spectra.zoom = this.spectra.cursor = null;
    this.spectra.update();
    this.heatmap.draw();
    this.evolution.draw();
  }

  toggle(index) {
    this.choose(this.chosen.includes(index) ? this.chosen.filter((i) => i !== index) : [...this.chosen, index]);
  }

  redraw() {
    this.spectra.draw();
    this.heatmap.draw();
    this.evolution.draw();
    this.table.redraw();
  }

  describe(result) {
    document.title = `${result.model}: block spectra`;
    $("unfinished").hidden = !result.unfinished;
    $("unfinished").textContent = result.unfinished || "";
    $("model").textContent = result.model;
    $("subtitle").textContent = result.summary;
    const known = result.blocks.filter((b) => b.lambda_max !== null);
    const spread = result.curvature_spread;
    const about = spread && `factor ${number(spread.ratio, 2)} between the largest |eigenvalues| of ${spread.weights ? "weight blocks" : "blocks"}`;
    const tiles = spread ? [["curvature spread", `${number(spread.value)} decades`, about]] : [];
    for (const { title, value, interval } of result.comparisons.slice(0, 1)) {
      const ends = interval ? `, ${interval[0].toFixed(2)} ... ${interval[1].toFixed(2)}` : "";
      tiles.push([`JS0, ${title}`, number(value), `mean Jensen-Shannon distance of all pairs${ends}`]);
    }
    const sharpest = known.reduce((a, b) => (b.lambda_max > a.lambda_max ? b : a), known[0]);
    const lowest = known.reduce((a, b) => (b.lambda_min < a.lambda_min ? b : a), known[0]);
    if (sharpest) {
      tiles.push(["largest eigenvalue", sharpest.texts.lambda_max, sharpest.block]);
      tiles.push(["smallest eigenvalue", lowest.texts.lambda_min, lowest.block]);
    }
    const size = result.blocks.reduce((sum, b) => sum + b.dim, 0);
    tiles.push(["blocks", String(result.blocks.length), `${size.toLocaleString("en")} parameters`]);
    $("tiles").replaceChildren(
      ...tiles.map(([name, value, about]) =>
        element(
          "li",
          {},
          element("div", { class: "name" }, name),
          element("div", { class: "value" }, value),
          element("div", { class: "about" }, bdi(about)),
        ),
      ),
    );
    $("highlights").replaceChildren(...result.highlights.map((text) => element("li", {}, text)));
    $("provenance").replaceChildren(
      ...result.provenance.map(([key, value]) =>
        element("div", {}, element("dt", {}, key.replaceAll("_", " ")), element("dd", {}, value)),
      ),
    );
  }
}

function unpack(result) {
  const nodes = new Float32Array(bytes(result.nodes));
  const weights = new Float32Array(bytes(result.weights));
  let start = 0;
  for (const block of result.blocks) {
    const stop = start + block.probes.reduce((sum, count) => sum + count, 0);
    block.nodes = nodes.subarray(start, stop);
    block.weights = weights.subarray(start, stop);
    start = stop;
  }
  for (const comparison of result.comparisons) comparison.values = new Uint16Array(bytes(comparison.matrix));
  result.byName = new Map(result.blocks.map((b) => [b.block, b]));
  return result;
}

// A few blocks spread over the clusters, or over the model if there is no comparison.
function representative({ comparisons, blocks }) {
  const order = comparisons.length ? comparisons[0].order.map((i) => comparisons[0].blocks[i]) : blocks.map((_, i) => i);
  const count = Math.min(FIRST_CHOICE, order.length);
  return Array.from({ length: count }, (_, i) => order[Math.floor(((i + 0.5) * order.length) / count)]);
}

window.blockhess = new Page(JSON.parse($("data").textContent));
