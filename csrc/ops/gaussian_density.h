// gaussian_density: weighted nodes blurred by a Gaussian (paper, appendix B.2), one sigma a row.
//
//   density[b, g] = sum_k weights[b, k] exp(-(grid[g] - nodes[b, k])^2 / (2 sigma_b^2)) / (sigma_b sqrt(2 pi))
//
// Promises: a node acts within kWindow sigma only, where it falls below 2^-53 of its own peak. Nodes may stand in any
// order; the grid ascends. No temporary larger than the result; terms are added in the order of the nodes.
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
