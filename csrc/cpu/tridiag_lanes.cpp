// Each lane has its own window l ... m, cut out by negligible couplings, and its own shift; a sweep runs over the union
// of the windows, and a lane is left alone outside its own: a rotation is computed in every lane and taken over where
// it counts. Rows are compared as doubles and values chosen by bits, which every instruction set can do in all lanes.
#include "tridiag_lanes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "multiversion.h"
#include "ops/tridiag_quadrature.h"

namespace blockhess {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kTiny = 0x1p-480;  // nothing beside entries of size 1, yet its square does not underflow

// all ones where the condition holds
BLOCKHESS_INLINE int64_t mask(bool condition) { return -int64_t(condition); }

BLOCKHESS_INLINE double choose(int64_t mask, double yes, double no) {
  int64_t a, b;
  std::memcpy(&a, &yes, 8);
  std::memcpy(&b, &no, 8);
  a = (a & mask) | (b & ~mask);
  std::memcpy(&yes, &a, 8);
  return yes;
}

struct Window {
  int64_t l[kLanes] = {}, m[kLanes] = {};  // rows l ... m are coupled; m = l where a lane is done
  int64_t sweeps[kLanes] = {};             // made for the eigenvalue l
};

// Finds every lane's window: l moves on past a coupling that has become negligible, m is the next negligible one.
BLOCKHESS_INLINE void find_windows(Window& window, const double* __restrict d, const double* __restrict e,
                                   const int64_t* n, int64_t longest) {
  double low[kLanes], last[kLanes], first[kLanes], second[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) {
    low[k] = double(window.l[k]);
    last[k] = first[k] = second[k] = double(n[k] - 1);
  }
  const int64_t lowest = *std::min_element(window.l, window.l + kLanes);
  for (int64_t i = longest - 2; i >= lowest; --i) {
    const double *di = d + i * kLanes, *ei = e + i * kLanes, row = double(i);
    for (int64_t k = 0; k < kLanes; ++k) {
      const double size = std::fabs(di[k]) + std::fabs(di[k + kLanes]);
      const int64_t negligible = mask(std::fabs(ei[k]) <= kEps * size + kTiny);
      const int64_t found = negligible & mask(row >= low[k]) & mask(row < last[k]);
      second[k] = choose(found, first[k], second[k]);
      first[k] = choose(found, row, first[k]);
    }
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    const bool converged = first[k] == low[k] && first[k] < last[k];
    if (converged) window.sweeps[k] = 0;
    window.l[k] += converged;
    window.m[k] = int64_t(converged ? second[k] : first[k]);
  }
}

// One QL sweep with Wilkinson's shift in every window.
BLOCKHESS_INLINE void sweep(const Window& window, double* __restrict d, double* __restrict e, double* __restrict q) {
  double s[kLanes], c[kLanes], p[kLanes], g[kLanes];
  double low[kLanes], high[kLanes];  // l and m; high = low where the chain has split and the sweep is over
  double dl[kLanes], dl1[kLanes], el[kLanes], dm[kLanes];
  int64_t highest = 0, lowest = std::numeric_limits<int64_t>::max();
  for (int64_t k = 0; k < kLanes; ++k) {
    const int64_t l = window.l[k], m = window.m[k];
    const bool active = l < m;
    dl[k] = d[l * kLanes + k];
    dl1[k] = active ? d[(l + 1) * kLanes + k] : 0.0;
    el[k] = active ? e[l * kLanes + k] : 1.0;
    dm[k] = d[m * kLanes + k];
    low[k] = double(l);
    high[k] = double(m);
    if (active) highest = std::max(highest, m), lowest = std::min(lowest, l);
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    const double ratio = (dl1[k] - dl[k]) / (2.0 * el[k]);
    g[k] = dm[k] - dl[k] + el[k] / (ratio + std::copysign(std::sqrt(ratio * ratio + 1.0), ratio));
    s[k] = c[k] = 1.0;
    p[k] = 0.0;
  }
  for (int64_t i = highest - 1; i >= lowest; --i) {
    double *di = d + i * kLanes, *ei = e + i * kLanes, *qi = q + i * kLanes;
    const double row = double(i);
    for (int64_t k = 0; k < kLanes; ++k) {
      const int64_t inside = mask(row >= low[k]) & mask(row < high[k]);
      const double f = s[k] * ei[k], b = c[k] * ei[k];
      const double square = f * f + g[k] * g[k];
      const int64_t splits = inside & mask(square <= kTiny * kTiny), rotates = inside & ~splits;
      const double r = std::sqrt(square), inverse = 1.0 / r;
      const double sin = f * inverse, cos = g[k] * inverse;
      const double shifted = di[k + kLanes] - p[k];
      const double t = (di[k] - shifted) * sin + 2.0 * cos * b;
      const double q0 = qi[k], q1 = qi[k + kLanes];
      ei[k + kLanes] = choose(inside, choose(splits, 0.0, r), ei[k + kLanes]);
      di[k + kLanes] = choose(inside, choose(splits, shifted, shifted + sin * t), di[k + kLanes]);
      qi[k + kLanes] = choose(rotates, sin * q0 + cos * q1, q1);
      qi[k] = choose(rotates, cos * q0 - sin * q1, q0);
      s[k] = choose(rotates, sin, s[k]);
      c[k] = choose(rotates, cos, c[k]);
      p[k] = choose(rotates, sin * t, p[k]);
      g[k] = choose(rotates, cos * t - b, g[k]);
      high[k] = choose(splits, low[k], high[k]);
    }
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    const int64_t l = window.l[k], m = window.m[k];
    if (l == m) continue;
    if (high[k] > low[k]) {
      d[l * kLanes + k] -= p[k];
      e[l * kLanes + k] = g[k];
    }
    e[m * kLanes + k] = 0.0;
  }
}

}  // namespace

BLOCKHESS_MULTIVERSION void implicit_ql(double* d, double* e, double* q, const int64_t* n, bool* failed) {
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

}  // namespace blockhess
