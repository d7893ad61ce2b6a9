// The tensor ops on any device: check the arguments, convert them to plain arrays, call the implementation.
//
// A Device is constructed from the op's name and its first tensor; run(op) calls the implementation and throws if it
// fails.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "combination.h"
#include "ops/gaussian_density.h"
#include "ops/lanczos_step.h"
#include "ops/random_probes.h"
#include "ops/reorthogonalize.h"
#include "ops/tridiag_quadrature.h"

namespace blockhess {

template <class Device>
void lanczos_step(Tensor w, Tensor v, Tensor v_prev, Tensor alpha, Tensor beta, Tensor norm, Tensor steps,
                  Tensor status, Tensor limits, Tensor basis_offsets, Tensor offsets, Tensor tiles, Tensor tile_offsets,
                  Tensor partial) {
  const Arguments args("lanczos_step", w);
  const Device device("lanczos_step", w);
  dispatch_vectors("lanczos_step", w, [&](auto zero) {
    using T = decltype(zero);
    const Layout layout = args.layout(w, offsets, tiles, tile_offsets);
    LanczosStep<T> op{layout,
                      args.array<T>("w", w, {layout.n_probes, layout.n}),
                      args.array<T>("v", v, {layout.n_probes, layout.n}),
                      args.array<T>("v_prev", v_prev, {layout.n_probes, layout.n}),
                      args.recurrences(layout, alpha, beta, norm, steps, status),
                      args.array<int64_t>("limits", limits, {layout.n_blocks}),
                      args.array<int64_t>("basis_offsets", basis_offsets, {layout.n_blocks}),
                      args.array<double>("partial", partial, {layout.n_probes, layout.n_tiles})};
    device.run(op);
  });
}

template <class Device>
void reorthogonalize(Tensor r, Tensor basis, Tensor basis_offsets, Tensor basis_tiles, Tensor alpha, Tensor beta,
                     Tensor norm, Tensor steps, Tensor status, Tensor limits, std::optional<Tensor> project,
                     Tensor offsets, Tensor tiles, Tensor tile_offsets, Tensor partial) {
  const Arguments args("reorthogonalize", r);
  const Device device("reorthogonalize", r);
  dispatch_vectors("reorthogonalize", r, [&](auto zero) {
    using T = decltype(zero);
    const Layout layout = args.layout(r, offsets, tiles, tile_offsets);
    const int64_t capacity = args.size("basis", basis, 0, 3), n_basis = args.size("basis", basis, 2, 3);
    const int64_t n_basis_tiles = args.size("basis_tiles", basis_tiles, 0, 1);
    const int32_t* projected = nullptr;
    if (project) projected = args.array<int32_t>("project", *project, {layout.n_probes, layout.n_blocks});
    Reorthogonalize<T> op{layout,
                          args.array<T>("r", r, {layout.n_probes, layout.n}),
                          args.array<T>("basis", basis, {capacity, layout.n_probes, n_basis}),
                          capacity,
                          n_basis,
                          args.array<int64_t>("basis_offsets", basis_offsets, {layout.n_blocks}),
                          n_basis_tiles,
                          args.array<int64_t>("basis_tiles", basis_tiles, {n_basis_tiles}),
                          args.recurrences(layout, alpha, beta, norm, steps, status),
                          args.array<int64_t>("limits", limits, {layout.n_blocks}),
                          projected,
                          args.array<double>("partial", partial, {layout.n_probes, layout.n_tiles, capacity + 1})};
    device.run(op);
  });
}

template <class Device>
std::tuple<Tensor, Tensor> tridiag_quadrature(Tensor alpha, Tensor beta, Tensor steps) {
  const Arguments args("tridiag_quadrature", alpha);
  const Device device("tridiag_quadrature", alpha);
  const int64_t n_problems = args.size("alpha", alpha, 0, 2), m = args.size("alpha", alpha, 1, 2);
  Tensor nodes = torch::stable::empty_like(alpha), weights = torch::stable::empty_like(alpha);
  Tensor couplings = torch::stable::empty_like(alpha);
  TridiagQuadrature op{n_problems,
                       m,
                       args.array<double>("alpha", alpha, {n_problems, m}),
                       args.array<double>("beta", beta, {n_problems, m}),
                       args.array<int64_t>("steps", steps, {n_problems}),
                       args.array<double>("nodes", nodes, {n_problems, m}),
                       args.array<double>("weights", weights, {n_problems, m}),
                       args.array<double>("couplings", couplings, {n_problems, m})};
  device.run(op);
  return {nodes, weights};
}

template <class Device>
Tensor gaussian_density(Tensor nodes, Tensor weights, Tensor grid, Tensor sigma) {
  const Arguments args("gaussian_density", nodes);
  const Device device("gaussian_density", nodes);
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
  device.run(op);
  return density;
}

template <class Device>
void random_probes(Tensor probes, int64_t seed, int64_t first_probe, int64_t distribution, Tensor block_ids,
                   Tensor offsets, Tensor tiles, Tensor tile_offsets, Tensor partial) {
  const Arguments args("random_probes", probes);
  const Device device("random_probes", probes);
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
    device.run(op);
  });
}

template <class Device>
void linear_combination(const Tensor& out, const std::vector<Tensor>& bases,
                        const std::vector<std::optional<Tensor>>& coefficients, const std::vector<double>& scalars,
                        const std::vector<int64_t>& first_rows) {
  const char* name = "linear_combination";
  const Device device(name, out);
  dispatch_vectors(name, out, [&](auto zero) {
    device.run(combination<decltype(zero)>(name, false, out, bases, coefficients, scalars, first_rows));
  });
}

template <class Device>
void linear_combination_sum(const Tensor& out, const std::vector<Tensor>& bases,
                            const std::vector<std::optional<Tensor>>& coefficients, const std::vector<double>& scalars,
                            const std::vector<int64_t>& first_rows) {
  const char* name = "linear_combination_sum";
  const Device device(name, out);
  dispatch_vectors(name, out, [&](auto zero) {
    device.run(combination<decltype(zero)>(name, true, out, bases, coefficients, scalars, first_rows));
  });
}

}  // namespace blockhess
