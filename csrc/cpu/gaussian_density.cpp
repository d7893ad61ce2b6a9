// gaussian_density on the CPU: rows and chunks of the grid are distributed over threads.
#include "ops/gaussian_density.h"

#include <algorithm>

#define BLOCKHESS_LOOPS "gaussian_loops.h"
#include "simd_dispatch.h"

namespace blockhess {

void gaussian_density_cpu(const GaussianDensity& op, const ParallelFor& parallel_for) {
  constexpr int64_t kChunk = 4096;
  const int64_t n_chunks = (op.n_grid + kChunk - 1) / kChunk;
  parallel_for(op.n_rows * n_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / n_chunks, first = (task % n_chunks) * kChunk;
      const double* grid = op.grid + first;
      const double* grid_end = op.grid + std::min(first + kChunk, op.n_grid);
      double* density = op.density + row * op.n_grid + first;
      std::fill_n(density, grid_end - grid, 0.0);
      const double sigma = op.sigma[row], peak = 0.3989422804014327 / sigma, reach = kWindow * sigma;
      for (int64_t k = 0; k < op.n_nodes; ++k) {
        const double node = op.nodes[row * op.n_nodes + k], weight = op.weights[row * op.n_nodes + k] * peak;
        if (weight == 0.0 || node + reach < grid[0] || node - reach > grid_end[-1]) continue;
        const double* from = std::lower_bound(grid, grid_end, node - reach);
        const double* to = std::upper_bound(from, grid_end, node + reach);
        BLOCKHESS_DISPATCH(add_gaussian(density + (from - grid), from, to - from, node, weight, sigma));
      }
    }
  });
}

}  // namespace blockhess
