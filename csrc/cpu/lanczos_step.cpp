// lanczos_step on the CPU: tiles are spread over threads; a segment of one tile is finished while it is in cache.
#include "ops/lanczos_step.h"

#include <algorithm>
#include <limits>

#include "vector_kernels.h"

namespace blockhess {
namespace {

template <class T>
class Step {
 public:
  explicit Step(const LanczosStep<T>& op) : op_(op), layout_(op.layout) {}

  void run(const ParallelFor& parallel_for) const {
    const int64_t n_tiles = layout_.n_probes * layout_.n_tiles, n_segments = layout_.n_probes * layout_.n_blocks;
    parallel_for(n_tiles, 1, [this](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Place at = place(t);
        if (!at.several_tiles)
          whole_segment(at);
        else if (running(at.segment))
          op_.partial[t] = dot(op_.w + at.start, op_.v + at.start, at.length);
      }
    });
    for (int64_t s = 0; s < n_segments; ++s)
      if (several_tiles(s) && running(s)) op_.recurrences.alpha[op_.recurrences.next(s)] = segment_sum(s);
    parallel_for(n_tiles, 1, [this](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Place at = place(t);
        if (at.several_tiles && running(at.segment)) op_.partial[t] = residual(at);
      }
    });
    for (int64_t s = 0; s < n_segments; ++s)
      if (several_tiles(s) && running(s)) close(s, segment_sum(s));
    parallel_for(n_tiles, 1, [this](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Place at = place(t);
        if (at.several_tiles) normalize(at);
      }
    });
  }

 private:
  struct Place {
    int64_t segment, start, length;  // start: element of the (n_probes, n) state
    bool several_tiles;
  };

  Place place(int64_t t) const {
    const int64_t probe = t / layout_.n_tiles;
    const Tile& tile = layout_.tiles[t % layout_.n_tiles];
    const int64_t segment = probe * layout_.n_blocks + tile.block;
    return {segment, probe * layout_.n + tile.start, tile.stop - tile.start, several_tiles(segment)};
  }

  bool running(int64_t segment) const { return op_.recurrences.running(segment); }

  bool several_tiles(int64_t segment) const {
    const int64_t block = segment % layout_.n_blocks;
    return layout_.tile_offsets[block + 1] - layout_.tile_offsets[block] > 1;
  }

  bool deferred(int64_t segment) const { return op_.basis_offsets[segment % layout_.n_blocks] >= 0; }

  double segment_sum(int64_t segment) const {
    const int64_t probe = segment / layout_.n_blocks, block = segment % layout_.n_blocks;
    const double* partial = op_.partial + probe * layout_.n_tiles;
    double sum = 0.0;
    for (int64_t t = layout_.tile_offsets[block]; t < layout_.tile_offsets[block + 1]; ++t) sum += partial[t];
    return sum;
  }

  double residual(const Place& at) const {
    const Recurrences& r = op_.recurrences;
    return three_term(op_.w + at.start, op_.v + at.start, op_.v_prev + at.start, r.alpha[r.next(at.segment)],
                      r.last_beta(at.segment), at.length);
  }

  // Writes beta and closes the step, or leaves the closing to reorthogonalize.
  void close(int64_t segment, double squared_norm) const {
    const Recurrences& r = op_.recurrences;
    double& beta = r.beta[r.next(segment)];
    beta = std::sqrt(squared_norm);
    if (deferred(segment) && std::isfinite(r.alpha[r.next(segment)]) && std::isfinite(beta)) return;
    close_step(r, segment, op_.limits[segment % layout_.n_blocks], std::numeric_limits<T>::epsilon());
  }

  void normalize(const Place& at) const {
    T* next = op_.v_prev + at.start;
    if (!running(at.segment))
      std::fill_n(next, at.length, T(0));
    else if (!deferred(at.segment))
      scale(next, 1.0 / op_.recurrences.last_beta(at.segment), at.length);
  }

  void whole_segment(const Place& at) const {
    if (running(at.segment)) {
      op_.recurrences.alpha[op_.recurrences.next(at.segment)] = dot(op_.w + at.start, op_.v + at.start, at.length);
      close(at.segment, residual(at));
    }
    normalize(at);
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
