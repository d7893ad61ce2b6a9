// reorthogonalize on the CPU: per tile, one pass of dots and one of updates over the basis, twice.
#include "ops/reorthogonalize.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "vector_kernels.h"

namespace blockhess {
namespace {

template <class T>
void reorthogonalize(const Reorthogonalize<T>& op, const ParallelFor& parallel_for) {
  const Layout& layout = op.layout;
  const Recurrences& recurrences = op.recurrences;
  const int64_t n_tiles = layout.n_probes * layout.n_tiles, n_segments = layout.n_probes * layout.n_blocks;
  const int64_t row = layout.n_probes * op.n_basis;  // elements of one basis row
  const int64_t stride = op.capacity + 1;            // of `partial`, from tile to tile

  // body(tile index, segment, first element of the tile in r, in a basis row, length) for the tiles to be projected
  const auto for_tiles = [&](const auto& body) {
    parallel_for(n_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t probe = t / layout.n_tiles;
        const Tile& tile = layout.tiles[t % layout.n_tiles];
        const int64_t segment = probe * layout.n_blocks + tile.block;
        if (!op.projects(segment)) continue;
        const int64_t column = op.basis_offsets[tile.block] + tile.start - layout.offsets[tile.block];
        body(t, segment, probe * layout.n + tile.start, probe * op.n_basis + column, tile.stop - tile.start);
      }
    });
  };
  // The partial sums of entry k of a segment, added in tile order.
  const auto segment_sum = [&](int64_t segment, int64_t k) {
    const int64_t probe = segment / layout.n_blocks, block = segment % layout.n_blocks;
    double sum = 0.0;
    for (int64_t t = layout.tile_offsets[block]; t < layout.tile_offsets[block + 1]; ++t)
      sum += op.partial[(probe * layout.n_tiles + t) * stride + k];
    return sum;
  };

  std::vector<double> coefficients(n_segments * op.capacity);
  for (int pass = 0; pass < 2; ++pass) {
    for_tiles([&](int64_t t, int64_t segment, int64_t r, int64_t v, int64_t length) {
      for (int64_t k = 0; k < op.count(segment); ++k)
        op.partial[t * stride + k] = dot(op.basis + k * row + v, op.r + r, length);
    });
    parallel_for(n_segments, 16, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        if (op.projects(s))
          for (int64_t k = 0; k < op.count(s); ++k) coefficients[s * op.capacity + k] = segment_sum(s, k);
    });
    for_tiles([&](int64_t t, int64_t segment, int64_t r, int64_t v, int64_t length) {
      op.partial[t * stride + op.capacity] = subtract_projection(
          op.r + r, op.basis + v, row, coefficients.data() + segment * op.capacity, op.count(segment), length);
    });
  }

  std::vector<double> factor(n_segments, 0.0);
  std::vector<char> closing(n_segments, 0);
  for (int64_t s = 0; s < n_segments; ++s) {
    if (!op.takes_part(s)) continue;
    closing[s] = 1;
    if (op.projects(s)) recurrences.beta[recurrences.next(s)] = std::sqrt(segment_sum(s, op.capacity));
    factor[s] = close_step(recurrences, s, op.limits[s % layout.n_blocks], std::numeric_limits<T>::epsilon());
  }
  parallel_for(n_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t probe = t / layout.n_tiles;
      const Tile& tile = layout.tiles[t % layout.n_tiles];
      const int64_t segment = probe * layout.n_blocks + tile.block;
      if (!closing[segment]) continue;
      T* next = op.r + probe * layout.n + tile.start;
      const int64_t length = tile.stop - tile.start;
      if (factor[segment] == 0.0) {
        std::fill_n(next, length, T(0));
        continue;
      }
      scale(next, factor[segment], length);
      const int64_t filled = recurrences.steps[segment];  // the step is counted by now
      if (filled >= op.capacity) continue;
      const int64_t column = op.basis_offsets[tile.block] + tile.start - layout.offsets[tile.block];
      std::copy_n(next, length, op.basis + filled * row + probe * op.n_basis + column);
    }
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
