// tridiag_quadrature: Gauss quadrature of each tridiagonal T (Golub and Welsch 1969; paper, Theorem 4).
//
//   T = tridiag(beta, alpha, beta) = Q Lambda Q^T,   nodes = diag(Lambda),   weights = (first row of Q)^2
//
// Implicit QL with Wilkinson's shift that carries only the first row of Q: O(m^2) a problem, float64.
//
// Promises: nodes ascend and weights sum to 1. Only the leading `steps` entries of a problem are read; entries beyond
// get the last node and weight 0. No steps: all zero. beta[steps - 1], the residual, is not part of T. A problem with a
// non-finite entry, or one that does not converge in kMaxSweeps sweeps a node, is reported, never returned half done.
#pragma once

#include "common.h"

namespace blockhess {

constexpr int kMaxSweeps = 60;  // per eigenvalue; two are usual

struct TridiagQuadrature {
  int64_t n_problems, m;
  const double* alpha;   // (n_problems, m)
  const double* beta;    // (n_problems, m)
  const int64_t* steps;  // (n_problems)
  double* nodes;         // (n_problems, m)
  double* weights;       // (n_problems, m)
  double* couplings;     // (n_problems, m) scratch of the CUDA twin
};

// Returns the lowest index of a problem that failed, or -1.
int64_t tridiag_quadrature_cpu(const TridiagQuadrature& op, const ParallelFor& parallel_for);

// Marks a problem that failed, or whose steps are not in 0 ... m, with NaN in all its nodes and weights, so that the
// host can learn of it when it reads them.
const char* tridiag_quadrature_cuda(const TridiagQuadrature& op, const CudaQueue& queue);

}  // namespace blockhess
