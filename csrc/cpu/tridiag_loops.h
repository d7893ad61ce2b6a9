// The loops of tridiag_lanes.h, for one instruction set: see each_instruction_set.h.
//
// Each lane has its own window l ... m, cut out by negligible couplings, and its own shift; a sweep runs over the union
// of the windows, and a lane is left alone outside its own: a rotation is computed in every lane and taken over where
// it counts. Rows are compared as doubles.
#include "wide.h"

namespace blockhess {
namespace BLOCKHESS_SET {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kTiny = 0x1p-480;  // nothing beside entries of size 1, yet its square does not underflow

struct Window {
  int64_t l[kLanes] = {}, m[kLanes] = {};  // rows l ... m are coupled; m = l where a lane is done
  int64_t sweeps[kLanes] = {};             // made for the eigenvalue l
};

// A number of every lane, while rows pass.
struct Lanes {
  static constexpr int64_t kParts = kLanes / kWide;
  Wide part[kParts];

  BLOCKHESS_INLINE Lanes(const double* x) {
    for (int64_t v = 0; v < kParts; ++v) part[v] = load(x + v * kWide);
  }
  BLOCKHESS_INLINE void leave(double* x) const {
    for (int64_t v = 0; v < kParts; ++v) store(x + v * kWide, part[v]);
  }
};

// Finds every lane's window: l moves on past a coupling that has become negligible, m is the next negligible one.
inline void find_windows(Window& window, const double* __restrict d, const double* __restrict e, const int64_t* n,
                         int64_t longest) {
  double l[kLanes], end[kLanes], first[kLanes], second[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) {
    l[k] = double(window.l[k]);
    end[k] = double(n[k] - 1);
  }
  const Lanes low(l), last(end);
  Lanes one(end), two(end);
  const int64_t lowest = *std::min_element(window.l, window.l + kLanes);
  for (int64_t i = longest - 2; i >= lowest; --i) {
    const Wide row = Wide{} + double(i);
#pragma GCC unroll 16
    for (int64_t v = 0; v < Lanes::kParts; ++v) {
      const double *di = d + i * kLanes + v * kWide, *ei = e + i * kLanes + v * kWide;
      const Wide size = absolute(load(di)) + absolute(load(di + kLanes));
      const Mask negligible = absolute(load(ei)) <= kEps * size + kTiny;
      const Mask found = negligible & (row >= low.part[v]) & (row < last.part[v]);
      two.part[v] = choose(found, one.part[v], two.part[v]);
      one.part[v] = choose(found, row, one.part[v]);
    }
  }
  one.leave(first);
  two.leave(second);
  for (int64_t k = 0; k < kLanes; ++k) {
    const bool converged = first[k] == l[k] && first[k] < end[k];
    if (converged) window.sweeps[k] = 0;
    window.l[k] += converged;
    window.m[k] = int64_t(converged ? second[k] : first[k]);
  }
}

// One QL sweep with Wilkinson's shift in every window.
inline void sweep(const Window& window, double* __restrict d, double* __restrict e, double* __restrict q) {
  double ones[kLanes], zeros[kLanes] = {}, start[kLanes];
  double from[kLanes], to[kLanes];  // l and m; to = from where the chain has split and the sweep is over
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
    const Wide row = Wide{} + double(i);
#pragma GCC unroll 16
    for (int64_t v = 0; v < Lanes::kParts; ++v) {
      double *di = d + i * kLanes + v * kWide, *ei = e + i * kLanes + v * kWide, *qi = q + i * kLanes + v * kWide;
      const Wide coupling = load(ei), d0 = load(di), d1 = load(di + kLanes), q0 = load(qi), q1 = load(qi + kLanes);
      const Mask inside = (row >= low.part[v]) & (row < high.part[v]);
      const Wide f = s.part[v] * coupling, b = c.part[v] * coupling;
      const Wide square = f * f + g.part[v] * g.part[v];
      const Mask splits = inside & (square <= kTiny * kTiny), rotates = inside & ~splits;
      const Wide r = root(square), inverse = r * (1.0 / square);  // neither waits for the other
      const Wide sin = f * inverse, cos = g.part[v] * inverse;
      const Wide shifted = d1 - p.part[v];
      const Wide t = (d0 - shifted) * sin + 2.0 * cos * b;
      store(ei + kLanes, choose(inside, choose(splits, Wide{}, r), load(ei + kLanes)));
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
  p.leave(shift);
  g.leave(last);
  high.leave(to);
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
}  // namespace BLOCKHESS_SET
}  // namespace blockhess
