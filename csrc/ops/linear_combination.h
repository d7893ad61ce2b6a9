// linear_combination: a sum of products of tensors with shared coefficients, for many rows in one pass.
//
//   out[r, i] = sum_k scalar_k coefficient_k[i] base_k[r - first_k, i],   over the terms with first_k <= r < end_k
//
// i is a multi-index. Sizes are those of the result; an operand that is broadcast along a dimension has stride 0 there.
// With `sum`, out[r, i] is the sum over the last dimension, along which out has stride 0.
//
// Guarantees: a row is the same bits whatever the other rows are. Arithmetic is in T, in an order that depends on
// sizes and strides only, not on the number of threads or the grid size. Without terms a row is 0. `out` may be the
// base of a term with the same strides and rows, unless `sum` is set; no other operand may overlap out.
#pragma once

#include "common.h"

namespace blockhess {

constexpr int kMaxTerms = 16, kMaxDims = 7;

template <class T>
struct Term {
  const T* base;               // its row first_row
  const T* coefficient;        // nullptr for 1
  T scalar;                    //
  int64_t first_row, end_row;  // rows of out, 0 <= first_row <= end_row <= n_rows
  int64_t row_stride;
  int64_t strides[kMaxDims], coefficient_strides[kMaxDims];
};

template <class T>
struct LinearCombination {
  bool sum;
  int n_terms, n_dims;  // n_dims counts the summed dimension but not the rows; at least 1
  int64_t n_rows, row_stride;
  T* out;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  Term<T> terms[kMaxTerms];
};

// Removes dimensions of size 1, sorts the others by the strides of out, the largest first, and merges neighbors that
// are contiguous in every operand. A summed dimension stays the last one, unmerged.
template <class T>
void merge_dimensions(LinearCombination<T>& op) {
  int64_t* strides[1 + 2 * kMaxTerms] = {op.strides};
  int n_strides = 1;
  for (int k = 0; k < op.n_terms; ++k) {
    strides[n_strides++] = op.terms[k].strides;
    if (op.terms[k].coefficient) strides[n_strides++] = op.terms[k].coefficient_strides;
  }
  const int n_free = op.n_dims - op.sum;
  int order[kMaxDims], n_ordered = 0;
  for (int d = 0; d < n_free; ++d) {
    if (op.sizes[d] == 1) continue;
    int at = n_ordered++;
    for (; at > 0 && op.strides[order[at - 1]] < op.strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t sizes[kMaxDims];
  int last[kMaxDims], n_dims = 0;  // of each merged dimension: the last one of those that it consists of
  for (int i = 0; i < n_ordered; ++i) {
    const int d = order[i];
    bool merge = n_dims > 0;
    for (int s = 0; merge && s < n_strides; ++s) merge = strides[s][last[n_dims - 1]] == strides[s][d] * op.sizes[d];
    if (!merge) sizes[n_dims++] = 1;
    sizes[n_dims - 1] *= op.sizes[d];
    last[n_dims - 1] = d;
  }
  if (op.sum || n_dims == 0) {
    last[n_dims] = op.n_dims - 1;
    sizes[n_dims++] = op.sizes[op.n_dims - 1];
  }
  for (int s = 0; s < n_strides; ++s) {
    int64_t merged[kMaxDims];
    for (int d = 0; d < n_dims; ++d) merged[d] = strides[s][last[d]];
    for (int d = 0; d < n_dims; ++d) strides[s][d] = merged[d];
  }
  for (int d = 0; d < n_dims; ++d) op.sizes[d] = sizes[d];
  op.n_dims = n_dims;
}

void linear_combination_cpu(const LinearCombination<float>& op, const ParallelFor& parallel_for);
void linear_combination_cpu(const LinearCombination<double>& op, const ParallelFor& parallel_for);
const char* linear_combination_cuda(const LinearCombination<float>& op, const CudaQueue& queue);
const char* linear_combination_cuda(const LinearCombination<double>& op, const CudaQueue& queue);

}  // namespace blockhess
