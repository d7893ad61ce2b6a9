// Run-time dispatch of tridiag_lanes.h over the instruction sets.
#include "tridiag_lanes.h"

#include <algorithm>

#include "ops/tridiag_quadrature.h"

#define BLOCKHESS_LOOPS "tridiag_loops.h"
#include "simd_dispatch.h"

namespace blockhess {

void implicit_ql(double* d, double* e, double* q, const int64_t* n, bool* failed) {
  BLOCKHESS_DISPATCH(implicit_ql(d, e, q, n, failed));
}

}  // namespace blockhess
