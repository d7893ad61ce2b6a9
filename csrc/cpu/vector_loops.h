// The loops of vector_kernels.h, compiled per instruction set (see simd_dispatch.h).
#include "simd.h"

namespace blockhess {
namespace BLOCKHESS_NAMESPACE {
namespace {

// Independent partial sums, enough to hide the latency of additions at every vector width.
constexpr int64_t kLanes = 32;
constexpr int64_t kVectors = kLanes / kWidth;
// Elements per chunk: as float64 they stay in cache together with the same columns of 100 basis rows.
constexpr int64_t kChunk = 4096;
// Basis rows per pass over a chunk.
constexpr int64_t kRows = 4;
// Prefetch distance in elements; hardware prefetching stops at the end of each 4 KiB page.
constexpr int64_t kAhead = 512;

// Prefetches the kLanes elements at x + kAhead to the second-level cache; addresses past the array are harmless.
template <class T>
inline void prefetch(const T* x) {
  for (int64_t k = 0; k < kLanes; k += 64 / sizeof(T)) __builtin_prefetch(x + kAhead + k, 0, 2);
}

struct Lanes {
  Simd sum[kVectors] = {};

  // The sum of all lanes, in the same order for every instruction set.
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
    for (int64_t k = 0; k < kVectors; ++k) lanes.sum[k] += load(x + i + k * kWidth) * load(y + i + k * kWidth);
  for (int64_t k = 0; i + k < n; ++k) lanes.sum[k / kWidth][k % kWidth] += double(x[i + k]) * double(y[i + k]);
  return lanes.total();
}

template <class T>
double three_term(const T* __restrict w, const T* __restrict v, T* __restrict p, double alpha, double beta, int64_t n) {
  Lanes lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(p + i);  // w and v are in cache since the dot
#pragma GCC unroll 16
    for (int64_t k = 0; k < kVectors; ++k) {
      const int64_t j = i + k * kWidth;
      const Simd r = store(p + j, load(w + j) - alpha * load(v + j) - beta * load(p + j));
      lanes.sum[k] += r * r;
    }
  }
  for (int64_t k = 0; i + k < n; ++k) {
    T& r = p[i + k];
    r = T(double(w[i + k]) - alpha * double(v[i + k]) - beta * double(r));
    lanes.sum[k / kWidth][k % kWidth] += double(r) * double(r);
  }
  return lanes.total();
}

template <class T>
void scale(T* x, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = T(double(x[i]) * factor);
}

// Only if fma is an instruction: the library function is slow.
#if BLOCKHESS_LEVEL >= 3 || defined(__FP_FAST_FMAF)
// The same without conversions to float64: factor = high + low to twice the precision of float32, and x_i factor =
// fma(x_i, high, x_i low). All x_i must be finite, since inf high + inf low is NaN if low is 0 or has the other sign.
// Callers pass factor = 1 / |x|_2 with a finite norm, so every x_i is finite and |x_i factor| <= 1.
inline void scale(float* x, double factor, int64_t n) {
  const float high = float(factor), low = float(factor - double(high));
  if (!std::isnormal(high)) return scale<float>(x, factor, n);
  for (int64_t i = 0; i < n; ++i) x[i] = std::fma(x[i], high, x[i] * low);
}
#endif

// chunk <- chunk - sum_r c_r row_r
template <int64_t rows, class T>
void subtract_rows(double* __restrict chunk, const T* __restrict row, int64_t stride, const double* __restrict c,
                   int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t r = 0; r < rows; ++r) prefetch(row + r * stride + i);
#pragma GCC unroll 16
    for (int64_t k = 0; k < kVectors; ++k) {
      const int64_t j = i + k * kWidth;
      Simd sum = c[0] * load(row + j);
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
        lanes[r].sum[k] += load(row + r * stride + i + k * kWidth) * load(chunk + i + k * kWidth);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; i + k < n; ++k)
      lanes[r].sum[k / kWidth][k % kWidth] += double(row[r * stride + i + k]) * chunk[i + k];
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
}  // namespace BLOCKHESS_NAMESPACE
}  // namespace blockhess
