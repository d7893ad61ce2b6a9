// linear_combination on the CPU: runs along the last dimension are distributed over threads.
#include "ops/linear_combination.h"

#include <algorithm>
#include <vector>

#define BLOCKHESS_LOOPS "combination_loops.h"
#include "simd_dispatch.h"

namespace blockhess {
namespace {

template <class T>
void run(const LinearCombination<T>& op, const ParallelFor& parallel_for) {
  const int inner = op.n_dims - 1;
  const auto strided = [](int64_t stride) { return stride != 0 && stride != 1; };
  bool in_tiles = strided(op.strides[inner]);
  for (int k = 0; k < op.n_terms; ++k) {
    const Term<T>& term = op.terms[k];
    in_tiles |= strided(term.strides[inner]) || (term.coefficient && strided(term.coefficient_strides[inner]));
  }
  const int64_t tile_length = in_tiles ? 256 / sizeof(T) : 4096, size = op.sizes[inner];
  int64_t count = op.n_rows * (op.sum ? 1 : (size + tile_length - 1) / tile_length);
  for (int d = 0; d < inner; ++d) count *= op.sizes[d];
  const int64_t length = std::max<int64_t>(1, op.sum ? size : std::min(size, tile_length));
  parallel_for(count, std::max<int64_t>(1, kTileLength / length),
               [&](int64_t begin, int64_t end) { BLOCKHESS_DISPATCH(combine(op, tile_length, begin, end)); });
}

}  // namespace

void linear_combination_cpu(const LinearCombination<float>& op, const ParallelFor& parallel_for) {
  run(op, parallel_for);
}
void linear_combination_cpu(const LinearCombination<double>& op, const ParallelFor& parallel_for) {
  run(op, parallel_for);
}

}  // namespace blockhess
