// Simd: a vector of kWidth float64 values, compiled per instruction set (see simd_dispatch.h).
//
// Intrinsics are used because GCC vectorizes a plain loop over float32 with conversions to float64 that take twice the
// time, and does not vectorize conditional assignments.

namespace blockhess {
namespace BLOCKHESS_NAMESPACE {
namespace {

// load(x) reads kWidth elements and converts them to float64. store(to, x) rounds x to the element type, writes it and
// returns the rounded values.
#if BLOCKHESS_LEVEL == 4
using Simd = __m512d;
BLOCKHESS_INLINE Simd load(const double* x) { return _mm512_loadu_pd(x); }
BLOCKHESS_INLINE Simd load(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
BLOCKHESS_INLINE Simd store(double* to, const Simd& x) { return _mm512_storeu_pd(to, x), x; }
BLOCKHESS_INLINE Simd store(float* to, const Simd& x) {
  const __m256 rounded = _mm512_cvtpd_ps(x);
  return _mm256_storeu_ps(to, rounded), _mm512_cvtps_pd(rounded);
}
#elif BLOCKHESS_LEVEL == 3
using Simd = __m256d;
BLOCKHESS_INLINE Simd load(const double* x) { return _mm256_loadu_pd(x); }
BLOCKHESS_INLINE Simd load(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
BLOCKHESS_INLINE Simd store(double* to, const Simd& x) { return _mm256_storeu_pd(to, x), x; }
BLOCKHESS_INLINE Simd store(float* to, const Simd& x) {
  const __m128 rounded = _mm256_cvtpd_ps(x);
  return _mm_storeu_ps(to, rounded), _mm256_cvtps_pd(rounded);
}
#else
typedef double Simd __attribute__((vector_size(16)));
template <class T>
BLOCKHESS_INLINE Simd load(const T* x) {
  return Simd{double(x[0]), double(x[1])};
}
BLOCKHESS_INLINE Simd store(double* to, const Simd& x) { return std::memcpy(to, &x, sizeof x), x; }
BLOCKHESS_INLINE Simd store(float* to, const Simd& x) {
  typedef float Narrow __attribute__((vector_size(8)));  // with scalar casts GCC 12 returns x unrounded
  const Narrow rounded = __builtin_convertvector(x, Narrow);
  std::memcpy(to, &rounded, sizeof rounded);
  return Simd{double(rounded[0]), double(rounded[1])};
}
#endif
constexpr int64_t kWidth = sizeof(Simd) / sizeof(double);

// The result of a comparison: all bits of a lane are set if it is true, none otherwise.
typedef int64_t Mask __attribute__((vector_size(sizeof(Simd))));

BLOCKHESS_INLINE Simd choose(const Mask& mask, const Simd& yes, const Simd& no) { return mask ? yes : no; }
BLOCKHESS_INLINE Simd absolute(const Simd& x) { return (Simd)((Mask)x & std::numeric_limits<int64_t>::max()); }
BLOCKHESS_INLINE Simd root(const Simd& x) {
#if BLOCKHESS_LEVEL == 4
  return _mm512_sqrt_pd(x);
#elif BLOCKHESS_LEVEL == 3
  return _mm256_sqrt_pd(x);
#else
  return Simd{std::sqrt(x[0]), std::sqrt(x[1])};
#endif
}

}  // namespace
}  // namespace BLOCKHESS_NAMESPACE
}  // namespace blockhess
