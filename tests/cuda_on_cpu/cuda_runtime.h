// A stand-in for the CUDA runtime with which g++ compiles csrc/cuda for the CPU: the threads of a CTA are fibers.
//
// A fiber runs until it waits, at __syncthreads for the block or at a warp operation for the lanes of its mask. If
// threads wait at different places, or for one that has returned, the launch fails with a message that names threads
// and places. Shared memory is filled with NaN before every CTA. The order in which fibers and CTAs run is an option: a
// result that depends on it reveals a missing barrier.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))
#define BLOCKHESS_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cuda_on_cpu::dynamic_shared())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned count) : x(count) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_cpu {

// kForward and kReverse run a warp until it waits at a block barrier before the next one runs; kShuffled interleaves
// the threads of all warps in random order.
enum class Order { kForward, kReverse, kShuffled };

struct Options {
  Order order = Order::kForward;
  int max_shared = 232448;  // bytes of dynamic shared memory that a CTA may request, as on an H100
};
extern Options options;

// A place in the code where threads wait.
struct Site {
  const char* file;
  int line;
};

void* dynamic_shared();
void wait_for_block(Site site);
// Waits for the lanes of `mask`; element l of the result is the `value` of lane l.
const uint64_t* exchange(unsigned mask, uint64_t value, Site site);
void fail(const std::string& text);
cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
cudaError_t allow_shared(const void* kernel, int bytes);

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_HERE) { cuda_on_cpu::wait_for_block({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_HERE) { cuda_on_cpu::exchange(mask, 0, {file, line}); }

inline unsigned __ballot_sync(unsigned mask, bool predicate, CUDA_ON_CPU_HERE) {
  const uint64_t* lanes = cuda_on_cpu::exchange(mask, predicate, {file, line});
  unsigned ballot = 0;
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1u && lanes[l]) ballot |= 1u << l;
  return ballot;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, CUDA_ON_CPU_HERE) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one word at most");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const uint64_t* lanes = cuda_on_cpu::exchange(mask, word, {file, line});
  const unsigned source = threadIdx.x % 32 + distance;
  if (source >= 32) return value;
  if (!(mask >> source & 1u)) cuda_on_cpu::fail("a shuffle reads a lane outside its mask");
  std::memcpy(&value, &lanes[source], sizeof(T));
  return value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

const char* cudaGetErrorString(cudaError_t status);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  return *value = name == cudaDevAttrMultiProcessorCount ? 2 : cuda_on_cpu::options.max_shared, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Args&... args) {
  return cuda_on_cpu::run_grid(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(args...); });
}
