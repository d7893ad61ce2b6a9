// linear_combination on the CPU: runs along the last dimension are distributed over threads.
#include "ops/linear_combination.h"

#include <algorithm>

#define BLOCKHESS_LOOPS "combination_loops.h"
#include "simd_dispatch.h"

namespace blockhess {
namespace {

template <class T>
void run(const LinearCombination<T>& op, const ParallelFor& parallel_for) {
  const int inner = op.n_dims - 1;
  int64_t length = op.sum ? std::max<int64_t>(1, op.sizes[inner]) : 4096;
  if (!op.sum && inner > 0) {  // transposed operands: runs of a cache line, in a block of lines that stays in cache
    const auto strided = [](int64_t stride) { return stride != 0 && stride != 1; };
    for (int k = 0; k < op.n_terms; ++k)
      if (strided(op.terms[k].strides[inner]) ||
          (op.terms[k].coefficient && strided(op.terms[k].coefficient_strides[inner])))
        length = 64 / sizeof(T);
  }
  int64_t count = op.n_rows * (op.sum ? 1 : (op.sizes[inner] + length - 1) / length);
  for (int d = 0; d < inner; ++d) count *= op.sizes[d];
  const int64_t size = std::max<int64_t>(1, std::min(length, op.sizes[inner]));
  parallel_for(count, std::max<int64_t>(1, kTileLength / size),
               [&](int64_t begin, int64_t end) { BLOCKHESS_DISPATCH(combine(op, length, begin, end)); });
}

}  // namespace

void linear_combination_cpu(const LinearCombination<float>& op, const ParallelFor& parallel_for) {
  run(op, parallel_for);
}
void linear_combination_cpu(const LinearCombination<double>& op, const ParallelFor& parallel_for) {
  run(op, parallel_for);
}

}  // namespace blockhess
