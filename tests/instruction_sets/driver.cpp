// The CPU kernels as C functions on one thread, built for the instruction set of the compiler's flags.
#include "cpu/vector_kernels.h"
#include "ops/gaussian_density.h"
#include "ops/linear_combination.h"
#include "ops/tridiag_quadrature.h"

using namespace blockhess;

namespace {

void serial(int64_t count, int64_t, const RangeBody& body) { body(0, count); }

}  // namespace

extern "C" {

double run_dot(const float* x, const float* y, int64_t n) { return dot(x, y, n); }

double run_three_term(const float* w, const float* v, float* p, double alpha, double beta, int64_t n) {
  return three_term(w, v, p, alpha, beta, n);
}

double run_scale(float* x, double factor, int64_t n) {
  scale(x, factor, n);
  return 0.0;
}

double run_gram_schmidt(float* x, const float* basis, int64_t count, int64_t n, const double* c, double* d) {
  return gram_schmidt(x, basis, n, count, n, c, d);
}

void run_gaussian_density(int64_t rows, int64_t n_nodes, int64_t n_grid, const double* nodes, const double* weights,
                          const double* grid, const double* sigma, double* density) {
  gaussian_density_cpu({rows, n_nodes, n_grid, nodes, weights, grid, sigma, density}, serial);
}

// out = x y + 0.5 x - 2 x^T, (n, n), or with sum (n) its sums over rows
void run_linear_combination(const float* x, const float* y, int64_t n, int64_t sum, float* out) {
  LinearCombination<float> op{sum != 0, 3, 2, 1, 0, out, {n, n}, {sum ? 1 : n, sum ? 0 : 1}, {}};
  op.terms[0] = {x, y, 1.0f, 0, 1, 0, {n, 1}, {n, 1}};
  op.terms[1] = {x, nullptr, 0.5f, 0, 1, 0, {n, 1}, {}};
  op.terms[2] = {x, nullptr, -2.0f, 0, 1, 0, {1, n}, {}};
  linear_combination_cpu(op, serial);
}

int64_t run_tridiag_quadrature(int64_t n_problems, int64_t m, const double* alpha, const double* beta,
                               const int64_t* steps, double* nodes, double* weights) {
  return tridiag_quadrature_cpu({n_problems, m, alpha, beta, steps, nodes, weights, nullptr}, serial);
}
}
