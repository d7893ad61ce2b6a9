// random_probes on CUDA: one CTA fills a tile, four elements per thread and Philox counter; then Gaussian segments are
// divided by their norms.
#include "launch.cuh"
#include "ops/random_probes.h"
#include "tile.cuh"

namespace blockhess {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(RandomProbes<T> op) {
  const Layout& layout = op.layout;
  for (int64_t t = blockIdx.x; t < layout.n_probes * layout.n_tiles; t += gridDim.x) {
    const Place at = place(layout, t);
    const int64_t probe = at.segment / layout.n_blocks, block = at.segment % layout.n_blocks;
    const uint64_t key = probe_key(uint64_t(op.seed), uint64_t(op.block_ids[block]), uint64_t(op.first_probe + probe));
    const double unit = 1.0 / std::sqrt(double(layout.offsets[block + 1] - layout.offsets[block]));
    const int64_t length = at.end - at.begin;
    T* out = op.probes + at.begin;
    double sum = 0.0;
    for (int64_t i = 4 * int64_t(threadIdx.x); i < length; i += 4 * kThreads) {
      const PhiloxWords words = philox(uint64_t(at.position + i) / 4, 0, key);
      double value[4];
      if (op.distribution == kRademacher) {
#pragma unroll
        for (int k = 0; k < 4; ++k) value[k] = words.word[k] >> 31 ? -unit : unit;
      } else {
        box_muller(words.word[0], words.word[1], &value[0], &value[1]);
        box_muller(words.word[2], words.word[3], &value[2], &value[3]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (i + k >= length) break;
        out[i + k] = T(value[k]);
        sum += value[k] * value[k];
      }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) op.partial[t] = sum;
  }
}

// Overwrites the partial sum of each segment's first tile by 1 / |segment|.
template <class T>
__global__ void __launch_bounds__(kThreads) factor_kernel(RandomProbes<T> op) {
  const Layout& layout = op.layout;
  for (int64_t s = blockIdx.x; s < layout.n_probes * layout.n_blocks; s += gridDim.x) {
    const double sum = segment_sum(layout, s, op.partial, 1);
    if (threadIdx.x == 0)
      op.partial[s / layout.n_blocks * layout.n_tiles + layout.tile_offsets[s % layout.n_blocks]] =
          1.0 / std::sqrt(sum);
  }
}

template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(RandomProbes<T> op) {
  const Layout& layout = op.layout;
  for (int64_t t = blockIdx.x; t < layout.n_probes * layout.n_tiles; t += gridDim.x) {
    const Place at = place(layout, t);
    const double factor = op.partial[at.first_tile];
    for_elements<T, 4>(
        at.begin, at.end, [&](auto width, int64_t i) { return load<kAligned, width>(op.probes + i); },
        [&](auto width, int64_t i, auto x) {
#pragma unroll
          for (int k = 0; k < width; ++k) x.x[k] = T(double(x.x[k]) * factor);
          store<kAligned>(op.probes + i, x);
        });
  }
}

template <class T>
const char* random_probes(const RandomProbes<T>& op, const CudaQueue& queue) {
  const Layout& layout = op.layout;
  const int64_t n_tiles = layout.n_probes * layout.n_tiles, n_segments = layout.n_probes * layout.n_blocks;
  Launcher launch(queue);
  launch(fill_kernel<T>, n_tiles, kThreads, 0, op);
  if (op.distribution == kGaussian) {
    launch(factor_kernel<T>, n_segments, kThreads, 0, op);
    launch(aligned(op.probes) ? scale_kernel<true, T> : scale_kernel<false, T>, n_tiles, kThreads, 0, op);
  }
  return launch.error();
}

}  // namespace

const char* random_probes_cuda(const RandomProbes<float>& op, const CudaQueue& queue) {
  return random_probes(op, queue);
}
const char* random_probes_cuda(const RandomProbes<double>& op, const CudaQueue& queue) {
  return random_probes(op, queue);
}

}  // namespace blockhess
