// The loops of tridiag_lanes.h, compiled per instruction set (see simd_dispatch.h).
//
// Each lane has its own shift and its own window: rows l ... m, an unreduced submatrix between negligible couplings. A
// sweep runs over the union of the windows. Rotations are computed in every lane and applied, by a mask, where the row
// is inside the lane's window. Row indices are held as doubles, which the masks compare.
#include "simd.h"

namespace blockhess {
namespace BLOCKHESS_NAMESPACE {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kTiny = 0x1p-480;  // negligible relative to 1, and its square does not underflow

struct Window {
  int64_t l[kLanes] = {}, m[kLanes] = {};  // l = m if the lane has nothing to do in this sweep
  int64_t sweeps[kLanes] = {};             // for eigenvalue l so far
};

// One float64 value per lane.
struct Lanes {
  static constexpr int64_t kParts = kLanes / kWidth;
  Simd part[kParts];

  BLOCKHESS_INLINE Lanes(const double* x) {
    for (int64_t v = 0; v < kParts; ++v) part[v] = load(x + v * kWidth);
  }
  BLOCKHESS_INLINE void store_to(double* x) const {
    for (int64_t v = 0; v < kParts; ++v) store(x + v * kWidth, part[v]);
  }
};

// Updates every lane's window: l advances by one row if its coupling has become negligible, and m becomes the row of
// the first negligible coupling from l on, or the last row.
inline void find_windows(Window& window, const double* __restrict d, const double* __restrict e, const int64_t* n,
                         int64_t longest) {
  double l[kLanes], end[kLanes], first[kLanes], second[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) {
    l[k] = double(window.l[k]);
    end[k] = double(n[k] - 1);
  }
  const Lanes low(l), last(end);
  Lanes one(end), two(end);  // rows of the first and second negligible coupling from l on
  const int64_t lowest = *std::min_element(window.l, window.l + kLanes);
  for (int64_t i = longest - 2; i >= lowest; --i) {
    const Simd row = Simd{} + double(i);
#pragma GCC unroll 16
    for (int64_t v = 0; v < Lanes::kParts; ++v) {
      const double *di = d + i * kLanes + v * kWidth, *ei = e + i * kLanes + v * kWidth;
      const Simd size = absolute(load(di)) + absolute(load(di + kLanes));
      const Mask negligible = absolute(load(ei)) <= kEps * size + kTiny;
      const Mask found = negligible & (row >= low.part[v]) & (row < last.part[v]);
      two.part[v] = choose(found, one.part[v], two.part[v]);
      one.part[v] = choose(found, row, one.part[v]);
    }
  }
  one.store_to(first);
  two.store_to(second);
  for (int64_t k = 0; k < kLanes; ++k) {
    const bool converged = first[k] == l[k] && first[k] < end[k];
    if (converged) window.sweeps[k] = 0;
    window.l[k] += converged;
    window.m[k] = int64_t(converged ? second[k] : first[k]);
  }
}

// Makes one implicit QL sweep with Wilkinson's shift in every window.
inline void sweep(const Window& window, double* __restrict d, double* __restrict e, double* __restrict q) {
  double ones[kLanes], zeros[kLanes] = {}, start[kLanes];
  double from[kLanes], to[kLanes];  // l and m; to = from ends the sweep of a lane whose matrix has split
  int64_t highest = 0, lowest = std::numeric_limits<int64_t>::max();
  for (int64_t k = 0; k < kLanes; ++k) {
    const int64_t l = window.l[k], m = window.m[k];
    ones[k] = 1.0;
    start[k] = 0.0;
    from[k] = double(l);
    to[k] = double(m);
    if (l == m) continue;
    const double dl = d[l * kLanes + k], el = e[l * kLanes + k], ratio = (d[(l + 1) * kLanes + k] - dl) / (2.0 * el);
    start[k] = d[m * kLanes + k] - dl + el / (ratio + std::copysign(std::sqrt(ratio * ratio + 1.0), ratio));
    highest = std::max(highest, m), lowest = std::min(lowest, l);
  }
  const Lanes low(from);
  Lanes high(to), s(ones), c(ones), p(zeros), g(start);
  for (int64_t i = highest - 1; i >= lowest; --i) {
    const Simd row = Simd{} + double(i);
#pragma GCC unroll 16
    for (int64_t v = 0; v < Lanes::kParts; ++v) {
      double *di = d + i * kLanes + v * kWidth, *ei = e + i * kLanes + v * kWidth, *qi = q + i * kLanes + v * kWidth;
      const Simd coupling = load(ei), d0 = load(di), d1 = load(di + kLanes), q0 = load(qi), q1 = load(qi + kLanes);
      const Mask inside = (row >= low.part[v]) & (row < high.part[v]);
      const Simd f = s.part[v] * coupling, b = c.part[v] * coupling;
      const Simd square = f * f + g.part[v] * g.part[v];
      const Mask splits = inside & (square <= kTiny * kTiny), rotates = inside & ~splits;
      const Simd r = root(square), inverse = r * (1.0 / square);  // inverse = 1 / r; root and division overlap
      const Simd sin = f * inverse, cos = g.part[v] * inverse;
      const Simd shifted = d1 - p.part[v];
      const Simd t = (d0 - shifted) * sin + 2.0 * cos * b;
      store(ei + kLanes, choose(inside, choose(splits, Simd{}, r), load(ei + kLanes)));
      store(di + kLanes, choose(inside, choose(splits, shifted, shifted + sin * t), d1));
      store(qi + kLanes, choose(rotates, sin * q0 + cos * q1, q1));
      store(qi, choose(rotates, cos * q0 - sin * q1, q0));
      s.part[v] = choose(rotates, sin, s.part[v]);
      c.part[v] = choose(rotates, cos, c.part[v]);
      p.part[v] = choose(rotates, sin * t, p.part[v]);
      g.part[v] = choose(rotates, cos * t - b, g.part[v]);
      high.part[v] = choose(splits, low.part[v], high.part[v]);
    }
  }
  double shift[kLanes], last[kLanes];
  p.store_to(shift);
  g.store_to(last);
  high.store_to(to);
  for (int64_t k = 0; k < kLanes; ++k) {
    const int64_t l = window.l[k], m = window.m[k];
    if (l == m) continue;
    if (to[k] > from[k]) {
      d[l * kLanes + k] -= shift[k];
      e[l * kLanes + k] = last[k];
    }
    e[m * kLanes + k] = 0.0;
  }
}

inline void implicit_ql(double* d, double* e, double* q, const int64_t* n, bool* failed) {
  const int64_t longest = *std::max_element(n, n + kLanes);
  Window window;
  for (;;) {
    find_windows(window, d, e, n, longest);
    bool done = true;
    for (int64_t k = 0; k < kLanes; ++k) {
      if (window.l[k] == n[k] - 1) continue;
      done = false;
      if (++window.sweeps[k] > kMaxSweeps) {
        failed[k] = true;
        window.l[k] = window.m[k] = n[k] - 1;
      }
    }
    if (done) return;
    sweep(window, d, e, q);
  }
}

}  // namespace
}  // namespace BLOCKHESS_NAMESPACE
}  // namespace blockhess
