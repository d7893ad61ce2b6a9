// The loops of vector_kernels.h, for one instruction set: see each_instruction_set.h.
#include "wide.h"

namespace blockhess {
namespace BLOCKHESS_SET {
namespace {

// Partial sums: enough to hide the latency of the add at every width.
constexpr int64_t kLanes = 32;
constexpr int64_t kVectors = kLanes / kWide;
// Elements of x in float64, and their part of 100 rows of the basis: both stay in cache.
constexpr int64_t kChunk = 4096;
// Rows of the basis that share the loads of x.
constexpr int64_t kRows = 4;
// Elements that a loop asks for ahead of their turn, since a processor's own prefetching ends with each page of 4 KiB.
constexpr int64_t kAhead = 512;

// Asks for kLanes elements, kAhead after x, to be in the second-level cache; where there is no memory it does nothing.
template <class T>
inline void prefetch(const T* x) {
  for (int64_t k = 0; k < kLanes; k += 64 / sizeof(T)) __builtin_prefetch(x + kAhead + k, 0, 2);
}

struct Lanes {
  Wide sum[kVectors] = {};

  // The same order in every instruction set.
  double total() {
    double lane[kLanes];
    std::memcpy(lane, sum, sizeof lane);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; ++k) lane[k] += lane[k + half];
    return lane[0];
  }
};

template <class T>
double dot(const T* __restrict x, const T* __restrict y, int64_t n) {
  Lanes lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma GCC unroll 16
    for (int64_t k = 0; k < kVectors; ++k) lanes.sum[k] += load(x + i + k * kWide) * load(y + i + k * kWide);
  for (int64_t k = 0; i + k < n; ++k) lanes.sum[k / kWide][k % kWide] += double(x[i + k]) * double(y[i + k]);
  return lanes.total();
}

template <class T>
double three_term(const T* __restrict w, const T* __restrict v, T* __restrict p, double alpha, double beta, int64_t n) {
  Lanes lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(p + i);  // w and v have been read before
#pragma GCC unroll 16
    for (int64_t k = 0; k < kVectors; ++k) {
      const int64_t j = i + k * kWide;
      const Wide r = store(p + j, load(w + j) - alpha * load(v + j) - beta * load(p + j));
      lanes.sum[k] += r * r;
    }
  }
  for (int64_t k = 0; i + k < n; ++k) {
    T& r = p[i + k];
    r = T(double(w[i + k]) - alpha * double(v[i + k]) - beta * double(r));
    lanes.sum[k / kWide][k % kWide] += double(r) * double(r);
  }
  return lanes.total();
}

template <class T>
void scale(T* x, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = T(double(x[i]) * factor);
}

// Fused where the processor can: a library takes long for it.
#if BLOCKHESS_LEVEL >= 3 || defined(__FP_FAST_FMAF)
// The same without conversions: high + low is factor to twice the digits of float32, and fused they are rounded once.
// For finite x alone, inf high + inf low being NaN where low is 0 or of the other sign. Callers pass 1 / |x|_2 where
// that norm is finite, so that every x_i is, and |x_i factor| <= 1.
inline void scale(float* x, double factor, int64_t n) {
  const float high = float(factor), low = float(factor - double(high));
  if (!std::isnormal(high)) return scale<float>(x, factor, n);
  for (int64_t i = 0; i < n; ++i) x[i] = std::fma(x[i], high, x[i] * low);
}
#endif

// chunk <- chunk - sum_r c_r row_r over some rows
template <int64_t rows, class T>
void subtract_rows(double* __restrict chunk, const T* __restrict row, int64_t stride, const double* __restrict c,
                   int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t r = 0; r < rows; ++r) prefetch(row + r * stride + i);
#pragma GCC unroll 16
    for (int64_t k = 0; k < kVectors; ++k) {
      const int64_t j = i + k * kWide;
      Wide sum = c[0] * load(row + j);
#pragma GCC unroll 4
      for (int64_t r = 1; r < rows; ++r) sum += c[r] * load(row + r * stride + j);
      store(chunk + j, load(chunk + j) - sum);
    }
  }
  for (; i < n; ++i) {
    double sum = 0.0;
    for (int64_t r = 0; r < rows; ++r) sum += c[r] * double(row[r * stride + i]);
    chunk[i] -= sum;
  }
}

// d_r <- d_r + <row_r, chunk>
template <int64_t rows, class T>
void add_dots(double* __restrict d, const T* __restrict row, int64_t stride, const double* __restrict chunk,
              int64_t n) {
  Lanes lanes[rows];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t r = 0; r < rows; ++r) prefetch(row + r * stride + i);
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int64_t k = 0; k < kVectors; ++k)
        lanes[r].sum[k] += load(row + r * stride + i + k * kWide) * load(chunk + i + k * kWide);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; i + k < n; ++k)
      lanes[r].sum[k / kWide][k % kWide] += double(row[r * stride + i + k]) * chunk[i + k];
    d[r] += lanes[r].total();
  }
}

template <class T>
double gram_schmidt(T* __restrict x, const T* __restrict basis, int64_t stride, int64_t count, int64_t n,
                    const double* __restrict c, double* __restrict d) {
  double chunk[kChunk];
  if (d) std::fill_n(d, count, 0.0);
  double square = 0.0;
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
    square += dot(chunk, chunk, length);
  }
  return square;
}

}  // namespace
}  // namespace BLOCKHESS_SET
}  // namespace blockhess
