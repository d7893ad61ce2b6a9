// The arguments of linear_combination, checked and converted to its plain structure.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "arguments.h"
#include "ops/linear_combination.h"

namespace blockhess {

// Checks of the tensors of one list against out. The names of an element are built only for an error.
class Operand {
 public:
  Operand(const char* op, const char* list, size_t index, const Tensor& tensor)
      : op_(op), list_(list), index_(index), tensor_(tensor), sizes_(tensor.sizes()) {}

  // Dtype and device, compared as numbers, since these checks are made for every tensor of every call.
  void check_like(const Tensor& out) const {
    int32_t dtype[2], type[2], device[2];
    const Tensor* tensors[] = {&tensor_, &out};
    for (int i = 0; i < 2; ++i) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensors[i]->get(), &dtype[i]));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensors[i]->get(), &type[i]));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensors[i]->get(), &device[i]));
    }
    STD_TORCH_CHECK(dtype[0] == dtype[1], op_, ": ", name(), " must be ",
                    torch::headeronly::toString(out.scalar_type()), ", got ",
                    torch::headeronly::toString(tensor_.scalar_type()));
    STD_TORCH_CHECK(type[0] == type[1] && device[0] == device[1], op_, ": ", name(), " must be on the device of out");
  }

  void check_dims(int64_t dims) const {
    STD_TORCH_CHECK(int64_t(sizes_.size()) == dims, op_, ": ", name(), " must have ", dims, " dimensions, got ",
                    sizes_.size());
  }

  // Strides of the last n_dims dimensions, 0 where a size of 1 is broadcast.
  void broadcast(const int64_t* sizes, int n_dims, int64_t* strides) const {
    const auto all_strides = tensor_.strides();
    const int skip = int(sizes_.size()) - n_dims;
    for (int d = 0; d < n_dims; ++d) {
      const int64_t size = sizes_[skip + d];
      STD_TORCH_CHECK(size == sizes[d] || size == 1, op_, ": ", name(), " must broadcast to ",
                      skip ? "rows of shape " : "", shape_text(sizes, n_dims), ", got ",
                      shape_text(sizes_.data(), sizes_.size()));
      strides[d] = size == 1 ? 0 : all_strides[skip + d];
    }
  }

  int64_t last_size() const { return sizes_[sizes_.size() - 1]; }

 private:
  std::string name() const { return std::string(list_) + "[" + std::to_string(index_) + "]"; }

  const char *op_, *list_;
  size_t index_;
  const Tensor& tensor_;
  decltype(tensor_.sizes()) sizes_;
};

// Shapes: out (R, *shape); with sum (R, *shape[:-1], 1). A base has its own number of rows, a coefficient none.
template <class T>
LinearCombination<T> combination(const char* name, bool sum, const Tensor& out, const std::vector<Tensor>& bases,
                                 const std::vector<std::optional<Tensor>>& coefficients,
                                 const std::vector<double>& scalars, const std::vector<int64_t>& first_rows) {
  const size_t n_terms = bases.size();
  STD_TORCH_CHECK(n_terms >= 1 && n_terms <= kMaxTerms, name, ": bases must have 1 ... ", kMaxTerms, " tensors, got ",
                  n_terms);
  STD_TORCH_CHECK(coefficients.size() == n_terms && scalars.size() == n_terms && first_rows.size() == n_terms, name,
                  ": coefficients, scalars and first_rows must have the length of bases = ", n_terms, ", got ",
                  coefficients.size(), ", ", scalars.size(), " and ", first_rows.size());
  const auto sizes = out.sizes(), strides = out.strides();
  const int dims = int(sizes.size());
  STD_TORCH_CHECK(dims >= 1 + sum && dims <= kMaxDims + 1, name, ": out must have ", 1 + sum, " ... ", kMaxDims + 1,
                  " dimensions, got ", dims);
  LinearCombination<T> op;
  op.sum = sum;
  op.n_terms = 0;
  op.n_dims = dims - 1;
  op.n_rows = sizes[0];
  op.row_stride = strides[0];
  op.out = static_cast<T*>(out.data_ptr());
  for (int d = 0; d < dims; ++d)
    STD_TORCH_CHECK(sizes[d] <= 1 || strides[d] != 0, name, ": out must not be expanded, got stride 0 in dimension ",
                    d);
  for (int d = 0; d < op.n_dims; ++d) {
    op.sizes[d] = sizes[d + 1];
    op.strides[d] = op.sizes[d] == 1 ? 0 : strides[d + 1];
  }
  for (size_t k = 0; k < n_terms; ++k) {
    const Operand base(name, "bases", k, bases[k]);
    base.check_like(out);
    base.check_dims(dims);
    if (sum && base.last_size() != 1) op.sizes[dims - 2] = base.last_size();
    if (!coefficients[k]) continue;
    const Operand coefficient(name, "coefficients", k, *coefficients[k]);
    coefficient.check_like(out);
    coefficient.check_dims(dims - 1);
    if (sum && coefficient.last_size() != 1) op.sizes[dims - 2] = coefficient.last_size();
  }
  STD_TORCH_CHECK(!sum || sizes[dims - 1] == 1, name, ": out must have 1 as its last size, got ", sizes[dims - 1]);
  for (size_t k = 0; k < n_terms; ++k) {
    const int64_t rows = bases[k].size(0), first = first_rows[k];
    Term<T>& term = op.terms[op.n_terms];
    Operand(name, "bases", k, bases[k]).broadcast(op.sizes, op.n_dims, term.strides);
    term.coefficient = nullptr;
    if (coefficients[k]) {
      Operand(name, "coefficients", k, *coefficients[k]).broadcast(op.sizes, op.n_dims, term.coefficient_strides);
      term.coefficient = static_cast<const T*>(coefficients[k]->data_ptr());
    }
    if (first >= op.n_rows || first <= -rows || (sum && op.sizes[dims - 2] == 0)) continue;
    term.first_row = std::max<int64_t>(0, first);
    term.end_row = std::min(op.n_rows, first + rows);
    term.row_stride = bases[k].stride(0);
    term.base = static_cast<const T*>(bases[k].data_ptr()) + (term.first_row - first) * term.row_stride;
    term.scalar = T(scalars[k]);
    ++op.n_terms;
  }
  if (op.n_dims == 0) {  // a row is one number
    op.n_dims = 1;
    op.sizes[0] = 1;
    op.strides[0] = 0;
    for (int k = 0; k < op.n_terms; ++k) op.terms[k].strides[0] = op.terms[k].coefficient_strides[0] = 0;
  }
  merge_dimensions(op);
  return op;
}

}  // namespace blockhess
