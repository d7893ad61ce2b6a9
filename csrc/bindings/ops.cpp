// The tensor ops: their schemas, and the CPU implementations on PyTorch's thread pool.
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace blockhess {
namespace {

void torch_parallel_for(int64_t count, int64_t grain, const RangeBody& body) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, body);
}

class Cpu {
 public:
  Cpu(const char* op, const Tensor&) : op_(op) {}

  template <class T>
  void run(const LanczosStep<T>& op) const {
    check(op.layout);
    lanczos_step_cpu(op, torch_parallel_for);
  }
  template <class T>
  void run(const Reorthogonalize<T>& op) const {
    check(op.layout);
    for (int64_t l = 0; l < op.layout.n_blocks; ++l)
      STD_TORCH_CHECK(op.basis_offsets[l] <= op.n_basis - (op.layout.offsets[l + 1] - op.layout.offsets[l]) ||
                          op.basis_offsets[l] < 0,
                      op_, ": basis_offsets must fit the ", op.n_basis, " columns of basis, got ", op.basis_offsets[l],
                      " for block ", l);
    reorthogonalize_cpu(op, torch_parallel_for);
  }
  template <class T>
  void run(const RandomProbes<T>& op) const {
    check(op.layout);
    random_probes_cpu(op, torch_parallel_for);
  }
  template <class T>
  void run(const LinearCombination<T>& op) const {
    linear_combination_cpu(op, torch_parallel_for);
  }
  void run(const GaussianDensity& op) const { gaussian_density_cpu(op, torch_parallel_for); }
  void run(const TridiagQuadrature& op) const {
    for (int64_t b = 0; b < op.n_problems; ++b)
      STD_TORCH_CHECK(op.steps[b] >= 0 && op.steps[b] <= op.m, "tridiag_quadrature: steps must be in 0 ... ", op.m,
                      ", got ", op.steps[b], " in problem ", b);
    const int64_t failed = tridiag_quadrature_cpu(op, torch_parallel_for);
    STD_TORCH_CHECK(failed < 0, "tridiag_quadrature: alpha and beta must be finite and converge, problem ", failed,
                    " does not");
  }

 private:
  // The kernels follow the tables: block l has the tiles tile_offsets[l] : tile_offsets[l + 1], which cover the columns
  // offsets[l] : offsets[l + 1] one after the other.
  void check(const Layout& layout) const {
    int64_t tile = 0, column = 0;
    for (int64_t l = 0; l <= layout.n_blocks; ++l) {
      const bool ends = layout.offsets[l] == column && layout.tile_offsets[l] == tile;
      const int64_t end = l < layout.n_blocks ? layout.tile_offsets[l + 1] : layout.n_tiles;
      bool sound = ends && tile <= end && end <= layout.n_tiles;
      for (; sound && tile < end; ++tile) {
        const Tile& t = layout.tiles[tile];
        sound = t.block == l && t.start == column && t.start < t.stop && t.stop <= layout.n;
        column = t.stop;
      }
      STD_TORCH_CHECK(sound, op_, ": offsets, tiles and tile_offsets must divide the ", layout.n,
                      " columns of a vector, they do not in block ", l);
    }
    STD_TORCH_CHECK(column == layout.n, op_, ": offsets must end with the ", layout.n, " columns of a vector, got ",
                    column);
  }

  const char* op_;
};

}  // namespace
}  // namespace blockhess

STABLE_TORCH_LIBRARY(blockhess_ext, m) {
  m.def(
      "lanczos_step(Tensor w, Tensor v, Tensor(a!) v_prev, Tensor(b!) alpha, Tensor(c!) beta, "
      "Tensor(d!) norm, Tensor(e!) steps, Tensor(f!) status, Tensor limits, Tensor basis_offsets, Tensor offsets, "
      "Tensor tiles, Tensor tile_offsets, Tensor(g!) partial) -> ()");
  m.def(
      "reorthogonalize(Tensor(a!) r, Tensor(b!) basis, Tensor basis_offsets, Tensor basis_tiles, Tensor(c!) alpha, "
      "Tensor(d!) beta, Tensor(e!) norm, Tensor(f!) steps, Tensor(g!) status, Tensor limits, Tensor? project, "
      "Tensor offsets, Tensor tiles, Tensor tile_offsets, Tensor(h!) partial) -> ()");
  m.def("tridiag_quadrature(Tensor alpha, Tensor beta, Tensor steps) -> (Tensor, Tensor)");
  m.def("gaussian_density(Tensor nodes, Tensor weights, Tensor grid, Tensor sigma) -> Tensor");
  m.def(
      "random_probes(Tensor(a!) probes, int seed, int first_probe, int distribution, Tensor block_ids, "
      "Tensor offsets, Tensor tiles, Tensor tile_offsets, Tensor(b!) partial) -> ()");
  m.def(
      "linear_combination(Tensor(a!) out, Tensor[] bases, Tensor?[] coefficients, float[] scalars, int[] first_rows) "
      "-> ()");
  m.def(
      "linear_combination_sum(Tensor(a!) out, Tensor[] bases, Tensor?[] coefficients, float[] scalars, "
      "int[] first_rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(blockhess_ext, CPU, m) {
  m.impl("lanczos_step", TORCH_BOX(&blockhess::lanczos_step<blockhess::Cpu>));
  m.impl("reorthogonalize", TORCH_BOX(&blockhess::reorthogonalize<blockhess::Cpu>));
  m.impl("tridiag_quadrature", TORCH_BOX(&blockhess::tridiag_quadrature<blockhess::Cpu>));
  m.impl("gaussian_density", TORCH_BOX(&blockhess::gaussian_density<blockhess::Cpu>));
  m.impl("random_probes", TORCH_BOX(&blockhess::random_probes<blockhess::Cpu>));
  m.impl("linear_combination", TORCH_BOX(&blockhess::linear_combination<blockhess::Cpu>));
  m.impl("linear_combination_sum", TORCH_BOX(&blockhess::linear_combination_sum<blockhess::Cpu>));
}
