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

  // The segments that take part, while most others may have ended long ago, and their tiles: all work is on these.
  std::vector<int64_t> segments, work;
  std::vector<size_t> first, owner;  // of a segment, its first tile in `work`; of a tile, its segment in `segments`
  // Coefficients of a segment start at slot * width; segments that are not projected have none.
  std::vector<int64_t> slot;
  int64_t slots = 0, width = 0;
  for (int64_t s = 0; s < tiles.segments(); ++s) {
    if (!op.takes_part(s)) continue;
    first.push_back(work.size());
    for (int64_t t = tiles.begin(s); t < tiles.end(s); ++t) {
      work.push_back(t);
      owner.push_back(segments.size());
    }
    segments.push_back(s);
    slot.push_back(slots);
    if (!op.projects(s)) continue;
    ++slots;
    width = std::max(width, op.count(s));
  }
  first.push_back(work.size());
  std::vector<double> coefficients(slots * width);
  const int64_t stride = width + 1;              // of `partial`, from a tile in `work` to the next
  const auto for_work = [&](const auto& body) {  // body(segment in `segments`, tile in `work`)
    parallel_for(work.size(), tiles.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) body(owner[w], size_t(w));
    });
  };

  // Column of a tile's first element in a row of the basis.
  const auto column = [&](int64_t t) {
    const int64_t s = tiles.segment(t);
    return s / op.layout.n_blocks * op.n_basis + op.basis_offsets[tiles.block(s)] + tiles.position(t);
  };
  const auto project_tile = [&](int pass, size_t i, size_t w) {
    const int64_t t = work[w];
    const double* subtracted = pass > 0 ? coefficients.data() + slot[i] * width : nullptr;
    double* dots = pass + 1 < kPasses ? op.partial + w * stride : nullptr;
    op.partial[w * stride + width] = gram_schmidt(op.r + tiles.start(t), op.basis + column(t), row,
                                                  op.count(segments[i]), tiles.length(t), subtracted, dots);
  };
  const auto sum_tiles = [&](size_t i, int64_t k) {
    double sum = 0.0;
    for (size_t w = first[i]; w < first[i + 1]; ++w) sum += op.partial[w * stride + k];
    return sum;
  };
  const auto add_tiles = [&](size_t i) {
    for (int64_t k = 0; k < op.count(segments[i]); ++k) coefficients[slot[i] * width + k] = sum_tiles(i, k);
  };
  const auto shared = [&](size_t i) { return first[i + 1] - first[i] > 1; };

  for (int pass = 0; pass < kPasses; ++pass) {
    parallel_for(pass > 0 ? segments.size() : 0, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (op.projects(segments[i]) && shared(i)) add_tiles(i);
    });
    for_work([&](size_t i, size_t w) {
      if (!op.projects(segments[i])) return;
      if (shared(i)) {
        project_tile(pass, i, w);
        return;
      }
      for (int own = 0; pass == 0 && own < kPasses; ++own) {
        if (own > 0) add_tiles(i);
        project_tile(own, i, w);
      }
    });
  }

  std::vector<double> factor(segments.size());
  for (size_t i = 0; i < segments.size(); ++i) {
    const int64_t s = segments[i];
    if (op.projects(s)) recurrences.beta[recurrences.next(s)] = std::sqrt(sum_tiles(i, width));
    factor[i] = close_step(recurrences, s, op.limits[tiles.block(s)], std::numeric_limits<T>::epsilon());
  }
  for_work([&](size_t i, size_t w) {
    const int64_t t = work[w], length = tiles.length(t);
    T* next = op.r + tiles.start(t);
    if (factor[i] == 0.0) {
      std::fill_n(next, length, T(0));
      return;
    }
    scale(next, factor[i], length);
    const int64_t filled = recurrences.steps[segments[i]];  // includes this step
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
