// A kernel with one of several mistakes, each of which the tests must detect; mistake = -1 is the correct kernel.
#include "launch.cuh"

namespace {

enum Mistake {
  kNone = -1,
  kReadBeyond,
  kWriteBeyond,
  kEarlyReturn,
  kTwoBarriers,
  kMissingBarrier,
  kMissingLane,
  kUnset,
  kEarlyReuse
};

// out[i] = in[0] + ... + in[n - 1] for every thread i of n
__global__ void sum_kernel(const double* in, double* out, int n, int mistake) {
  __shared__ double values[64];
  const int i = threadIdx.x;
  if (mistake == kEarlyReturn && i == 5) return;
  if (!(mistake == kUnset && i == 3)) values[i] = in[mistake == kReadBeyond && i == n - 1 ? n : i];
  if (mistake == kTwoBarriers && i < 32) {
    __syncthreads();
  } else if (mistake != kMissingBarrier) {
    __syncthreads();
  }
  double sum = 0.0;
  for (int k = 0; k < n; ++k) sum += values[k];
  if (!(mistake == kMissingLane && i == 7)) __syncwarp();
  if (mistake != kEarlyReuse) __syncthreads();
  values[i] = 0.0;
  out[mistake == kWriteBeyond && i == n - 1 ? n : i] = sum;
}

}  // namespace

extern "C" const char* run_broken(int, const int64_t* sizes, void** arrays, int64_t max_grid) {
  blockhess::Launcher launch({nullptr, max_grid});
  launch(sum_kernel, 1, int(sizes[0]), 0, static_cast<const double*>(arrays[0]), static_cast<double*>(arrays[1]),
         int(sizes[0]), int(sizes[1]));
  return launch.error();
}
