// The tensor ops: their schemas, and the CPU twins on torch's own thread pool.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/gaussian_density.h"
#include "ops/lanczos_step.h"
#include "ops/random_probes.h"
#include "ops/reorthogonalize.h"
#include "ops/tridiag_quadrature.h"
#include "views.h"

namespace blockhess {
namespace {

void torch_parallel_for(int64_t count, int64_t grain, const RangeBody& body) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, body);
}

void lanczos_step(Tensor w, Tensor v, Tensor v_prev, Tensor beta_prev, Tensor alpha, Tensor beta, Tensor norm,
                  Tensor steps, Tensor status, Tensor limits, Tensor basis_offsets, Tensor offsets, Tensor tiles,
                  Tensor tile_offsets, Tensor partial) {
  const Arguments args("lanczos_step", w);
  dispatch_vectors("lanczos_step", w, [&](auto zero) {
    using T = decltype(zero);
    const Layout layout = args.layout(w, offsets, tiles, tile_offsets);
    LanczosStep<T> op{layout,
                      args.array<T>("w", w, {layout.n_probes, layout.n}),
                      args.array<T>("v", v, {layout.n_probes, layout.n}),
                      args.array<T>("v_prev", v_prev, {layout.n_probes, layout.n}),
                      args.array<double>("beta_prev", beta_prev, {layout.n_probes, layout.n_blocks}),
                      args.recurrences(layout, alpha, beta, norm, steps, status),
                      args.array<int64_t>("limits", limits, {layout.n_blocks}),
                      args.array<int64_t>("basis_offsets", basis_offsets, {layout.n_blocks}),
                      args.array<double>("partial", partial, {layout.n_probes, layout.n_tiles})};
    lanczos_step_cpu(op, torch_parallel_for);
  });
}

void reorthogonalize(Tensor r, Tensor basis, int64_t count, Tensor basis_offsets, Tensor alpha, Tensor beta,
                     Tensor norm, Tensor steps, Tensor status, Tensor limits, Tensor offsets, Tensor tiles,
                     Tensor tile_offsets, Tensor partial) {
  const Arguments args("reorthogonalize", r);
  dispatch_vectors("reorthogonalize", r, [&](auto zero) {
    using T = decltype(zero);
    const Layout layout = args.layout(r, offsets, tiles, tile_offsets);
    const int64_t capacity = args.size("basis", basis, 0, 3), n_basis = args.size("basis", basis, 2, 3);
    STD_TORCH_CHECK(count >= 1 && count <= capacity, "reorthogonalize: count must be in 1 ... ", capacity, ", got ",
                    count);
    Reorthogonalize<T> op{layout,
                          args.array<T>("r", r, {layout.n_probes, layout.n}),
                          args.array<T>("basis", basis, {capacity, layout.n_probes, n_basis}),
                          capacity,
                          n_basis,
                          count,
                          args.array<int64_t>("basis_offsets", basis_offsets, {layout.n_blocks}),
                          args.recurrences(layout, alpha, beta, norm, steps, status),
                          args.array<int64_t>("limits", limits, {layout.n_blocks}),
                          args.array<double>("partial", partial, {layout.n_probes, layout.n_tiles, capacity})};
    reorthogonalize_cpu(op, torch_parallel_for);
  });
}

std::tuple<Tensor, Tensor> tridiag_quadrature(Tensor alpha, Tensor beta, Tensor steps) {
  const Arguments args("tridiag_quadrature", alpha);
  const int64_t n_problems = args.size("alpha", alpha, 0, 2), m = args.size("alpha", alpha, 1, 2);
  Tensor nodes = torch::stable::empty_like(alpha), weights = torch::stable::empty_like(alpha);
  TridiagQuadrature op{n_problems,
                       m,
                       args.array<double>("alpha", alpha, {n_problems, m}),
                       args.array<double>("beta", beta, {n_problems, m}),
                       args.array<int64_t>("steps", steps, {n_problems}),
                       args.array<double>("nodes", nodes, {n_problems, m}),
                       args.array<double>("weights", weights, {n_problems, m})};
  for (int64_t b = 0; b < n_problems; ++b)
    STD_TORCH_CHECK(op.steps[b] >= 0 && op.steps[b] <= m, "tridiag_quadrature: steps must be in 0 ... ", m, ", got ",
                    op.steps[b], " in problem ", b);
  const int64_t failed = tridiag_quadrature_cpu(op, torch_parallel_for);
  STD_TORCH_CHECK(failed < 0, "tridiag_quadrature: alpha and beta must be finite and converge, problem ", failed,
                  " does not");
  return {nodes, weights};
}

