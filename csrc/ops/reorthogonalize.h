// reorthogonalize: classical Gram-Schmidt, applied twice, against the stored Krylov basis V = (v_0 ... v_j), then the
// end of Lanczos step j.
//
//   twice:  c = V^T r,  r <- r - V c
//   beta = |r|,  v_next = r / beta,  row j + 1 of the basis <- v_next
//
// Only blocks with basis_offsets[l] >= 0 take part. With project[s] = 0 (partial reorthogonalization) recurrence s
// skips the projections: r and beta = |r| are those of lanczos_step. The basis is read at most four times. Two passes
// suffice for orthogonality to rounding (Giraud, Langou and Rozloznik 2005, "twice is enough").
//
// Guarantees: coefficients accumulate in float64. If all `capacity` rows of the basis are filled, v_next is not stored.
// A recurrence that ends in this step gets a zero vector and stores no row; one that had ended before is unchanged.
#pragma once

#include "common.h"

namespace blockhess {

template <class T>
struct Reorthogonalize {
  Layout layout;
  T* r;      // (n_probes, n) residuals; becomes v_next
  T* basis;  // (capacity, n_probes, n_basis)
  int64_t capacity, n_basis;
  const int64_t* basis_offsets;  // (n_blocks) first column of the block in the basis, -1 if not stored
  int64_t n_basis_tiles;
  const int64_t* basis_tiles;  // (n_basis_tiles) the tiles of the blocks that are stored
  Recurrences recurrences;
  const int64_t* limits;   // (n_blocks) maximum number of steps
  const int32_t* project;  // (n_probes, n_blocks) 0 to skip the projections; nullptr projects all
  double* partial;         // (n_probes, n_tiles, capacity + 1) scratch: each tile's part of c and of |r|^2

  BLOCKHESS_HD bool takes_part(int64_t segment) const {
    return recurrences.running(segment) && basis_offsets[segment % layout.n_blocks] >= 0;
  }

  BLOCKHESS_HD bool projects(int64_t segment) const {
    return takes_part(segment) && (project == nullptr || project[segment] != 0);
  }

  // Number of filled basis rows of a segment that takes part.
  BLOCKHESS_HD int64_t count(int64_t segment) const {
    const int64_t step = recurrences.steps[segment];
    return step < capacity ? step + 1 : capacity;
  }
};

void reorthogonalize_cpu(const Reorthogonalize<float>& op, const ParallelFor& parallel_for);
void reorthogonalize_cpu(const Reorthogonalize<double>& op, const ParallelFor& parallel_for);
const char* reorthogonalize_cuda(const Reorthogonalize<float>& op, const CudaQueue& queue);
const char* reorthogonalize_cuda(const Reorthogonalize<double>& op, const CudaQueue& queue);

}  // namespace blockhess
