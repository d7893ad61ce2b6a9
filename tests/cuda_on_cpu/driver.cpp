// C functions called by emulator.py: guarded memory, and the CUDA implementation of every op on plain pointers.
#include <algorithm>
#include <cstdlib>

#include "cuda_runtime.h"
#include "ops/gaussian_density.h"
#include "ops/lanczos_step.h"
#include "ops/linear_combination.h"
#include "ops/random_probes.h"
#include "ops/reorthogonalize.h"
#include "ops/tridiag_quadrature.h"

using namespace blockhess;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;  // the sanitizer guards the ends of malloc's memory
#else
constexpr size_t kGuard = 256;
#endif
constexpr unsigned char kFill = 0xff;  // NaN as a float, -1 as an integer

template <class T>
T* at(void** arrays, int i) {
  return static_cast<T*>(arrays[i]);
}

Layout layout_of(const int64_t* sizes, void** arrays) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], at<int64_t>(arrays, 0), at<Tile>(arrays, 1), at<int64_t>(arrays, 2)};
}

Recurrences recurrences_of(const int64_t* sizes, void** arrays, int i) {
  return {sizes[4],
          sizes[0] * sizes[1],
          at<double>(arrays, i),
          at<double>(arrays, i + 1),
          at<double>(arrays, i + 2),
          at<int64_t>(arrays, i + 3),
          at<int32_t>(arrays, i + 4)};
}

template <class T>
const char* lanczos_step(const int64_t* sizes, void** a, const CudaQueue& queue) {
  return lanczos_step_cuda(
      LanczosStep<T>{layout_of(sizes, a), at<T>(a, 3), at<T>(a, 4), at<T>(a, 5), recurrences_of(sizes, a, 6),
                     at<int64_t>(a, 11), at<int64_t>(a, 12), at<double>(a, 13)},
      queue);
}

template <class T>
const char* reorthogonalize(const int64_t* sizes, void** a, const CudaQueue& queue) {
  return reorthogonalize_cuda(
      Reorthogonalize<T>{layout_of(sizes, a), at<T>(a, 3), at<T>(a, 4), sizes[5], sizes[6], at<int64_t>(a, 5), sizes[7],
                         at<int64_t>(a, 6), recurrences_of(sizes, a, 7), at<int64_t>(a, 12),
                         sizes[8] ? at<int32_t>(a, 14) : nullptr, at<double>(a, 13)},
      queue);
}

template <class T>
const char* random_probes(const int64_t* sizes, void** a, const CudaQueue& queue) {
  return random_probes_cuda(RandomProbes<T>{layout_of(sizes, a), sizes[4], sizes[5], Distribution(sizes[6]),
                                            at<int64_t>(a, 3), at<T>(a, 4), at<double>(a, 5)},
                            queue);
}

// sizes: sum, terms, dims, rows, then shape and strides of out; of each term its rows, whether it has a coefficient,
// and the strides of both. arrays: out, scalars, then base and coefficient of each term.
template <class T>
const char* linear_combination(const int64_t* sizes, void** a, const CudaQueue& queue) {
  LinearCombination<T> op{sizes[0] != 0, int(sizes[1]), int(sizes[2]), sizes[3], sizes[4], at<T>(a, 0), {}, {}, {}};
  sizes += 5;
  const auto read = [&](int64_t* to) { std::copy_n(sizes, op.n_dims, to), sizes += op.n_dims; };
  read(op.sizes);
  read(op.strides);
  for (int k = 0; k < op.n_terms; ++k) {
    Term<T>& term = op.terms[k];
    term.base = at<T>(a, 2 + 2 * k);
    term.coefficient = sizes[3] ? at<T>(a, 3 + 2 * k) : nullptr;
    term.scalar = T(at<double>(a, 1)[k]);
    term.first_row = sizes[0];
    term.end_row = sizes[1];
    term.row_stride = sizes[2];
    sizes += 4;
    read(term.strides);
    read(term.coefficient_strides);
  }
  merge_dimensions(op);
  return linear_combination_cuda(op, queue);
}

}  // namespace

extern "C" {

void* guarded_malloc(size_t bytes) {
  auto* memory = static_cast<unsigned char*>(std::malloc(bytes + 2 * kGuard));
  std::memset(memory, kFill, bytes + 2 * kGuard);
  return memory + kGuard;
}

// Frees memory of guarded_malloc. Returns whether the guard zones are intact.
bool guarded_free(void* pointer, size_t bytes) {
  unsigned char* memory = static_cast<unsigned char*>(pointer) - kGuard;
  bool intact = true;
  for (size_t i = 0; i < kGuard; ++i) intact &= memory[i] == kFill && memory[kGuard + bytes + i] == kFill;
  std::free(memory);
  return intact;
}

void set_options(int order, int max_shared) { cuda_on_cpu::options = {cuda_on_cpu::Order(order), max_shared}; }

const char* run_lanczos_step(int is_double, const int64_t* sizes, void** arrays, int64_t max_grid) {
  return (is_double ? lanczos_step<double> : lanczos_step<float>)(sizes, arrays, {nullptr, max_grid});
}

const char* run_reorthogonalize(int is_double, const int64_t* sizes, void** arrays, int64_t max_grid) {
  return (is_double ? reorthogonalize<double> : reorthogonalize<float>)(sizes, arrays, {nullptr, max_grid});
}

const char* run_random_probes(int is_double, const int64_t* sizes, void** arrays, int64_t max_grid) {
  return (is_double ? random_probes<double> : random_probes<float>)(sizes, arrays, {nullptr, max_grid});
}

const char* run_linear_combination(int is_double, const int64_t* sizes, void** arrays, int64_t max_grid) {
  return (is_double ? linear_combination<double> : linear_combination<float>)(sizes, arrays, {nullptr, max_grid});
}

const char* run_tridiag_quadrature(int, const int64_t* sizes, void** a, int64_t max_grid) {
  return tridiag_quadrature_cuda({sizes[0], sizes[1], at<double>(a, 0), at<double>(a, 1), at<int64_t>(a, 2),
                                  at<double>(a, 3), at<double>(a, 4), at<double>(a, 5)},
                                 {nullptr, max_grid});
}

const char* run_gaussian_density(int, const int64_t* sizes, void** a, int64_t max_grid) {
  return gaussian_density_cuda({sizes[0], sizes[1], sizes[2], at<double>(a, 0), at<double>(a, 1), at<double>(a, 2),
                                at<double>(a, 3), at<double>(a, 4)},
                               {nullptr, max_grid});
}
}
