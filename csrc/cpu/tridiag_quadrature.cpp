// tridiag_quadrature on the CPU: groups of kLanes problems, one per SIMD lane, are distributed over threads.
//
// Every problem is scaled by a power of two so that its largest entry is in [0.5, 1), where no square overflows and one
// that underflows is negligible.
#include "ops/tridiag_quadrature.h"

#include <algorithm>
#include <atomic>
#include <tuple>
#include <utility>
#include <vector>

#include "tridiag_lanes.h"

namespace blockhess {
namespace {

// Finds the exponent that scales the largest entry to [0.5, 1), clamped so that the factor 2^exponent and its inverse
// are normal numbers. Returns false if an entry is not finite.
bool scaling_exponent(const double* alpha, const double* beta, int64_t n, int* exponent) {
  double largest = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double coupling = i + 1 < n ? beta[i] : 0.0;
    if (!(std::isfinite(alpha[i]) && std::isfinite(coupling))) return false;
    largest = std::max({largest, std::fabs(alpha[i]), std::fabs(coupling)});
  }
  *exponent = std::clamp(largest > 0.0 ? -std::ilogb(largest) - 1 : 0, -1022, 1022);
  return true;
}

}  // namespace

int64_t tridiag_quadrature_cpu(const TridiagQuadrature& op, const ParallelFor& parallel_for) {
  std::atomic<int64_t> lowest_failed{op.n_problems};
  const int64_t n_groups = (op.n_problems + kLanes - 1) / kLanes;
  parallel_for(n_groups, 1, [&](int64_t begin, int64_t end) {
    const int64_t rows = std::max<int64_t>(op.m, 1);  // a problem without steps becomes the 1 x 1 matrix 0
    std::vector<double> d(rows * kLanes), e(rows * kLanes), q(rows * kLanes);
    std::vector<std::pair<double, double>> rule(op.m);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kLanes, count = std::min(kLanes, op.n_problems - first);
      int64_t size[kLanes];
      double scale[kLanes];
      bool failed[kLanes] = {};
      std::fill(d.begin(), d.end(), 0.0);
      std::fill(e.begin(), e.end(), 0.0);
      std::fill(q.begin(), q.end(), 0.0);
      for (int64_t k = 0; k < kLanes; ++k) {
        const int64_t n = k < count ? op.steps[first + k] : 0;
        const double *alpha = op.alpha + (first + k) * op.m, *beta = op.beta + (first + k) * op.m;
        int exponent = 0;
        failed[k] = !scaling_exponent(alpha, beta, n, &exponent);
        size[k] = failed[k] ? 1 : std::max<int64_t>(n, 1);
        scale[k] = std::ldexp(1.0, -exponent);
        for (int64_t i = 0; i < n && !failed[k]; ++i) {
          d[i * kLanes + k] = std::ldexp(alpha[i], exponent);
          if (i + 1 < n) e[i * kLanes + k] = std::ldexp(beta[i], exponent);
        }
        q[k] = 1.0;
      }
      implicit_ql(d.data(), e.data(), q.data(), size, failed);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t b = first + k, n = op.steps[b];
        double *nodes = op.nodes + b * op.m, *weights = op.weights + b * op.m;
        if (failed[k]) {
          int64_t lowest = lowest_failed;
          while (b < lowest && !lowest_failed.compare_exchange_weak(lowest, b)) {
          }
        }
        for (int64_t i = 0; i < n; ++i) rule[i] = {d[i * kLanes + k] * scale[k], q[i * kLanes + k] * q[i * kLanes + k]};
        std::sort(rule.begin(), rule.begin() + n);
        for (int64_t i = 0; i < n; ++i) std::tie(nodes[i], weights[i]) = rule[i];
        std::fill(nodes + n, nodes + op.m, n > 0 ? nodes[n - 1] : 0.0);
        std::fill(weights + n, weights + op.m, 0.0);
      }
    }
  });
  return lowest_failed == op.n_problems ? -1 : lowest_failed.load();
}

}  // namespace blockhess
