// Kernel launches: one CTA per work item, or fewer CTAs that loop over the work items.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops/common.h"

// Declares the dynamic shared memory of a CTA as an array.
#ifndef BLOCKHESS_DYNAMIC_SHARED
#define BLOCKHESS_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace blockhess {

// Launches kernels in order on one stream. After an error nothing more is launched; error() returns its message, or
// nullptr.
class Launcher {
 public:
  explicit Launcher(const CudaQueue& queue) : queue_(queue) {}

  // Launches kernel(args...) on `count` CTAs, at most max_grid, of `threads` threads with `shared` bytes of dynamic
  // shared memory.
  template <class... Parameters, class... Args>
  void operator()(void (*kernel)(Parameters...), int64_t count, int threads, size_t shared, const Args&... args) {
    if (error_ != nullptr || count == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min(count, queue_.max_grid)));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(queue_.stream);
    check(cudaLaunchKernelEx(&config, kernel, args...));
  }

  // Returns an attribute of the current device, 1 after an error.
  int attribute(cudaDeviceAttr name) {
    int device = 0, value = 1;
    check(cudaGetDevice(&device));
    if (error_ == nullptr) check(cudaDeviceGetAttribute(&value, name, device));
    return value;
  }

  void check(cudaError_t status) {
    if (status == cudaSuccess || error_ != nullptr) return;
    const bool other_architecture =
        status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion;
    error_ = other_architecture ? "no kernel was compiled for this device; rebuild with TORCH_CUDA_ARCH_LIST=native"
                                : cudaGetErrorString(status);
    cudaGetLastError();  // resets the error, so that no later call reports it
  }

  const char* error() const { return error_; }

 private:
  CudaQueue queue_;
  const char* error_ = nullptr;
};

}  // namespace blockhess
