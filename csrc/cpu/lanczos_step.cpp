// lanczos_step on the CPU: tiles are spread over threads.
//
// A segment that stays in cache is stepped by one thread from its first pass to its last, so memory moves 4 of the 8
// elements: w, v, v_prev in, v_next out. A longer one is shared by all threads, pass by pass. Both add the same partial
// sums in the same order.
#include "ops/lanczos_step.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "vector_kernels.h"

namespace blockhess {
namespace {

constexpr int64_t kOwnTiles = 32;  // most tiles of a segment that is left to one thread: 12 MiB of float32 vectors

template <class T>
class Step {
 public:
  explicit Step(const LanczosStep<T>& op) : op_(op), layout_(op.layout) {}

  void run(const ParallelFor& parallel_for) const {
    const auto for_tiles = [&](const auto& body) {
      parallel_for(layout_.n_probes * layout_.n_tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) body(t);
      });
    };
    for_tiles([&](int64_t t) {
      const int64_t s = segment_of(t);
      if (shared(s))
        dot_of(s, t);
      else if (t == first_tile(s))
        own_step(s);
    });
    std::vector<int64_t> shared_segments;
    for (int64_t s = 0; s < layout_.n_probes * layout_.n_blocks; ++s)
      if (shared(s)) shared_segments.push_back(s);
    if (shared_segments.empty()) return;

    for (int64_t s : shared_segments) write_alpha(s);
    for_tiles([&](int64_t t) {
      if (shared(segment_of(t))) residual(segment_of(t), t);
    });
    for (int64_t s : shared_segments) close(s);
    for_tiles([&](int64_t t) {
      if (shared(segment_of(t))) normalize(segment_of(t), t);
    });
  }

 private:
  // Tiles are counted over all probes: t = probe n_tiles + tile.
  int64_t segment_of(int64_t t) const {
    return t / layout_.n_tiles * layout_.n_blocks + layout_.tiles[t % layout_.n_tiles].block;
  }
  int64_t block_of(int64_t s) const { return s % layout_.n_blocks; }
  int64_t first_tile(int64_t s) const {
    return s / layout_.n_blocks * layout_.n_tiles + layout_.tile_offsets[block_of(s)];
  }
  int64_t n_tiles(int64_t s) const { return layout_.tile_offsets[block_of(s) + 1] - layout_.tile_offsets[block_of(s)]; }

  // First element of a tile in the (n_probes, n) state, and its length.
  int64_t start(int64_t t) const { return t / layout_.n_tiles * layout_.n + layout_.tiles[t % layout_.n_tiles].start; }
  int64_t length(int64_t t) const {
    const Tile& tile = layout_.tiles[t % layout_.n_tiles];
    return tile.stop - tile.start;
  }

  bool shared(int64_t s) const { return n_tiles(s) > kOwnTiles; }
  bool running(int64_t s) const { return op_.recurrences.running(s); }
  bool deferred(int64_t s) const { return op_.basis_offsets[block_of(s)] >= 0; }

  double segment_sum(int64_t s) const {
    double sum = 0.0;
    for (int64_t t = first_tile(s); t < first_tile(s) + n_tiles(s); ++t) sum += op_.partial[t];
    return sum;
  }

  void dot_of(int64_t s, int64_t t) const {
    if (running(s)) op_.partial[t] = dot(op_.w + start(t), op_.v + start(t), length(t));
  }

  void write_alpha(int64_t s) const {
    if (running(s)) op_.recurrences.alpha[op_.recurrences.next(s)] = segment_sum(s);
  }

  void residual(int64_t s, int64_t t) const {
    const Recurrences& r = op_.recurrences;
    if (!running(s)) return;
    op_.partial[t] = three_term(op_.w + start(t), op_.v + start(t), op_.v_prev + start(t), r.alpha[r.next(s)],
                                r.last_beta(s), length(t));
  }

  // Writes beta and closes the step, or leaves the closing to reorthogonalize.
  void close(int64_t s) const {
    const Recurrences& r = op_.recurrences;
    if (!running(s)) return;
    double& beta = r.beta[r.next(s)];
    beta = std::sqrt(segment_sum(s));
    if (deferred(s) && std::isfinite(r.alpha[r.next(s)]) && std::isfinite(beta)) return;
    close_step(r, s, op_.limits[block_of(s)], std::numeric_limits<T>::epsilon());
  }

  void normalize(int64_t s, int64_t t) const {
    T* next = op_.v_prev + start(t);
    if (!running(s))
      std::fill_n(next, length(t), T(0));
    else if (!deferred(s))
      scale(next, 1.0 / op_.recurrences.last_beta(s), length(t));
  }

  void own_step(int64_t s) const {
    const int64_t begin = first_tile(s), end = begin + n_tiles(s);
    for (int64_t t = begin; t < end; ++t) dot_of(s, t);
    write_alpha(s);
    for (int64_t t = begin; t < end; ++t) residual(s, t);
    close(s);
    for (int64_t t = begin; t < end; ++t) normalize(s, t);
  }

  const LanczosStep<T>& op_;
  const Layout& layout_;
};

}  // namespace

void lanczos_step_cpu(const LanczosStep<float>& op, const ParallelFor& parallel_for) {
  Step<float>(op).run(parallel_for);
}
void lanczos_step_cpu(const LanczosStep<double>& op, const ParallelFor& parallel_for) {
  Step<double>(op).run(parallel_for);
}

}  // namespace blockhess
