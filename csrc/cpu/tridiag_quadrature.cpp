// tridiag_quadrature on the CPU: one problem after the other, problems spread over threads.
#include "ops/tridiag_quadrature.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <vector>

namespace blockhess {
namespace {

// Diagonalises tridiag(e, d, e) of size n; q, the first row of the identity, becomes the first row of the eigenvectors.
// e[i] couples i and i + 1; e[n - 1] is scratch. False where a node does not converge.
bool implicit_ql(double* d, double* e, double* q, int64_t n) {
  constexpr double eps = std::numeric_limits<double>::epsilon();
  e[n - 1] = 0.0;
  for (int64_t l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      int64_t m = l;  // the first coupling after l that is negligible beside its neighbours
      while (m < n - 1 && std::fabs(e[m]) > eps * (std::fabs(d[m]) + std::fabs(d[m + 1]))) ++m;
      if (m == l) break;
      if (sweep == kMaxSweeps) return false;
      double g = (d[l + 1] - d[l]) / (2.0 * e[l]);
      g = d[m] - d[l] + e[l] / (g + std::copysign(std::hypot(g, 1.0), g));
      double s = 1.0, c = 1.0, p = 0.0;
      int64_t i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        const double r = std::hypot(f, g);
        e[i + 1] = r;
        if (r == 0.0) {  // the chain splits here
          d[i + 1] -= p;
          e[m] = 0.0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        const double t = (d[i] - g) * s + 2.0 * c * b;
        p = s * t;
        d[i + 1] = g + p;
        g = c * t - b;
        const double q_next = q[i + 1];
        q[i + 1] = s * q[i] + c * q_next;
        q[i] = c * q[i] - s * q_next;
      }
      if (i >= l) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0.0;
    }
  }
  return true;
}

}  // namespace

int64_t tridiag_quadrature_cpu(const TridiagQuadrature& op, const ParallelFor& parallel_for) {
  std::atomic<int64_t> failed{op.n_problems};
  parallel_for(op.n_problems, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> d(op.m), e(op.m), q(op.m);
    std::vector<int64_t> order(op.m);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t n = op.steps[b];
      double *nodes = op.nodes + b * op.m, *weights = op.weights + b * op.m;
      std::fill_n(nodes, op.m, 0.0);
      std::fill_n(weights, op.m, 0.0);
      if (n == 0) continue;
      std::copy_n(op.alpha + b * op.m, n, d.begin());
      std::copy_n(op.beta + b * op.m, n - 1, e.begin());
      std::fill_n(q.begin(), n, 0.0);
      q[0] = 1.0;
      const bool finite = std::all_of(d.begin(), d.begin() + n, [](double x) { return std::isfinite(x); }) &&
                          std::all_of(e.begin(), e.begin() + n - 1, [](double x) { return std::isfinite(x); });
      if (!finite || !implicit_ql(d.data(), e.data(), q.data(), n)) {
        int64_t lowest = failed;
        while (b < lowest && !failed.compare_exchange_weak(lowest, b)) {
        }
        continue;
      }
      std::iota(order.begin(), order.begin() + n, 0);
      std::sort(order.begin(), order.begin() + n,
                [&](int64_t i, int64_t j) { return d[i] < d[j] || (d[i] == d[j] && i < j); });
      for (int64_t k = 0; k < n; ++k) {
        nodes[k] = d[order[k]];
        weights[k] = q[order[k]] * q[order[k]];
      }
      std::fill(nodes + n, nodes + op.m, nodes[n - 1]);
    }
  });
  return failed == op.n_problems ? -1 : failed.load();
}

}  // namespace blockhess