Tensor gaussian_density(Tensor nodes, Tensor weights, Tensor grid, Tensor sigma) {
  const Arguments args("gaussian_density", nodes);
  const int64_t n_rows = args.size("nodes", nodes, 0, 2), n_nodes = args.size("nodes", nodes, 1, 2);
  const int64_t n_grid = args.size("grid", grid, 0, 1);
  const int64_t shape[] = {n_rows, n_grid};
  Tensor density = torch::stable::new_empty(nodes, {shape, 2});
  GaussianDensity op{n_rows,
                     n_nodes,
                     n_grid,
                     args.array<double>("nodes", nodes, {n_rows, n_nodes}),
                     args.array<double>("weights", weights, {n_rows, n_nodes}),
                     args.array<double>("grid", grid, {n_grid}),
                     args.array<double>("sigma", sigma, {n_rows}),
                     args.array<double>("density", density, {n_rows, n_grid})};
  gaussian_density_cpu(op, torch_parallel_for);
  return density;
}

void random_probes(Tensor probes, int64_t seed, int64_t first_probe, int64_t distribution, Tensor block_ids,
                   Tensor offsets, Tensor tiles, Tensor tile_offsets, Tensor partial) {
  const Arguments args("random_probes", probes);
  STD_TORCH_CHECK(distribution == kGaussian || distribution == kRademacher,
                  "random_probes: distribution must be 0 or 1, got ", distribution);
  dispatch_vectors("random_probes", probes, [&](auto zero) {
    using T = decltype(zero);
    const Layout layout = args.layout(probes, offsets, tiles, tile_offsets);
    RandomProbes<T> op{layout,
                       seed,
                       first_probe,
                       Distribution(distribution),
                       args.array<int64_t>("block_ids", block_ids, {layout.n_blocks}),
                       args.array<T>("probes", probes, {layout.n_probes, layout.n}),
                       args.array<double>("partial", partial, {layout.n_probes, layout.n_tiles})};
    random_probes_cpu(op, torch_parallel_for);
  });
}

}  // namespace
}  // namespace blockhess

STABLE_TORCH_LIBRARY(blockhess_ext, m) {
  m.def(
      "lanczos_step(Tensor w, Tensor v, Tensor(a!) v_prev, Tensor beta_prev, Tensor(b!) alpha, Tensor(c!) beta, "
      "Tensor(d!) norm, Tensor(e!) steps, Tensor(f!) status, Tensor limits, Tensor basis_offsets, Tensor offsets, "
      "Tensor tiles, Tensor tile_offsets, Tensor(g!) partial) -> ()");
  m.def(
      "reorthogonalize(Tensor(a!) r, Tensor(b!) basis, int count, Tensor basis_offsets, Tensor(c!) alpha, "
      "Tensor(d!) beta, Tensor(e!) norm, Tensor(f!) steps, Tensor(g!) status, Tensor limits, Tensor offsets, "
      "Tensor tiles, Tensor tile_offsets, Tensor(h!) partial) -> ()");
  m.def("tridiag_quadrature(Tensor alpha, Tensor beta, Tensor steps) -> (Tensor, Tensor)");
  m.def("gaussian_density(Tensor nodes, Tensor weights, Tensor grid, Tensor sigma) -> Tensor");
  m.def(
      "random_probes(Tensor(a!) probes, int seed, int first_probe, int distribution, Tensor block_ids, "
      "Tensor offsets, Tensor tiles, Tensor tile_offsets, Tensor(b!) partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(blockhess_ext, CPU, m) {
  m.impl("lanczos_step", TORCH_BOX(&blockhess::lanczos_step));
  m.impl("reorthogonalize", TORCH_BOX(&blockhess::reorthogonalize));
  m.impl("tridiag_quadrature", TORCH_BOX(&blockhess::tridiag_quadrature));
  m.impl("gaussian_density", TORCH_BOX(&blockhess::gaussian_density));
  m.impl("random_probes", TORCH_BOX(&blockhess::random_probes));
}
