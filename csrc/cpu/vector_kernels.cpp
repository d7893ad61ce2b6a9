// Run-time dispatch of vector_kernels.h over the instruction sets.
#include "vector_kernels.h"

#include <algorithm>

#define BLOCKHESS_LOOPS "vector_loops.h"
#include "simd_dispatch.h"

namespace blockhess {

#define BLOCKHESS_INSTANTIATE(T)                                                                                    \
  double dot(const T* x, const T* y, int64_t n) { return BLOCKHESS_DISPATCH(dot(x, y, n)); }                        \
  double three_term(const T* w, const T* v, T* p, double alpha, double beta, int64_t n) {                           \
    return BLOCKHESS_DISPATCH(three_term(w, v, p, alpha, beta, n));                                                 \
  }                                                                                                                 \
  void scale(T* x, double factor, int64_t n) { BLOCKHESS_DISPATCH(scale(x, factor, n)); }                           \
  double gram_schmidt(T* x, const T* basis, int64_t stride, int64_t count, int64_t n, const double* c, double* d) { \
    return BLOCKHESS_DISPATCH(gram_schmidt(x, basis, stride, count, n, c, d));                                      \
  }

BLOCKHESS_INSTANTIATE(float)
BLOCKHESS_INSTANTIATE(double)

}  // namespace blockhess
