// Tensor arguments, checked and converted to the plain arrays of csrc/ops. The checks guard memory accesses; the Python
// functions check the user's arguments before.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

#include "ops/common.h"

namespace blockhess {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const int64_t* sizes, size_t n) {
  std::string text = "(";
  for (size_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (n == 1 ? ",)" : ")");
}

template <class T>
constexpr ScalarType scalar_type_of();
template <>
constexpr ScalarType scalar_type_of<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type_of<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType scalar_type_of<int64_t>() {
  return ScalarType::Long;
}
template <>
constexpr ScalarType scalar_type_of<int32_t>() {
  return ScalarType::Int;
}

// The arguments of one call of op. Every tensor must be contiguous, have the expected dtype and shape, and be on the
// device of the first one.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& first) : op_(op), device_(first.device()) {}

  template <class T>
  T* array(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) const {
    STD_TORCH_CHECK(tensor.scalar_type() == scalar_type_of<T>(), op_, ": ", name, " must be ",
                    torch::headeronly::toString(scalar_type_of<T>()), ", got ",
                    torch::headeronly::toString(tensor.scalar_type()));
    STD_TORCH_CHECK(tensor.device() == device_, op_, ": ", name, " must be on the device of the first argument");
    STD_TORCH_CHECK(tensor.is_contiguous(), op_, ": ", name, " must be contiguous");
    const auto sizes = tensor.sizes();
    bool equal = sizes.size() == shape.size();
    for (size_t i = 0; equal && i < shape.size(); ++i) equal = sizes[i] == shape.begin()[i];
    STD_TORCH_CHECK(equal, op_, ": ", name, " must have shape ", shape_text(shape.begin(), shape.size()), ", got ",
                    shape_text(sizes.data(), sizes.size()));
    return static_cast<T*>(tensor.data_ptr());
  }

  int64_t size(const char* name, const Tensor& tensor, int64_t dim, int64_t dims) const {
    STD_TORCH_CHECK(tensor.dim() == dims, op_, ": ", name, " must have ", dims, " dimensions, got ", tensor.dim());
    return tensor.size(dim);
  }

  // Shapes: state (n_probes, n), offsets (n_blocks + 1), tiles (n_tiles, 3), tile_offsets (n_blocks + 1).
  Layout layout(const Tensor& state, const Tensor& offsets, const Tensor& tiles, const Tensor& tile_offsets) const {
    const int64_t n_blocks = size("offsets", offsets, 0, 1) - 1, n_tiles = size("tiles", tiles, 0, 2);
    return {size("state", state, 0, 2),
            n_blocks,
            size("state", state, 1, 2),
            n_tiles,
            array<int64_t>("offsets", offsets, {n_blocks + 1}),
            reinterpret_cast<const Tile*>(array<int64_t>("tiles", tiles, {n_tiles, 3})),
            array<int64_t>("tile_offsets", tile_offsets, {n_blocks + 1})};
  }

  Recurrences recurrences(const Layout& layout, const Tensor& alpha, const Tensor& beta, const Tensor& norm,
                          const Tensor& steps, const Tensor& status) const {
    const int64_t rows = size("alpha", alpha, 0, 3);
    const std::initializer_list<int64_t> table{rows, layout.n_probes, layout.n_blocks};
    const std::initializer_list<int64_t> shape{layout.n_probes, layout.n_blocks};
    return {rows,
            layout.n_probes * layout.n_blocks,
            array<double>("alpha", alpha, table),
            array<double>("beta", beta, table),
            array<double>("norm", norm, shape),
            array<int64_t>("steps", steps, shape),
            array<int32_t>("status", status, shape)};
  }

 private:
  const char* op_;
  torch::stable::Device device_;
};

// Calls f(T()), where T is the element type of the vectors.
template <class F>
void dispatch_vectors(const char* op, const Tensor& vectors, const F& f) {
  if (vectors.scalar_type() == ScalarType::Float)
    f(float());
  else if (vectors.scalar_type() == ScalarType::Double)
    f(double());
  else
    STD_TORCH_CHECK(false, op, ": vectors must be float32 or float64, got ",
                    torch::headeronly::toString(vectors.scalar_type()));
}

}  // namespace blockhess
