// The CUDA implementations of the tensor ops, on the device of the first tensor and PyTorch's current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace blockhess {
namespace {

class Cuda {
 public:
  Cuda(const char* op, const Tensor& first) : op_(op), guard_(first.get_device()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device(), &queue_.stream));
  }

  template <class T>
  void run(const LanczosStep<T>& op) const {
    check(lanczos_step_cuda(op, queue_));
  }
  template <class T>
  void run(const Reorthogonalize<T>& op) const {
    check(reorthogonalize_cuda(op, queue_));
  }
  template <class T>
  void run(const RandomProbes<T>& op) const {
    check(random_probes_cuda(op, queue_));
  }
  template <class T>
  void run(const LinearCombination<T>& op) const {
    check(linear_combination_cuda(op, queue_));
  }
  void run(const GaussianDensity& op) const { check(gaussian_density_cuda(op, queue_)); }
  void run(const TridiagQuadrature& op) const { check(tridiag_quadrature_cuda(op, queue_)); }

 private:
  void check(const char* error) const {
    // Also an error of earlier work, which a launch reports.
    STD_TORCH_CHECK(error == nullptr, op_, ": the CUDA device must run the kernels, got: ", error);
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  CudaQueue queue_{};
};

}  // namespace
}  // namespace blockhess

STABLE_TORCH_LIBRARY_IMPL(blockhess_ext, CUDA, m) {
  m.impl("lanczos_step", TORCH_BOX(&blockhess::lanczos_step<blockhess::Cuda>));
  m.impl("reorthogonalize", TORCH_BOX(&blockhess::reorthogonalize<blockhess::Cuda>));
  m.impl("tridiag_quadrature", TORCH_BOX(&blockhess::tridiag_quadrature<blockhess::Cuda>));
  m.impl("gaussian_density", TORCH_BOX(&blockhess::gaussian_density<blockhess::Cuda>));
  m.impl("random_probes", TORCH_BOX(&blockhess::random_probes<blockhess::Cuda>));
  m.impl("linear_combination", TORCH_BOX(&blockhess::linear_combination<blockhess::Cuda>));
  m.impl("linear_combination_sum", TORCH_BOX(&blockhess::linear_combination_sum<blockhess::Cuda>));
}
