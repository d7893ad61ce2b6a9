// Vectors of float64 of one instruction set: see each_instruction_set.h.
//
// Written out, because of plain loops over float32 compilers make conversions that take twice as long, and of plain
// choices no code at all that every lane can take.

namespace blockhess {
namespace BLOCKHESS_SET {
namespace {

// Wide holds kWide elements. They are stored rounded, and come back as what they are then.
#if BLOCKHESS_LEVEL == 4
using Wide = __m512d;
BLOCKHESS_INLINE Wide load(const double* x) { return _mm512_loadu_pd(x); }
BLOCKHESS_INLINE Wide load(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
BLOCKHESS_INLINE Wide store(double* to, const Wide& x) { return _mm512_storeu_pd(to, x), x; }
BLOCKHESS_INLINE Wide store(float* to, const Wide& x) {
  const __m256 rounded = _mm512_cvtpd_ps(x);
  return _mm256_storeu_ps(to, rounded), _mm512_cvtps_pd(rounded);
}
#elif BLOCKHESS_LEVEL == 3
using Wide = __m256d;
BLOCKHESS_INLINE Wide load(const double* x) { return _mm256_loadu_pd(x); }
BLOCKHESS_INLINE Wide load(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
BLOCKHESS_INLINE Wide store(double* to, const Wide& x) { return _mm256_storeu_pd(to, x), x; }
BLOCKHESS_INLINE Wide store(float* to, const Wide& x) {
  const __m128 rounded = _mm256_cvtpd_ps(x);
  return _mm_storeu_ps(to, rounded), _mm256_cvtps_pd(rounded);
}
#else
typedef double Wide __attribute__((vector_size(16)));
template <class T>
BLOCKHESS_INLINE Wide load(const T* x) {
  return Wide{double(x[0]), double(x[1])};
}
BLOCKHESS_INLINE Wide store(double* to, const Wide& x) { return std::memcpy(to, &x, sizeof x), x; }
BLOCKHESS_INLINE Wide store(float* to, const Wide& x) {
  typedef float Narrow __attribute__((vector_size(8)));  // element by element, GCC 12 returns x as it was
  const Narrow rounded = __builtin_convertvector(x, Narrow);
  std::memcpy(to, &rounded, sizeof rounded);
  return Wide{double(rounded[0]), double(rounded[1])};
}
#endif
constexpr int64_t kWide = sizeof(Wide) / sizeof(double);

// all bits of a lane where something holds
typedef int64_t Mask __attribute__((vector_size(sizeof(Wide))));

BLOCKHESS_INLINE Wide choose(const Mask& mask, const Wide& yes, const Wide& no) { return mask ? yes : no; }
BLOCKHESS_INLINE Wide absolute(const Wide& x) { return (Wide)((Mask)x & std::numeric_limits<int64_t>::max()); }
BLOCKHESS_INLINE Wide root(const Wide& x) {
#if BLOCKHESS_LEVEL == 4
  return _mm512_sqrt_pd(x);
#elif BLOCKHESS_LEVEL == 3
  return _mm256_sqrt_pd(x);
#else
  return Wide{std::sqrt(x[0]), std::sqrt(x[1])};
#endif
}

}  // namespace
}  // namespace BLOCKHESS_SET
}  // namespace blockhess
