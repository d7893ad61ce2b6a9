// What every op shares: the ragged layout, the parallel loop, and the rule that ends a recurrence.
//
// State is (n_probes, n) with n = sum(dims). Block l is the column range offsets[l] : offsets[l + 1], so the
// segment of (probe p, block l) is contiguous at p * n + offsets[l]. A block is cut into tiles of at most
// kTileLength elements; tiles are listed block by block, so tile_offsets[l] : tile_offsets[l + 1] are those of
// block l. Sums over a segment are made per tile, then over its tiles in an order that the layout alone fixes (each
// twin has its own): the bits of a result depend neither on the number of threads nor on the size of a grid.
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
  int64_t block, start, stop;  // columns start : stop of the state, inside one block
};

struct Layout {
  int64_t n_probes, n_blocks, n, n_tiles;
  const int64_t* offsets;       // (n_blocks + 1)
  const Tile* tiles;            // (n_tiles)
  const int64_t* tile_offsets;  // (n_blocks + 1)
};

// body(begin, end) is called on disjoint ranges that together cover 0 : count; `grain` indices are worth a thread.
using RangeBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const RangeBody& body)>;

// Where a CUDA twin queues its kernels; max_grid is the most CTAs of one launch, which stride over the work. A CUDA
// twin returns nullptr, or what went wrong; it neither waits for the device nor allocates, so a CUDA graph can capture
// it.
struct CudaQueue {
  void* stream;
  int64_t max_grid = INT32_MAX;
};

enum Status : int32_t {
  kRunning = 0,
  kFinished = 1,   // Krylov space exhausted, or the last step allowed was made: the quadrature stands
  kNonFinite = 2,  // the operator returned NaN, inf or what is out of range: the steps before it stand
};

// The recurrences between two steps, all arrays writable. Which step comes next each recurrence knows itself, so a call
// of an op is the same work on the same addresses at every step, and a CUDA graph can replay it.
struct Recurrences {
  int64_t rows, stride;  // most steps there is room for; n_probes * n_blocks, from row to row
  double* alpha;         // (rows, n_probes, n_blocks) diagonal entry of every step
  double* beta;          // (rows, n_probes, n_blocks) coupling of every step to the next one, or the residual
  double* norm;          // (n_probes, n_blocks) max of |alpha|, beta over the steps made: the running |T|
  int64_t* steps;        // (n_probes, n_blocks) valid steps made: the row of the next one
  int32_t* status;       // (n_probes, n_blocks) Status

  // Whether recurrence s makes the next step; where its steps are no row, nothing may be written.
  BLOCKHESS_HD bool running(int64_t s) const { return status[s] == kRunning && steps[s] >= 0 && steps[s] < rows; }

  // The entry of a running recurrence's next step in alpha and beta.
  BLOCKHESS_HD int64_t next(int64_t s) const { return steps[s] * stride + s; }

  // beta of the last step made, 0 before the first.
  BLOCKHESS_HD double last_beta(int64_t s) const { return steps[s] > 0 ? beta[next(s) - stride] : 0.0; }
};

// Sizes of T, other than 0, in which no square of a residual underflows or overflows.
constexpr double kLeastSize = 1e-120, kMostSize = 1e120;

// Closes the next step j of recurrence s, whose alpha_j and beta_j are written: counts it, ends it where
//   beta_j <= 64 eps |T|   (Krylov space exhausted), steps = limit or no row is left,
// freezes it where either is not finite, or |T| is out of range. Returns what the residual is multiplied with to become
// v_{j+1}: 1 / beta_j, or 0 where the recurrence takes no more part.
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
