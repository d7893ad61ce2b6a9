// tridiag_quadrature on CUDA: one thread per problem, up to 8, 16 or 32 problems per CTA of one warp.
//
// The arrays d, e, q of a CTA's problems are interleaved by problem in shared memory, so that threads at different rows
// cause no bank conflicts. If they do not fit, nodes, couplings and weights are used instead. A problem is first scaled
// by a power of two so that its largest entry is in [0.5, 1): no square overflows, and one below kTiny is negligible.
#include <cstdlib>

#include "launch.cuh"
#include "ops/tridiag_quadrature.h"

namespace blockhess {
namespace {

constexpr int kWarp = 32;
constexpr double kTiny = 1e-290;
constexpr double kEps = 2.220446049250313e-16;

// Element i of one problem's array. In shared memory the address is computed from the CTA's array, so that the compiler
// knows the address space.
template <bool kShared>
struct Column {
  double* first;
  int offset, stride;
  __device__ double& operator[](int i) const {
    if constexpr (kShared) {
      BLOCKHESS_DYNAMIC_SHARED(double, shared);
      return shared[offset + i * stride];
    } else {
      return first[i];
    }
  }
};

template <bool kShared>
struct Work {
  Column<kShared> d, e, q;
};

// The arrays of problem b + p, the p-th of the `problems` of a CTA.
template <bool kShared>
__device__ Work<kShared> work_of(const TridiagQuadrature& op, int problems, int64_t b, int p) {
  if constexpr (kShared) {
    const int array = int(op.m) * problems;
    return {{nullptr, p, problems}, {nullptr, array + p, problems}, {nullptr, 2 * array + p, problems}};
  } else {
    const int64_t at = (b + p) * op.m;
    return {{op.nodes + at, 0, 1}, {op.couplings + at, 0, 1}, {op.weights + at, 0, 1}};
  }
}

// Largest |entry| of tridiag(e, d, e), or NaN if an entry is not finite.
template <bool kShared>
__device__ double largest(const Work<kShared>& x, int n) {
  double most = 0.0;
  for (int i = 0; i < n; ++i) {
    const double d = std::fabs(x.d[i]), e = i + 1 < n ? std::fabs(x.e[i]) : 0.0;
    if (!std::isfinite(d) || !std::isfinite(e)) return std::nan("");
    most = std::fmax(most, std::fmax(d, e));
  }
  return most;
}

// Diagonalizes tridiag(e, d, e) of size n, with entries at most 1 in absolute value: d becomes the eigenvalues,
// unsorted, and q, the first row of the identity, the first row of the matrix of eigenvectors. e[i] couples rows i and
// i + 1; e[n - 1] is scratch. Returns false if an eigenvalue does not converge.
template <bool kShared>
__device__ bool implicit_ql(const Work<kShared>& x, int n) {
  const Column<kShared> d = x.d, e = x.e, q = x.q;
  e[n - 1] = 0.0;
  for (int l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      int m = l;  // row of the first coupling from l on that is negligible relative to its diagonal entries
      for (double here = std::fabs(d[l]); m < n - 1; ++m) {
        const double next = std::fabs(d[m + 1]), coupling = std::fabs(e[m]);
        if (coupling <= kEps * (here + next) || coupling * coupling <= kTiny) break;
        here = next;
      }
      if (m == l) break;
      if (sweep == kMaxSweeps) return false;
      double g = (d[l + 1] - d[l]) / (2.0 * e[l]);
      g = d[m] - d[l] + e[l] / (g + std::copysign(std::sqrt(g * g + 1.0), g));
      double s = 1.0, c = 1.0, p = 0.0, d_next = d[m], q_next = q[m];
      int i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        const double square = f * f + g * g;
        if (square <= kTiny) break;  // the matrix splits here
        const double inverse = rsqrt(square), d_i = d[i], q_i = q[i];
        e[i + 1] = square * inverse;
        s = f * inverse;
        c = g * inverse;
        g = d_next - p;
        const double t = (d_i - g) * s + 2.0 * c * b;
        p = s * t;
        d[i + 1] = g + p;
        g = c * t - b;
        q[i + 1] = s * q_i + c * q_next;
        q_next = c * q_i - s * q_next;
        d_next = d_i;
      }
      d[i + 1] = d_next - p;
      q[i + 1] = q_next;
      e[i + 1] = i >= l ? 0.0 : g;
      e[m] = 0.0;
    }
  }
  return true;
}

