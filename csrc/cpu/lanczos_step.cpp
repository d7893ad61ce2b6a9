// lanczos_step on the CPU.
//
// A segment that fits in cache is left to one thread for all passes, so memory moves only 4 of the 8 elements: w, v and
// v_prev are read and v_next is written. A segment that is longer, or a large part of all the work, is shared: its
// tiles are distributed over all threads, pass by pass. Both add the same partial sums in the same order.
#include "ops/lanczos_step.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "tiles.h"
#include "vector_kernels.h"

namespace blockhess {
namespace {

// The largest segment for one thread and the smallest amount of shared work per pass, in tiles: 12 MiB of float32 w, v
// and v_prev. Measured on 2 cores with 32 MiB of cache: sharing slows down smaller segments but not larger ones.
constexpr int64_t kOwnTiles = 32;
// A segment for one thread has at most 1 / kLargePart of all tiles, so the other threads do not wait long for it.
constexpr int64_t kLargePart = 16;

template <class T>
class Step {
 public:
  explicit Step(const LanczosStep<T>& op) : op_(op), tiles_(op.layout) {}

  void run(const ParallelFor& parallel_for) const {
    for_tiles(tiles_, parallel_for, [this](int64_t t) {
      if (tiles_.position(t) > 0) return;  // left to the thread of the first tile
      const int64_t s = tiles_.segment(t), block = tiles_.block(s);
      if (shared(block)) return;
      if (running(s))
        whole_segment(s);
      else
        std::fill_n(op_.v_prev + tiles_.start(t), op_.layout.offsets[block + 1] - op_.layout.offsets[block], T(0));
    });
    std::vector<int64_t> segments, tiles;  // a group of shared segments that fits in cache, or a single larger one
    for (int64_t s : shared_segments()) {
      segments.push_back(s);
      for (int64_t t = tiles_.begin(s); t < tiles_.end(s); ++t) tiles.push_back(t);
      if (int64_t(tiles.size()) < kOwnTiles) continue;
      step_together(segments, tiles, parallel_for);
      segments.clear();
      tiles.clear();
    }
    step_together(segments, tiles, parallel_for);
  }

 private:
  bool shared(int64_t block) const {
    const int64_t n_tiles = op_.layout.tile_offsets[block + 1] - op_.layout.tile_offsets[block];
    return n_tiles > kOwnTiles || (n_tiles > 1 && n_tiles * kLargePart > tiles_.count());
  }
  std::vector<int64_t> shared_segments() const {
    std::vector<int64_t> found;
    for (int64_t block = 0; block < op_.layout.n_blocks; ++block)
      if (shared(block)) found.push_back(block);
    const size_t n_blocks = found.size();
    for (size_t i = n_blocks; i < n_blocks * op_.layout.n_probes; ++i)
      found.push_back(found[i - n_blocks] + op_.layout.n_blocks);
    return found;
  }
  bool running(int64_t s) const { return op_.recurrences.running(s); }
  bool deferred(int64_t s) const { return op_.basis_offsets[tiles_.block(s)] >= 0; }

  void whole_segment(int64_t s) const {
    const int64_t begin = tiles_.begin(s), end = tiles_.end(s);
    for (int64_t t = begin; t < end; ++t) dot_with_v(t);
    write_alpha(s);
    for (int64_t t = end - 1; t >= begin; --t) subtract(t);  // backward: the last tiles are still in cache
    close(s);
    for (int64_t t = begin; t < end; ++t) normalize(t);
  }

  void step_together(const std::vector<int64_t>& segments, const std::vector<int64_t>& tiles,
                     const ParallelFor& parallel_for) const {
    const auto pass = [&](void (Step::*over_tile)(int64_t) const) {
      parallel_for(tiles.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) (this->*over_tile)(tiles[i]);
      });
    };
    pass(&Step::dot_with_v);
    for (int64_t s : segments) write_alpha(s);
    pass(&Step::subtract);
    for (int64_t s : segments) close(s);
    pass(&Step::normalize);
  }

  void dot_with_v(int64_t t) const {
    const int64_t s = tiles_.segment(t), start = tiles_.start(t);
    if (running(s)) op_.partial[t] = dot(op_.w + start, op_.v + start, tiles_.length(t));
  }

  void write_alpha(int64_t s) const {
    if (running(s)) op_.recurrences.alpha[op_.recurrences.next(s)] = tiles_.sum(op_.partial, s);
  }

  void subtract(int64_t t) const {
    const Recurrences& r = op_.recurrences;
    const int64_t s = tiles_.segment(t), start = tiles_.start(t);
    if (!running(s)) return;
    op_.partial[t] = three_term(op_.w + start, op_.v + start, op_.v_prev + start, r.alpha[r.next(s)], r.last_beta(s),
                                tiles_.length(t));
  }

  // Writes beta and completes the step, unless reorthogonalize is to complete it.
  void close(int64_t s) const {
    const Recurrences& r = op_.recurrences;
    if (!running(s)) return;
    double& beta = r.beta[r.next(s)];
    beta = std::sqrt(tiles_.sum(op_.partial, s));
    if (deferred(s) && std::isfinite(r.alpha[r.next(s)]) && std::isfinite(beta)) return;
    close_step(r, s, op_.limits[tiles_.block(s)], std::numeric_limits<T>::epsilon());
  }

  void normalize(int64_t t) const {
    const int64_t s = tiles_.segment(t);
    T* next = op_.v_prev + tiles_.start(t);
    if (!running(s))
      std::fill_n(next, tiles_.length(t), T(0));
    else if (!deferred(s))
      scale(next, 1.0 / op_.recurrences.last_beta(s), tiles_.length(t));
  }

  const LanczosStep<T>& op_;
  const Tiles tiles_;
};

}  // namespace

void lanczos_step_cpu(const LanczosStep<float>& op, const ParallelFor& parallel_for) {
  Step<float>(op).run(parallel_for);
}
void lanczos_step_cpu(const LanczosStep<double>& op, const ParallelFor& parallel_for) {
  Step<double>(op).run(parallel_for);
}

}  // namespace blockhess
