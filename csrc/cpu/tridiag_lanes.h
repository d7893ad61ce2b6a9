// Implicit QL of kLanes tridiagonal matrices in lockstep, one a lane of the vector unit.
#pragma once

#include <cstdint>

namespace blockhess {

constexpr int64_t kLanes = 16;  // two AVX-512 vectors, so that one is worked on while the other waits for its root

// Entry i of the matrix of lane k is at [i * kLanes + k]. The matrix is tridiag(e, d, e) of size n[k] >= 1, with e[i]
// coupling i and i + 1 and no entry above 1; d becomes its eigenvalues in no order, and q, on entry the first row of
// the identity, the first row of its eigenvectors; e is destroyed and has room for e[n[k] - 1].
// A lane that does not converge gets failed[k] = true. What a lane computes depends on its own matrix only.
void implicit_ql(double* d, double* e, double* q, const int64_t* n, bool* failed);

}  // namespace blockhess
