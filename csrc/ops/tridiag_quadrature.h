// tridiag_quadrature: Gauss quadrature of each tridiagonal matrix T (Golub and Welsch 1969; paper, Theorem 4).
//
//   T = tridiag(beta, alpha, beta) = Q Lambda Q^T,   nodes = diag(Lambda),   weights = (first row of Q)^2
//
// Implicit QL with Wilkinson's shift that updates only the first row of Q: O(m^2) per problem, in float64.
//
// Guarantees: nodes are ascending and weights sum to 1. T consists of the first `steps` entries of alpha and the first
// steps - 1 of beta; beta[steps - 1] is the norm of the residual. Entries from `steps` on get the last node and weight
// 0; with steps = 0 all are 0. A problem with a non-finite entry, or an eigenvalue that needs more than kMaxSweeps
// sweeps, is reported as failed.
#pragma once

#include "common.h"

namespace blockhess {

constexpr int kMaxSweeps = 60;  // per eigenvalue; typically two are needed

struct TridiagQuadrature {
  int64_t n_problems, m;
  const double* alpha;   // (n_problems, m)
  const double* beta;    // (n_problems, m)
  const int64_t* steps;  // (n_problems)
  double* nodes;         // (n_problems, m)
  double* weights;       // (n_problems, m)
  double* couplings;     // (n_problems, m) scratch, used on CUDA only
};

// Returns the lowest index of a failed problem, or -1.
int64_t tridiag_quadrature_cpu(const TridiagQuadrature& op, const ParallelFor& parallel_for);

// Sets all nodes and weights of a failed problem to NaN, also if its `steps` is not in 0 ... m, so that the
// host can check them when it reads the result instead of waiting for the kernel.
const char* tridiag_quadrature_cuda(const TridiagQuadrature& op, const CudaQueue& queue);

}  // namespace blockhess
