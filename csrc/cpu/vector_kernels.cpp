#include "vector_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "multiversion.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if defined(BLOCKHESS_VERSIONS)

#define BLOCKHESS_SET baseline
#define BLOCKHESS_LEVEL 1
#include "vector_loops.h"
#undef BLOCKHESS_SET
#undef BLOCKHESS_LEVEL

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define BLOCKHESS_SET avx2
#define BLOCKHESS_LEVEL 3
#include "vector_loops.h"
#undef BLOCKHESS_SET
#undef BLOCKHESS_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define BLOCKHESS_SET avx512
#define BLOCKHESS_LEVEL 4
#include "vector_loops.h"
#pragma GCC pop_options

#define BLOCKHESS_CHOSEN(call)                          \
  (__builtin_cpu_supports("x86-64-v4")   ? avx512::call \
   : __builtin_cpu_supports("x86-64-v3") ? avx2::call   \
                                         : baseline::call)

#else

#define BLOCKHESS_SET only
#if defined(__AVX512F__)
#define BLOCKHESS_LEVEL 4
#elif defined(__AVX2__) && defined(__FMA__)
#define BLOCKHESS_LEVEL 3
#else
#define BLOCKHESS_LEVEL 1
#endif
#include "vector_loops.h"

#define BLOCKHESS_CHOSEN(call) only::call

#endif

namespace blockhess {

#define BLOCKHESS_INSTANTIATE(T)                                                                                    \
  double dot(const T* x, const T* y, int64_t n) { return BLOCKHESS_CHOSEN(dot(x, y, n)); }                          \
  double three_term(const T* w, const T* v, T* p, double alpha, double beta, int64_t n) {                           \
    return BLOCKHESS_CHOSEN(three_term(w, v, p, alpha, beta, n));                                                   \
  }                                                                                                                 \
  void scale(T* x, double factor, int64_t n) { BLOCKHESS_CHOSEN(scale(x, factor, n)); }                             \
  double gram_schmidt(T* x, const T* basis, int64_t stride, int64_t count, int64_t n, const double* c, double* d) { \
    return BLOCKHESS_CHOSEN(gram_schmidt(x, basis, stride, count, n, c, d));                                        \
  }

BLOCKHESS_INSTANTIATE(float)
BLOCKHESS_INSTANTIATE(double)

}  // namespace blockhess
