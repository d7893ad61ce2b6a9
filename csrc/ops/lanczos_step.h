// lanczos_step: one step of every Lanczos recurrence (paper, Algorithm 4), given w = H v.
//
//   alpha = <w, v>
//   r     = w - alpha v - beta_prev v_prev
//   beta  = |r|
//   v_next = r / beta
//
// alpha and beta are written to the row of the recurrence's next step, beta_prev is in the row before, 0 in the first.
// v_next replaces v_prev, so w is only read and three vector sets suffice. Memory traffic per element: w, v; then w, v,
// v_prev, r; then r, v_next: 8 elements, 4 where a segment stays in cache.
//
// Promises: dots and norms are summed in float64, and r is formed in float64 and rounded once. A finished or frozen
// recurrence gets a zero vector and is left alone otherwise. Blocks with basis_offsets[l] >= 0 are left with the
// unnormalised r and |r| in beta, to be closed by reorthogonalize; a recurrence whose alpha or |r| is not finite is
// frozen here.
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
  const int64_t* limits;         // (n_blocks) most steps a block may make
  const int64_t* basis_offsets;  // (n_blocks) -1, or the block's column in the kept basis
  double* partial;               // (n_probes, n_tiles) scratch
};

void lanczos_step_cpu(const LanczosStep<float>& op, const ParallelFor& parallel_for);
void lanczos_step_cpu(const LanczosStep<double>& op, const ParallelFor& parallel_for);
const char* lanczos_step_cuda(const LanczosStep<float>& op, const CudaQueue& queue);
const char* lanczos_step_cuda(const LanczosStep<double>& op, const CudaQueue& queue);

}  // namespace blockhess
