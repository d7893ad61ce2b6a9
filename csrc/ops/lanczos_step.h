// lanczos_step: one step of every Lanczos recurrence (paper, Algorithm 4), given w = H v.
//
//   alpha = <w, v>
//   r     = w - alpha v - beta_prev v_prev
//   beta  = |r|
//   v_next = r / beta
//
// alpha and beta are written to the row of the recurrence's next step; beta_prev is read from the row before, or is 0
// in the first step. v_next overwrites v_prev and w is only read, so three vector sets suffice. Memory traffic per
// element: read w, v; read w, v, v_prev and write r; read r and write v_next. These are 8 elements, or 4 if a segment
// stays in cache.
//
// Guarantees: dots and norms accumulate in float64; r is evaluated in float64 and rounded once. A recurrence that has
// ended gets a zero vector and is unchanged otherwise. In a block with basis_offsets[l] >= 0, v_prev is overwritten by
// the unnormalized r and beta by |r|, and reorthogonalize completes the step; only if alpha or |r| is not finite is the
// recurrence stopped here.
#pragma once

#include "common.h"

namespace blockhess {

template <class T>
struct LanczosStep {
  Layout layout;
  const T* w;  // (n_probes, n)
  const T* v;  // (n_probes, n)
  T* v_prev;   // (n_probes, n); becomes v_next
  Recurrences recurrences;
  const int64_t* limits;         // (n_blocks) maximum number of steps
  const int64_t* basis_offsets;  // (n_blocks) first column of the block in the stored Krylov basis, -1 if not stored
  double* partial;               // (n_probes, n_tiles) scratch
};

void lanczos_step_cpu(const LanczosStep<float>& op, const ParallelFor& parallel_for);
void lanczos_step_cpu(const LanczosStep<double>& op, const ParallelFor& parallel_for);
const char* lanczos_step_cuda(const LanczosStep<float>& op, const CudaQueue& queue);
const char* lanczos_step_cuda(const LanczosStep<double>& op, const CudaQueue& queue);

}  // namespace blockhess
