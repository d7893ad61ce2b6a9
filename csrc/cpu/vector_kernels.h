// Loops over vector elements, shared by the CPU implementations of the ops.
//
// Each is compiled for baseline x86-64, AVX2 and AVX-512 and selected at run time (see simd_dispatch.h).
//
// Guarantees: sums accumulate in float64 over a fixed number of lanes, in an order independent of the instruction set.
#pragma once

#include <cstdint>

namespace blockhess {

// sum x_i y_i
double dot(const float* x, const float* y, int64_t n);
double dot(const double* x, const double* y, int64_t n);

// p <- w - alpha v - beta p; returns |p|^2.
double three_term(const float* w, const float* v, float* p, double alpha, double beta, int64_t n);
double three_term(const double* w, const double* v, double* p, double alpha, double beta, int64_t n);

// x <- factor x
void scale(float* x, double factor, int64_t n);
void scale(double* x, double factor, int64_t n);

// With the basis V_k = basis + k * stride, 0 <= k < count:
//   x <- x - sum_k c_k V_k    unless c is null,
//   d_k = <V_k, x>            unless d is null; returns |x|^2.
// Both run chunk by chunk, so that the dots find the basis in cache.
double gram_schmidt(float* x, const float* basis, int64_t stride, int64_t count, int64_t n, const double* c, double* d);
double gram_schmidt(double* x, const double* basis, int64_t stride, int64_t count, int64_t n, const double* c,
                    double* d);

}  // namespace blockhess
