// Densities from nodes and weights: sum_k w_k exp(-(t - y_k)^2 / (2 sigma^2)) / (sigma sqrt(2 pi)), as analysis/density.py.

// Gaussians are truncated at this many sigma, where they are 1e-14 of their peak.
const WINDOW = 8;

const PEAK = 1 / Math.sqrt(2 * Math.PI);

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer;
}

// The map from an eigenvalue x to the axis, x or asinh(x / scale), and its inverse.
function place(x, scale) {
  return scale === null ? x : Math.asinh(x / scale);
}

function unplace(y, scale) {
  return scale === null ? y : scale * Math.sinh(y);
}

// 3 % of the lower quartile of the blocks' root mean square eigenvalues, as axes.default_scale.
function defaultScale(blocks) {
  const sizes = blocks.map((b) => b.rms).filter((s) => s > 0).sort((a, b) => a - b);
  return sizes.length ? 0.03 * sizes[(sizes.length - 1) >> 2] : 1;
}

// Nodes of a block on an axis; on the signed-log axis, eigenvalues within their error are zero, as selection.quadrature_for.
function placed(block, scale) {
  const zero = scale === null ? -1 : block.zero_tolerance;
  return Float64Array.from(block.nodes, (x) => (Math.abs(x * block.radius) <= zero ? 0 : place(x * block.radius, scale)));
}

// Smallest and largest of several lists of nodes.
function extent(lists) {
  let low = Infinity;
  let high = -Infinity;
  for (const nodes of lists) {
    for (const y of nodes) {
      if (y < low) low = y;
      if (y > high) high = y;
    }
  }
  return low <= high ? [low, high] : [0, 0];
}

// 1 % of the range, or of the largest |node| if all nodes are equal, as density.default_sigma.
function defaultSigma([low, high]) {
  const size = Math.max(Math.abs(low), Math.abs(high));
  const tiny = Math.max(1e-290, 2 ** -40 * size);
  if (0.01 * (high - low) >= tiny) return 0.01 * (high - low);
  return 0.01 * size >= tiny ? 0.01 * size : 0.01;
}

// The density at one point.
function densityAt(nodes, weights, t, sigma) {
  let sum = 0;
  for (let k = 0; k < nodes.length; k++) {
    const d = (t - nodes[k]) / sigma;
    if (d * d < WINDOW * WINDOW) sum += weights[k] * Math.exp(-0.5 * d * d);
  }
  return (sum * PEAK) / sigma;
}

// Standard errors of a block's `values` of density() due to its random probes: the larger of the sample variance and the
// theoretical variance of Gaussian probes, block.unit_variance (mean f^2 - (mean f)^2), as error_bars.density_band.
function densityErrors(block, nodes, values, start, step, count, sigma) {
  const probes = block.probes.length;
  const sums = new Float64Array(count);
  let first = 0;
  for (const size of block.probes) {
    const [own, shares] = [nodes, block.weights].map((list) => list.subarray(first, first + size));
    density(own, shares, start, step, count, sigma).forEach((v, i) => (sums[i] += (probes * v - values[i]) ** 2));
    first += size;
  }
  const half = sigma / Math.SQRT2; // g^2 is a Gaussian of this width
  const squares = density(nodes, block.weights, start, step, count, half);
  const factor = (0.5 * PEAK) / half;
  const theory = (i) => block.unit_variance * (factor * squares[i] - values[i] ** 2);
  return sums.map((sum, i) => Math.sqrt(Math.max(sum / (probes - 1), theory(i)) / probes));
}

// The density at start, start + step, ...: each Gaussian by the recurrence g(t + h) = g(t) r(t), r(t + h) = r(t) q.
function density(nodes, weights, start, step, count, sigma) {
  const values = new Float64Array(count);
  const h = step / sigma;
  const q = Math.exp(-h * h);
  const reach = Math.ceil(WINDOW / h);
  for (let k = 0; k < nodes.length; k++) {
    const at = (nodes[k] - start) / step;
    const middle = Math.min(Math.max(Math.round(at), 0), count - 1);
    const d = (middle - at) * h;
    if (Math.abs(d) > WINDOW) continue;
    const peak = weights[k] * Math.exp(-0.5 * d * d);
    let g = peak;
    let r = Math.exp(-h * d - 0.5 * h * h);
    for (let i = middle, last = Math.min(count - 1, middle + reach); i <= last; i++) {
      values[i] += g;
      g *= r;
      r *= q;
    }
    g = peak;
    r = Math.exp(h * d - 0.5 * h * h);
    for (let i = middle - 1, first = Math.max(0, middle - reach); i >= first; i--) {
      g *= r;
      r *= q;
      values[i] += g;
    }
  }
  const scale = PEAK / sigma;
  for (let i = 0; i < count; i++) values[i] *= scale;
  return values;
}
