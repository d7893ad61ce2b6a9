#include "vector_kernels.h"

#include <algorithm>
#include <cmath>

#include "multiversion.h"

namespace blockhess {
namespace {

// Partial sums: enough to hide the latency of the add at every vector width.
constexpr int64_t kLanes = 32;
// Elements of x in float64, and their part of 100 rows of the basis: both stay in cache.
constexpr int64_t kChunk = 4096;
// Rows of the basis that share the loads of x.
constexpr int64_t kRows = 4;
// Elements that a loop asks for ahead of their turn, since a processor's own prefetching ends with each page of 4 KiB.
constexpr int64_t kAhead = 512;

// Asks for kLanes elements, kAhead after x, to be in the second-level cache; where there is no memory it does nothing.
template <class T>
BLOCKHESS_INLINE void prefetch(const T* x) {
  for (int64_t k = 0; k < kLanes; k += 64 / sizeof(T)) __builtin_prefetch(x + kAhead + k, 0, 2);
}

struct Lanes {
  double sum[kLanes] = {};
  BLOCKHESS_INLINE double total() {
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; ++k) sum[k] += sum[k + half];
    return sum[0];
  }
};

template <class T>
BLOCKHESS_INLINE double dot_loop(const T* __restrict x, const T* __restrict y, int64_t n) {
  Lanes lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes.sum[k] += double(x[i + k]) * double(y[i + k]);
  for (int64_t k = 0; i + k < n; ++k) lanes.sum[k] += double(x[i + k]) * double(y[i + k]);
  return lanes.total();
}

// p <- r = w - alpha v - beta p, sum <- sum + r^2, over n elements that stay in registers from line to line
template <int64_t n, class T>
BLOCKHESS_INLINE void three_terms(const T* __restrict w, const T* __restrict v, T* __restrict p, double alpha,
                                  double beta, double* __restrict sum) {
  T r[n];
  for (int64_t k = 0; k < n; ++k) r[k] = T(double(w[k]) - alpha * double(v[k]) - beta * double(p[k]));
  for (int64_t k = 0; k < n; ++k) p[k] = r[k];
  for (int64_t k = 0; k < n; ++k) sum[k] += double(r[k]) * double(r[k]);
}

template <class T>
BLOCKHESS_INLINE double three_term_loop(const T* __restrict w, const T* __restrict v, T* __restrict p, double alpha,
                                        double beta, int64_t n) {
  Lanes lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(p + i);  // w and v have been read before
    for (int64_t k = 0; k < kLanes; k += 16)
      three_terms<16>(w + i + k, v + i + k, p + i + k, alpha, beta, lanes.sum + k);
  }
  for (int64_t k = 0; i + k < n; ++k) three_terms<1>(w + i + k, v + i + k, p + i + k, alpha, beta, lanes.sum + k);
  return lanes.total();
}

template <class T>
BLOCKHESS_INLINE void scale_loop(T* x, double scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = T(double(x[i]) * scale);
}

// The same without conversions: high + low is scale to twice the digits of float32, and fused they are rounded once.
// For finite x alone, inf high + inf low being NaN where low is 0 or of the other sign. Callers pass scale = 1 / |x|_2
// where that norm is finite, so that every x_i is, and |x_i scale| <= 1.
BLOCKHESS_INLINE void scale_fused(float* x, double scale, int64_t n) {
  const float high = float(scale), low = float(scale - double(high));
  if (!std::isnormal(high)) return scale_loop(x, scale, n);
  for (int64_t i = 0; i < n; ++i) x[i] = std::fma(x[i], high, x[i] * low);
}

// Fused where the processor can: a library takes long for it.
#if defined(BLOCKHESS_VERSION)
BLOCKHESS_VERSION("default") void scale_floats(float* x, double scale, int64_t n) { scale_loop(x, scale, n); }
BLOCKHESS_VERSION("arch=x86-64-v3") void scale_floats(float* x, double scale, int64_t n) { scale_fused(x, scale, n); }
BLOCKHESS_VERSION("arch=x86-64-v4") void scale_floats(float* x, double scale, int64_t n) { scale_fused(x, scale, n); }
#else
void scale_floats(float* x, double scale, int64_t n) {
#if defined(__FP_FAST_FMAF)
  scale_fused(x, scale, n);
#else
  scale_loop(x, scale, n);
#endif
}
#endif

