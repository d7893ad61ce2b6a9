// Implicit QL of kLanes tridiagonal matrices at a time, one per SIMD lane.
#pragma once

#include <cstdint>

namespace blockhess {

constexpr int64_t kLanes = 16;  // two AVX-512 vectors: one hides the latency of the other's square root

// Matrix k is tridiag(e, d, e) of size n[k] >= 1; its entries are at most 1 in absolute value, and e[i] couples rows i
// and i + 1. Entry i of d, e or q of matrix k is at [i * kLanes + k].
//   d   becomes the eigenvalues, unsorted
//   e   is destroyed; e[n[k] - 1] must exist
//   q   the first row of the identity, becomes the first row of the matrix of eigenvectors
//   failed[k]   is set to true if matrix k does not converge
// The results of a matrix do not depend on the other matrices.
void implicit_ql(double* d, double* e, double* q, const int64_t* n, bool* failed);

}  // namespace blockhess
