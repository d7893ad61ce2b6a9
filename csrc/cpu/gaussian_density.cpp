// gaussian_density on the CPU: rows and stretches of the grid are spread over threads.
#include "ops/gaussian_density.h"

#include <algorithm>

#define BLOCKHESS_LOOPS "gaussian_loops.h"
#include "each_instruction_set.h"

namespace blockhess {

void gaussian_density_cpu(const GaussianDensity& op, const ParallelFor& parallel_for) {
  constexpr int64_t kStretch = 4096;
  const int64_t n_stretches = (op.n_grid + kStretch - 1) / kStretch;
  parallel_for(op.n_rows * n_stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / n_stretches, first = (task % n_stretches) * kStretch;
      const double* grid = op.grid + first;
      const double* grid_end = op.grid + std::min(first + kStretch, op.n_grid);
      double* density = op.density + row * op.n_grid + first;
      std::fill_n(density, grid_end - grid, 0.0);
      const double sigma = op.sigma[row], peak = 0.3989422804014327 / sigma, reach = kWindow * sigma;
      for (int64_t k = 0; k < op.n_nodes; ++k) {
        const double node = op.nodes[row * op.n_nodes + k], weight = op.weights[row * op.n_nodes + k] * peak;
        if (weight == 0.0 || node + reach < grid[0] || node - reach > grid_end[-1]) continue;
        const double* from = std::lower_bound(grid, grid_end, node - reach);
        const double* to = std::upper_bound(from, grid_end, node + reach);
        BLOCKHESS_CHOSEN(add_gaussian(density + (from - grid), from, to - from, node, weight, sigma));
      }
    }
  });
}

}  // namespace blockhess
