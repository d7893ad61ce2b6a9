// random_probes on the CPU: tiles are filled in parallel, then Gaussian segments are divided by their norms.
#include "ops/random_probes.h"

#include <algorithm>

#include "tiles.h"
#include "vector_kernels.h"

namespace blockhess {
namespace {

template <class T>
void random_probes(const RandomProbes<T>& op, const ParallelFor& parallel_for) {
  const Tiles tiles(op.layout);
  for_tiles(tiles, parallel_for, [&](int64_t t) {
    const int64_t s = tiles.segment(t), block = tiles.block(s), probe = s / op.layout.n_blocks;
    const uint64_t key = probe_key(uint64_t(op.seed), uint64_t(op.block_ids[block]), uint64_t(op.first_probe + probe));
    const double unit = 1.0 / std::sqrt(double(op.layout.offsets[block + 1] - op.layout.offsets[block]));
    T* out = op.probes + tiles.start(t);
    const int64_t position = tiles.position(t), length = tiles.length(t);
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
  });
  if (op.distribution == kRademacher) return;
  for_tiles(tiles, parallel_for, [&](int64_t t) {
    scale(op.probes + tiles.start(t), 1.0 / std::sqrt(tiles.sum(op.partial, tiles.segment(t))), tiles.length(t));
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
