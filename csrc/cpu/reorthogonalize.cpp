// reorthogonalize on the CPU, in three passes over the basis:
//
//   c = V^T r;   r <- r - V c,  c = V^T r;   r <- r - V c
//
// A segment of one tile is left to one thread for all passes, while its part of the basis is in cache; the tiles of a
// longer one are distributed over all threads, pass by pass.
#include "ops/reorthogonalize.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "tiles.h"
#include "vector_kernels.h"

namespace blockhess {
namespace {

constexpr int kPasses = 3;

template <class T>
void reorthogonalize(const Reorthogonalize<T>& op, const ParallelFor& parallel_for) {
  const Recurrences& recurrences = op.recurrences;
  const Tiles tiles(op.layout);
  const int64_t row = op.layout.n_probes * op.n_basis;  // elements of one basis row
  const int64_t stride = op.capacity + 1;               // of `partial`, from tile to tile

  // Coefficients of the segments that are projected alone: most others may have ended long ago.
  std::vector<int64_t> slot(tiles.segments());
  int64_t slots = 0, width = 0;
  for (int64_t s = 0; s < tiles.segments(); ++s) {
    slot[s] = slots;
    if (!op.projects(s)) continue;
    ++slots;
    width = std::max(width, op.count(s));
  }
  std::vector<double> coefficients(slots * width);

  // Column of a tile's first element in a row of the basis.
  const auto column = [&](int64_t t) {
    const int64_t s = tiles.segment(t);
    return s / op.layout.n_blocks * op.n_basis + op.basis_offsets[tiles.block(s)] + tiles.position(t);
  };
  const auto project_tile = [&](int pass, int64_t t) {
    const int64_t s = tiles.segment(t);
    const double* subtracted = pass > 0 ? coefficients.data() + slot[s] * width : nullptr;
    double* dots = pass + 1 < kPasses ? op.partial + t * stride : nullptr;
    op.partial[t * stride + op.capacity] =
        gram_schmidt(op.r + tiles.start(t), op.basis + column(t), row, op.count(s), tiles.length(t), subtracted, dots);
  };
  const auto add_tiles = [&](int64_t s) {
    for (int64_t k = 0; k < op.count(s); ++k) coefficients[slot[s] * width + k] = tiles.sum(op.partial + k, s, stride);
  };
  const auto shared = [&](int64_t s) { return tiles.end(s) - tiles.begin(s) > 1; };
  const auto whole_segment = [&](int64_t s) {
    for (int pass = 0; pass < kPasses; ++pass) {
      if (pass > 0) add_tiles(s);
      project_tile(pass, tiles.begin(s));
    }
  };

  for (int pass = 0; pass < kPasses; ++pass) {
    parallel_for(pass > 0 ? tiles.segments() : 0, 16, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        if (op.projects(s) && shared(s)) add_tiles(s);
    });
    for_tiles(tiles, parallel_for, [&](int64_t t) {
      const int64_t s = tiles.segment(t);
      if (!op.projects(s)) return;
      if (shared(s))
        project_tile(pass, t);
      else if (pass == 0)
        whole_segment(s);
    });
  }

  std::vector<double> factor(tiles.segments(), 0.0);
  std::vector<char> closing(tiles.segments(), 0);
  for (int64_t s = 0; s < tiles.segments(); ++s) {
    if (!op.takes_part(s)) continue;
    closing[s] = 1;
    if (op.projects(s))
      recurrences.beta[recurrences.next(s)] = std::sqrt(tiles.sum(op.partial + op.capacity, s, stride));
    factor[s] = close_step(recurrences, s, op.limits[tiles.block(s)], std::numeric_limits<T>::epsilon());
  }
  for_tiles(tiles, parallel_for, [&](int64_t t) {
    const int64_t s = tiles.segment(t), length = tiles.length(t);
    T* next = op.r + tiles.start(t);
    if (!closing[s]) return;
    if (factor[s] == 0.0) {
      std::fill_n(next, length, T(0));
      return;
    }
    scale(next, factor[s], length);
    const int64_t filled = recurrences.steps[s];  // includes this step
    if (filled < op.capacity) std::copy_n(next, length, op.basis + filled * row + column(t));
  });
}

}  // namespace

void reorthogonalize_cpu(const Reorthogonalize<float>& op, const ParallelFor& parallel_for) {
  reorthogonalize(op, parallel_for);
}
void reorthogonalize_cpu(const Reorthogonalize<double>& op, const ParallelFor& parallel_for) {
  reorthogonalize(op, parallel_for);
}

}  // namespace blockhess
