// Shared by all ops: the ragged layout, the parallel loop, and the stopping rule of a recurrence.
//
// A vector set has shape (n_probes, n) with n = sum(dims). Block l is the column range offsets[l] : offsets[l + 1]; the
// segment of (probe p, block l) is contiguous and starts at element p * n + offsets[l]. A block is cut into tiles of at
// most kTileLength elements, listed block by block: tile_offsets[l] : tile_offsets[l + 1] are the tiles of block l.
//
// Guarantees: a sum over a segment adds the sums of its tiles in an order that depends on the layout only (and differs
// between CPU and CUDA), so the bits of a result depend neither on the number of threads nor on the grid size.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#if defined(__CUDACC__)
#define BLOCKHESS_HD __host__ __device__
#else
#define BLOCKHESS_HD
#endif

namespace blockhess {

constexpr int64_t kTileLength = 32768;

struct Tile {
  int64_t block, start, stop;  // columns start : stop of the vector set, inside one block
};

struct Layout {
  int64_t n_probes, n_blocks, n, n_tiles;
  const int64_t* offsets;       // (n_blocks + 1)
  const Tile* tiles;            // (n_tiles)
  const int64_t* tile_offsets;  // (n_blocks + 1)
};

// Calls body(begin, end) on disjoint ranges that cover 0 : count; `grain` is the smallest range worth a thread.
using RangeBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const RangeBody& body)>;

// The stream on which a CUDA implementation launches its kernels, with at most max_grid CTAs per launch; they loop over
// the work. A CUDA implementation returns nullptr, or an error message. It neither synchronizes nor allocates, so it
// can be captured in a CUDA graph.
struct CudaQueue {
  void* stream;
  int64_t max_grid = INT32_MAX;
};

enum Status : int32_t {
  kRunning = 0,
  kFinished = 1,   // the Krylov space is exhausted or the step limit is reached; all steps are valid
  kNonFinite = 2,  // a step gave NaN, inf or a value out of range; the steps before it are valid
};

// The tridiagonal matrices T and the state of all recurrences; s = p * n_blocks + l is the recurrence of probe p and
// block l. All arrays are updated in place. Every recurrence stores its own step number, so an op does the same work on
// the same addresses at every step, and a CUDA graph can replay it.
struct Recurrences {
  int64_t rows, stride;  // maximum number of steps; n_probes * n_blocks, the distance between rows
  double* alpha;         // (rows, n_probes, n_blocks) diagonal of T
  double* beta;          // (rows, n_probes, n_blocks) off-diagonal of T; in the last step the norm of the residual
  double* norm;          // (n_probes, n_blocks) max of |alpha| and beta over the steps so far, the estimate of |T|
  int64_t* steps;        // (n_probes, n_blocks) number of valid steps, and so the row of the next step
  int32_t* status;       // (n_probes, n_blocks) Status

  // Whether recurrence s makes another step. False if `steps` is not in 0 : rows, so nothing is written out of bounds.
  BLOCKHESS_HD bool running(int64_t s) const { return status[s] == kRunning && steps[s] >= 0 && steps[s] < rows; }

  // Index of the next step of a running recurrence in alpha and beta.
  BLOCKHESS_HD int64_t next(int64_t s) const { return steps[s] * stride + s; }

  // beta_{j-1} if j is the next step, 0 for j = 0.
  BLOCKHESS_HD double last_beta(int64_t s) const { return steps[s] > 0 ? beta[next(s) - stride] : 0.0; }
};

// The range of a nonzero max(|T|, beta) in which no squared residual underflows or overflows.
constexpr double kLeastSize = 1e-120, kMostSize = 1e120;

// Completes step j of recurrence s, whose alpha_j and beta_j are written. If either is not finite or max(|T|, beta_j)
// is out of range, the step is discarded and the status becomes kNonFinite. Otherwise the step is counted, and the
// recurrence is finished if
//   beta_j <= 64 eps |T|   (the Krylov space is exhausted),   steps = limit,   or   steps = rows.
// Returns c in v_{j+1} = c r: 1 / beta_j, or 0 if the recurrence has ended.
inline BLOCKHESS_HD double close_step(const Recurrences& r, int64_t s, int64_t limit, double eps) {
  const double alpha = r.alpha[r.next(s)], beta = r.beta[r.next(s)];
  const double norm = std::fmax(r.norm[s], std::fabs(alpha)), size = std::fmax(norm, beta);
  const bool in_range = size == 0.0 || (kLeastSize <= size && size <= kMostSize);
  if (!(std::isfinite(alpha) && std::isfinite(beta) && in_range)) {
    r.alpha[r.next(s)] = r.beta[r.next(s)] = 0.0;
    r.status[s] = kNonFinite;
    return 0.0;
  }
  r.norm[s] = size;
  r.steps[s] += 1;
  if (beta <= 64.0 * eps * norm || r.steps[s] >= limit || r.steps[s] >= r.rows) {
    r.status[s] = kFinished;
    return 0.0;
  }
  return 1.0 / beta;
}

}  // namespace blockhess
