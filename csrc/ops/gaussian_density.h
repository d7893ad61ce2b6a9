// gaussian_density: weighted nodes smoothed by a Gaussian (paper, Appendix B.2), one sigma per row.
//
//   density[b, g] = sum_k weights[b, k] exp(-(grid[g] - nodes[b, k])^2 / (2 sigma_b^2)) / (sigma_b sqrt(2 pi))
//
// The grid is ascending; nodes may be in any order.
//
// Guarantees: terms are added in the order of the nodes; those with |grid[g] - nodes[b, k]| > kWindow sigma_b, which
// are below 2^-53 of their peak, are omitted. No temporary is larger than the result.
#pragma once

#include "common.h"

namespace blockhess {

constexpr double kWindow = 8.6;  // exp(-8.6^2 / 2) = 8.7e-17

struct GaussianDensity {
  int64_t n_rows, n_nodes, n_grid;
  const double* nodes;    // (n_rows, n_nodes)
  const double* weights;  // (n_rows, n_nodes)
  const double* grid;     // (n_grid)
  const double* sigma;    // (n_rows)
  double* density;        // (n_rows, n_grid)
};

void gaussian_density_cpu(const GaussianDensity& op, const ParallelFor& parallel_for);
const char* gaussian_density_cuda(const GaussianDensity& op, const CudaQueue& queue);

}  // namespace blockhess
