// Indices over all probes: tiles t = probe * n_tiles + tile and segments s = probe * n_blocks + block.
#pragma once

#include <algorithm>

#include "ops/common.h"

namespace blockhess {

class Tiles {
 public:
  explicit Tiles(const Layout& layout) : layout_(layout) {}

  int64_t count() const { return layout_.n_probes * layout_.n_tiles; }
  int64_t segments() const { return layout_.n_probes * layout_.n_blocks; }

  // Tiles per task: as many as hold kTileLength elements on average.
  int64_t grain() const {
    return std::max<int64_t>(1, kTileLength * layout_.n_tiles / std::max<int64_t>(1, layout_.n));
  }

  // Of tile t: its segment, the index of its first element in the (n_probes, n) vector set and in its segment, its
  // length.
  int64_t segment(int64_t t) const { return probe(t) * layout_.n_blocks + tile(t).block; }
  int64_t start(int64_t t) const { return probe(t) * layout_.n + tile(t).start; }
  int64_t position(int64_t t) const { return tile(t).start - layout_.offsets[tile(t).block]; }
  int64_t length(int64_t t) const { return tile(t).stop - tile(t).start; }

  // Of segment s: its block and its tiles begin(s) : end(s).
  int64_t block(int64_t s) const { return s % layout_.n_blocks; }
  int64_t begin(int64_t s) const { return s / layout_.n_blocks * layout_.n_tiles + layout_.tile_offsets[block(s)]; }
  int64_t end(int64_t s) const { return s / layout_.n_blocks * layout_.n_tiles + layout_.tile_offsets[block(s) + 1]; }

  // The sum of partial[t] over the tiles of segment s, in ascending order.
  double sum(const double* partial, int64_t s) const {
    double sum = 0.0;
    for (int64_t t = begin(s); t < end(s); ++t) sum += partial[t];
    return sum;
  }

 private:
  int64_t probe(int64_t t) const { return t / layout_.n_tiles; }
  const Tile& tile(int64_t t) const { return layout_.tiles[t % layout_.n_tiles]; }

  const Layout& layout_;
};

// Calls body(t) for every tile; tiles are distributed over threads.
template <class Body>
void for_tiles(const Tiles& tiles, const ParallelFor& parallel_for, const Body& body) {
  parallel_for(tiles.count(), tiles.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t);
  });
}

}  // namespace blockhess
