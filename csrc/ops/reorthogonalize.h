// reorthogonalize: classical Gram-Schmidt, applied twice, against the kept basis V = (v_0 ... v_j), j the step.
//
//   twice:  c = V^T r,  r <- r - V c
//   beta = |r|,  v_next = r / beta,  row j + 1 of the basis <- v_next
//
// Only blocks with basis_offsets[l] >= 0 take part. beta is taken after the projections. Memory traffic: the basis is
// read at most four times. Source: Giraud, Langou, Rozloznik 2005 ("twice is enough"). Recurrences with project[s] = 0 do
// without the projections in this step (partial reorthogonalisation): r and |r|, which is in beta, are as they are.
//
// Promises: coefficients are summed in float64. The last row of the basis is never passed: where it is filled, v_next
// is not kept. Finished and frozen recurrences get a zero vector and leave the basis alone.
#pragma once

#include "common.h"

namespace blockhess {

template <class T>
struct Reorthogonalize {
  Layout layout;
  T* r;      // (n_probes, n) residuals, becomes v_next
  T* basis;  // (capacity, n_probes, n_basis)
  int64_t capacity, n_basis;
  const int64_t* basis_offsets;  // (n_blocks) -1, or the block's column in the basis
  Recurrences recurrences;
  const int64_t* limits;   // (n_blocks)
  const int32_t* project;  // (n_probes, n_blocks) 0 where the step goes without projections
  double* partial;         // (n_probes, n_tiles, capacity + 1) scratch: a tile's share of c, and of |r|^2

  BLOCKHESS_HD bool takes_part(int64_t segment) const {
    return basis_offsets[segment % layout.n_blocks] >= 0 && recurrences.running(segment);
  }

  BLOCKHESS_HD bool projects(int64_t segment) const { return takes_part(segment) && project[segment] != 0; }

  // Filled rows of the basis of a segment that takes part.
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
