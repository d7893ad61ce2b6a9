// linear_combination on CUDA: one thread per pack of elements; with `sum` one warp per element of the result.
//
// A pack is 16 bytes of the last dimension if every operand is contiguous or broadcast along it and aligned, otherwise
// one element; the bits of an element do not depend on it.
#include "launch.cuh"
#include "ops/linear_combination.h"
#include "tile.cuh"

namespace blockhess {
namespace {

constexpr int kWarps = kThreads / 32;

// The location of an element: its row, its index in the outer dimensions, its position in the last one. Loops over
// dimensions are unrolled, so that the index stays in registers.
struct Location {
  int64_t row, index[kMaxDims - 1], position;

  // Strides of n_dims dimensions.
  __device__ int64_t offset(const int64_t* strides, int n_dims) const {
    int64_t sum = position * strides[n_dims - 1];
#pragma unroll
    for (int d = 0; d < kMaxDims - 1; ++d)
      if (d < n_dims - 1) sum += index[d] * strides[d];
    return sum;
  }
};

// The location of element i in row-major order, if the last dimension has n_positions.
template <class T>
__device__ Location locate(const LinearCombination<T>& op, int64_t i, int64_t n_positions) {
  Location at{};
  at.position = i % n_positions;
  i /= n_positions;
#pragma unroll
  for (int d = kMaxDims - 2; d >= 0; --d) {
    if (d >= op.n_dims - 1) continue;
    at.index[d] = i % op.sizes[d];
    i /= op.sizes[d];
  }
  at.row = i;
  return at;
}

// Loads N elements along the last dimension, whose stride is 0 or 1 if N > 1.
template <int N, class T>
__device__ Pack<T, N> load_along(const T* p, int64_t stride) {
  if constexpr (N > 1) {
    if (stride != 0) return load<true, N>(p);
  }
  Pack<T, N> pack;
#pragma unroll
  for (int v = 0; v < N; ++v) pack.x[v] = *p;
  return pack;
}

// The linear combination at N elements from `at` on.
template <int N, class T>
__device__ Pack<T, N> combine(const LinearCombination<T>& op, const Location& at) {
  const int inner = op.n_dims - 1;
  Pack<T, N> sum{};
  for (int k = 0; k < op.n_terms; ++k) {
    const Term<T>& term = op.terms[k];
    if (at.row < term.first_row || at.row >= term.end_row) continue;
    const int64_t start = (at.row - term.first_row) * term.row_stride + at.offset(term.strides, op.n_dims);
    const Pack<T, N> base = load_along<N>(term.base + start, term.strides[inner]);
    if (term.coefficient == nullptr) {
#pragma unroll
      for (int v = 0; v < N; ++v) sum.x[v] += term.scalar * base.x[v];
    } else {
      const T* coefficient = term.coefficient + at.offset(term.coefficient_strides, op.n_dims);
      const Pack<T, N> c = load_along<N>(coefficient, term.coefficient_strides[inner]);
#pragma unroll
      for (int v = 0; v < N; ++v) sum.x[v] += term.scalar * c.x[v] * base.x[v];
    }
  }
  return sum;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) combine_kernel(LinearCombination<T> op, int64_t n_packs) {
  const int inner = op.n_dims - 1;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n_packs; i += step) {
    Location at = locate(op, i, op.sizes[inner] / N);
    at.position *= N;
    store<(N > 1)>(op.out + at.row * op.row_stride + at.offset(op.strides, op.n_dims), combine<N>(op, at));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine_sum_kernel(LinearCombination<T> op, int64_t count) {
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * kWarps, length = op.sizes[op.n_dims - 1];
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < count; i += step) {
    Location at = locate(op, i, 1);
    T sum = 0;
    for (at.position = lane; at.position < length; at.position += 32) sum += combine<1>(op, at).x[0];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
    if (lane == 0) op.out[at.row * op.row_stride + at.offset(op.strides, op.n_dims)] = sum;
  }
}

// Whether packs of N elements are aligned in an operand.
template <int N, class T>
bool packs(const T* p, int64_t row_stride, const int64_t* strides, int n_dims) {
  const int64_t along = strides[n_dims - 1];
  if (along == 0) return true;
  bool whole = along == 1 && aligned(p) && row_stride % N == 0;
  for (int d = 0; d < n_dims - 1; ++d) whole = whole && strides[d] % N == 0;
  return whole;
}

template <class T>
const char* run(const LinearCombination<T>& op, const CudaQueue& queue) {
  constexpr int N = kPack<T>;
  const int inner = op.n_dims - 1;
  int64_t count = op.n_rows;
  for (int d = 0; d < inner; ++d) count *= op.sizes[d];
  Launcher launch(queue);
  if (op.sum) {
    launch(combine_sum_kernel<T>, (count + kWarps - 1) / kWarps, kThreads, 0, op, count);
    return launch.error();
  }
  bool packed =
      op.sizes[inner] % N == 0 && op.strides[inner] == 1 && packs<N>(op.out, op.row_stride, op.strides, op.n_dims);
  for (int k = 0; packed && k < op.n_terms; ++k) {
    const Term<T>& term = op.terms[k];
    packed = packs<N>(term.base, term.row_stride, term.strides, op.n_dims) &&
             (term.coefficient == nullptr || packs<N>(term.coefficient, 0, term.coefficient_strides, op.n_dims));
  }
  const int64_t n_packs = count * op.sizes[inner] / (packed ? N : 1);
  const int64_t n_ctas = (n_packs + kThreads - 1) / kThreads;
  launch(packed ? combine_kernel<T, N> : combine_kernel<T, 1>, n_ctas, kThreads, 0, op, n_packs);
  return launch.error();
}

}  // namespace

const char* linear_combination_cuda(const LinearCombination<float>& op, const CudaQueue& queue) {
  return run(op, queue);
}
const char* linear_combination_cuda(const LinearCombination<double>& op, const CudaQueue& queue) {
  return run(op, queue);
}

}  // namespace blockhess