// Sorts d in ascending order, stably, and permutes q with it.
template <bool kShared>
__device__ void insertion_sort(const Column<kShared>& d, const Column<kShared>& q, int n) {
  for (int i = 1; i < n; ++i) {
    const double d_i = d[i], q_i = q[i];
    int k = i;
    for (; k > 0 && d[k - 1] > d_i; --k) {
      d[k] = d[k - 1];
      q[k] = q[k - 1];
    }
    d[k] = d_i;
    q[k] = q_i;
  }
}

// Overwrites d by the n nodes and q by their weights. Returns false if the problem fails.
template <bool kShared>
__device__ bool solve(const Work<kShared>& x, int n) {
  const double most = largest(x, n);
  if (std::isnan(most)) return false;
  int exponent = 0;
  if (most > 0.0) std::frexp(most, &exponent);
  for (int i = 0; i < n; ++i) {
    x.d[i] = std::ldexp(x.d[i], -exponent);
    if (i + 1 < n) x.e[i] = std::ldexp(x.e[i], -exponent);
    x.q[i] = i == 0 ? 1.0 : 0.0;
  }
  if (!implicit_ql(x, n)) return false;
  insertion_sort(x.d, x.q, n);
  for (int i = 0; i < n; ++i) {
    x.d[i] = std::ldexp(x.d[i], exponent);
    x.q[i] *= x.q[i];
  }
  return true;
}

template <bool kShared>
__global__ void __launch_bounds__(kWarp) quadrature_kernel(TridiagQuadrature op, int problems) {
  const int lane = threadIdx.x;
  for (int64_t b = int64_t(blockIdx.x) * problems; b < op.n_problems; b += int64_t(gridDim.x) * problems) {
    const int here = op.n_problems - b < problems ? int(op.n_problems - b) : problems;
    for (int p = 0; p < here; ++p) {
      const Work<kShared> x = work_of<kShared>(op, problems, b, p);
      const int64_t row = (b + p) * op.m;
      for (int i = lane; i < op.m; i += kWarp) {
        x.d[i] = op.alpha[row + i];
        x.e[i] = op.beta[row + i];
      }
    }
    __syncthreads();
    if (lane < here) {
      const Work<kShared> x = work_of<kShared>(op, problems, b, lane);
      const int64_t steps = op.steps[b + lane];
      const bool valid = steps >= 0 && steps <= op.m;
      const int n = valid ? int(steps) : 0;
      const bool solved = valid && (n == 0 || solve(x, n));
      const double padding = !solved ? std::nan("") : n == 0 ? 0.0 : x.d[n - 1];
      for (int i = solved ? n : 0; i < op.m; ++i) {
        x.d[i] = padding;
        x.q[i] = solved ? 0.0 : padding;
      }
    }
    __syncthreads();
    for (int p = 0; p < here && kShared; ++p) {
      const Work<kShared> x = work_of<kShared>(op, problems, b, p);
      const int64_t row = (b + p) * op.m;
      for (int i = lane; i < op.m; i += kWarp) {
        op.nodes[row + i] = x.d[i];
        op.weights[row + i] = x.q[i];
      }
    }
    __syncthreads();
  }
}

// Number of problems per CTA if they fit in shared memory: with 16, 10,000 problems give enough CTAs to fill the
// device. BLOCKHESS_QUADRATURE_LANES, read at every call, selects 8 or 32 for measurements.
int most_problems() {
  const char* text = std::getenv("BLOCKHESS_QUADRATURE_LANES");
  const int lanes = text == nullptr ? 0 : std::atoi(text);
  return lanes == 8 || lanes == 32 ? lanes : 16;
}

}  // namespace

const char* tridiag_quadrature_cuda(const TridiagQuadrature& op, const CudaQueue& queue) {
  Launcher launch(queue);
  const int most_shared = launch.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t each = 3 * int64_t(sizeof(double)) * op.m;
  const int most = most_problems();
  int problems = most;
  while (problems > 1 && problems * each > most_shared) problems /= 2;
  const auto ctas = [&] { return (op.n_problems + problems - 1) / problems; };
  if (problems * each <= most_shared) {
    // Always the same value, so that threads which launch it at once do not change it for each other.
    const auto kernel = quadrature_kernel<true>;
    launch.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared));
    launch(kernel, ctas(), kWarp, size_t(problems * each), op, problems);
  } else {
    problems = most;
    launch(quadrature_kernel<false>, ctas(), kWarp, 0, op, problems);
  }
  return launch.error();
}

}  // namespace blockhess