// chunk <- chunk - sum_r c_r row_r over kRows rows, or over one
template <int64_t rows, class T>
BLOCKHESS_INLINE void subtract_rows(double* __restrict chunk, const T* __restrict row, int64_t stride,
                                    const double* __restrict c, int64_t n) {
  const auto element = [&](int64_t i) {
    double sum = 0.0;
    for (int64_t r = 0; r < rows; ++r) sum += c[r] * double(row[r * stride + i]);
    chunk[i] -= sum;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t r = 0; r < rows; ++r) prefetch(row + r * stride + i);
    for (int64_t k = 0; k < kLanes; ++k) element(i + k);
  }
  for (; i < n; ++i) element(i);
}

// d_r <- d_r + <row_r, chunk>
template <int64_t rows, class T>
BLOCKHESS_INLINE void add_dots(double* __restrict d, const T* __restrict row, int64_t stride,
                               const double* __restrict chunk, int64_t n) {
  Lanes lanes[rows];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t r = 0; r < rows; ++r) prefetch(row + r * stride + i);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < kLanes; ++k) lanes[r].sum[k] += double(row[r * stride + i + k]) * chunk[i + k];
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; i + k < n; ++k) lanes[r].sum[k] += double(row[r * stride + i + k]) * chunk[i + k];
    d[r] += lanes[r].total();
  }
}

template <class T>
BLOCKHESS_INLINE double gram_schmidt_loop(T* __restrict x, const T* __restrict basis, int64_t stride, int64_t count,
                                          int64_t n, const double* __restrict c, double* __restrict d) {
  Lanes norm;
  double chunk[kChunk];
  if (d) std::fill_n(d, count, 0.0);
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t length = std::min(kChunk, n - start);
    const T* rows = basis + start;
    for (int64_t i = 0; i < length; ++i) chunk[i] = double(x[start + i]);
    if (c) {
      int64_t k = 0;
      for (; k + kRows <= count; k += kRows) subtract_rows<kRows>(chunk, rows + k * stride, stride, c + k, length);
      for (; k < count; ++k) subtract_rows<1>(chunk, rows + k * stride, stride, c + k, length);
      for (int64_t i = 0; i < length; ++i) x[start + i] = T(chunk[i]);
      for (int64_t i = 0; i < length; ++i) chunk[i] = double(x[start + i]);
    }
    if (d) {
      int64_t k = 0;
      for (; k + kRows <= count; k += kRows) add_dots<kRows>(d + k, rows + k * stride, stride, chunk, length);
      for (; k < count; ++k) add_dots<1>(d + k, rows + k * stride, stride, chunk, length);
    }
    for (int64_t i = 0; i < length; ++i) norm.sum[i % kLanes] += chunk[i] * chunk[i];
  }
  return norm.total();
}

}  // namespace

#define BLOCKHESS_INSTANTIATE(T)                                                                                 \
  BLOCKHESS_MULTIVERSION double dot(const T* x, const T* y, int64_t n) { return dot_loop(x, y, n); }             \
  BLOCKHESS_MULTIVERSION double three_term(const T* w, const T* v, T* p, double alpha, double beta, int64_t n) { \
    return three_term_loop(w, v, p, alpha, beta, n);                                                             \
  }                                                                                                              \
  BLOCKHESS_MULTIVERSION double gram_schmidt(T* x, const T* basis, int64_t stride, int64_t count, int64_t n,     \
                                             const double* c, double* d) {                                       \
    return gram_schmidt_loop(x, basis, stride, count, n, c, d);                                                  \
  }

BLOCKHESS_INSTANTIATE(float)
BLOCKHESS_INSTANTIATE(double)

void scale(float* x, double scale, int64_t n) { scale_floats(x, scale, n); }
BLOCKHESS_MULTIVERSION void scale(double* x, double scale, int64_t n) { scale_loop(x, scale, n); }

}  // namespace blockhess
