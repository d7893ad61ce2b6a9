#include "vector_kernels.h"

#include <algorithm>

#include "multiversion.h"

namespace blockhess {
namespace {

constexpr int64_t kLanes = 32;    // partial sums: enough to hide the latency of the add at every vector width
constexpr int64_t kChunk = 2048;  // elements that stay in the first-level cache while the basis streams past

struct Lanes {
  double sum[kLanes] = {};
  BLOCKHESS_INLINE double total() const {
    double total = 0.0;
    for (int64_t i = 0; i < kLanes; ++i) total += sum[i];
    return total;
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

template <class T>
BLOCKHESS_INLINE double three_term_loop(const T* __restrict w, const T* __restrict v, T* __restrict p, double alpha,
                                        double beta, int64_t n) {
  Lanes lanes;
  const auto element = [&](int64_t i, int64_t k) {
    const T r = T(double(w[i + k]) - alpha * double(v[i + k]) - beta * double(p[i + k]));
    p[i + k] = r;
    lanes.sum[k] += double(r) * double(r);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) element(i, k);
  for (int64_t k = 0; i + k < n; ++k) element(i, k);
  return lanes.total();
}

template <class T>
BLOCKHESS_INLINE void scale_loop(T* x, double scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = T(double(x[i]) * scale);
}

template <class T>
BLOCKHESS_INLINE double subtract_projection_loop(T* __restrict x, const T* __restrict basis, int64_t stride,
                                                 const double* __restrict c, int64_t count, int64_t n) {
  Lanes lanes;
  double chunk[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t length = std::min(kChunk, n - start);
    for (int64_t i = 0; i < length; ++i) chunk[i] = double(x[start + i]);
    for (int64_t k = 0; k < count; ++k) {
      const T* __restrict row = basis + k * stride + start;
      for (int64_t i = 0; i < length; ++i) chunk[i] -= c[k] * double(row[i]);
    }
    for (int64_t i = 0; i < length; ++i) x[start + i] = T(chunk[i]);
    for (int64_t i = 0; i < length; ++i) lanes.sum[i % kLanes] += double(x[start + i]) * double(x[start + i]);
  }
  return lanes.total();
}

}  // namespace

#define BLOCKHESS_INSTANTIATE(T)                                                                                 \
  BLOCKHESS_MULTIVERSION double dot(const T* x, const T* y, int64_t n) { return dot_loop(x, y, n); }             \
  BLOCKHESS_MULTIVERSION double three_term(const T* w, const T* v, T* p, double alpha, double beta, int64_t n) { \
    return three_term_loop(w, v, p, alpha, beta, n);                                                             \
  }                                                                                                              \
  BLOCKHESS_MULTIVERSION void scale(T* x, double scale, int64_t n) { scale_loop(x, scale, n); }                  \
  BLOCKHESS_MULTIVERSION double subtract_projection(T* x, const T* basis, int64_t stride, const double* c,       \
                                                    int64_t count, int64_t n) {                                  \
    return subtract_projection_loop(x, basis, stride, c, count, n);                                              \
  }

BLOCKHESS_INSTANTIATE(float)
BLOCKHESS_INSTANTIATE(double)

}  // namespace blockhess
