// The inner loop of gaussian_density, compiled per instruction set (see simd_dispatch.h).
//
//   exp(-x^2 / 2) = 2^y = 2^k 2^r,   y = -x^2 / (2 ln 2),   k = round(y),   |r| <= 1/2,   2^r by its Taylor series
//
// Relative to the peak, rounding y contributes an error of at most 2^-53, since |y| 2^y < 1, and truncating the series
// one of the same size.

namespace blockhess {
namespace BLOCKHESS_NAMESPACE {
namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr int kDegree = 12;  // (ln 2 / 2)^13 / 13! = 1.7e-16

constexpr double coefficient(int k) { return k == 0 ? 1.0 : coefficient(k - 1) * kLn2 / k; }

// Horner's scheme for sum_k c_k r^k, c_k = (ln 2)^k / k!, from term k on.
template <int k = 0>
BLOCKHESS_INLINE double series(double r) {
  constexpr double c = coefficient(k);
  if constexpr (k == kDegree)
    return c;
  else
    return c + r * series<k + 1>(r);
}

// 2^y for -1000 <= y <= 0. The sum y + kRound holds k = round(y) in its low bits, which are added to the exponent of
// 2^r.
BLOCKHESS_INLINE double exp2_negative(double y) {
  constexpr double kRound = 0x1.8p52;
  const double sum = y + kRound;
  double power = series(y - (sum - kRound));
  uint64_t bits, exponent;
  std::memcpy(&bits, &power, 8);
  std::memcpy(&exponent, &sum, 8);
  bits += exponent << 52;
  std::memcpy(&power, &bits, 8);
  return power;
}

// density[i] += height exp(-(grid[i] - node)^2 / (2 sigma^2))
inline void add_gaussian(double* __restrict density, const double* __restrict grid, int64_t n, double node,
                         double height, double sigma) {
  const double inverse = 1.0 / sigma;
  for (int64_t i = 0; i < n; ++i) {
    const double x = (grid[i] - node) * inverse;
    density[i] += height * exp2_negative(x * x * (-0.5 / kLn2));
  }
}

}  // namespace
}  // namespace BLOCKHESS_NAMESPACE
}  // namespace blockhess
