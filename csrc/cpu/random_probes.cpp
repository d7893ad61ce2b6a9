// random_probes on the CPU: tiles are filled in parallel, then each segment is divided by its norm.
#include "ops/random_probes.h"

#include <algorithm>

#include "vector_kernels.h"

namespace blockhess {
namespace {

template <class T>
void random_probes(const RandomProbes<T>& op, const ParallelFor& parallel_for) {
  const Layout& layout = op.layout;
  const int64_t n_tiles = layout.n_probes * layout.n_tiles;
  const auto length_of = [&](int64_t block) { return layout.offsets[block + 1] - layout.offsets[block]; };

  parallel_for(n_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t probe = t / layout.n_tiles;
      const Tile& tile = layout.tiles[t % layout.n_tiles];
      const uint64_t key =
          probe_key(uint64_t(op.seed), uint64_t(op.block_ids[tile.block]), uint64_t(op.first_probe + probe));
      const double unit = 1.0 / std::sqrt(double(length_of(tile.block)));
      T* out = op.probes + probe * layout.n + tile.start;
      const int64_t position = tile.start - layout.offsets[tile.block], length = tile.stop - tile.start;
      double sum = 0.0;
      for (int64_t i = 0; i < length; i += 4) {
        const PhiloxWords words = philox(uint64_t(position + i) / 4, 0, key);
        double value[4];
        if (op.distribution == kRademacher) {
          for (int k = 0; k < 4; ++k) value[k] = words.word[k] >> 31 ? -unit : unit;
        } else {
          box_muller(words.word[0], words.word[1], &value[0], &value[1]);
          box_muller(words.word[2], words.word[3], &value[2], &value[3]);
        }
        for (int64_t k = 0; k < std::min<int64_t>(4, length - i); ++k) {
          out[i + k] = T(value[k]);
          sum += value[k] * value[k];
        }
      }
      op.partial[t] = sum;
    }
  });
  if (op.distribution == kRademacher) return;
  parallel_for(n_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t probe = t / layout.n_tiles;
      const Tile& tile = layout.tiles[t % layout.n_tiles];
      double sum = 0.0;
      for (int64_t k = layout.tile_offsets[tile.block]; k < layout.tile_offsets[tile.block + 1]; ++k)
        sum += op.partial[probe * layout.n_tiles + k];
      scale(op.probes + probe * layout.n + tile.start, 1.0 / std::sqrt(sum), tile.stop - tile.start);
    }
  });
}

}  // namespace

void random_probes_cpu(const RandomProbes<float>& op, const ParallelFor& parallel_for) {
  random_probes(op, parallel_for);
}
void random_probes_cpu(const RandomProbes<double>& op, const ParallelFor& parallel_for) {
  random_probes(op, parallel_for);
}

}  // namespace blockhess
