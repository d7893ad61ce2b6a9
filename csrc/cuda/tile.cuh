// Loops over the elements of a tile and sums over a CTA, shared by the CUDA implementations of the ops.
//
// Elements are read in packs of 16 bytes, aligned relative to the start of the array; elements before the first and
// after the last full pack of a tile are read one by one.
//
// Guarantees: the thread that handles an element depends on the bounds of the tile only, not on the address of the
// array; so do the bits of a sum.
#pragma once

#include <cstdint>

#include "ops/common.h"

namespace blockhess {

constexpr int kThreads = 256;

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
};

template <int N>
struct Width {
  __host__ __device__ constexpr operator int() const { return N; }
};

// Loads N elements from p; kAligned: p is a multiple of their size.
template <bool kAligned, int N, class T>
__device__ Pack<T, N> load(const T* p) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
  } else {
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.x[k] = p[k];
    return pack;
  }
}

template <bool kAligned, int N, class T>
__device__ void store(T* p, const Pack<T, N>& pack) {
  if constexpr (kAligned) {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) p[k] = pack.x[k];
  }
}

// Calls use(width, i, load(width, i)) on pieces i : i + width that cover begin : end, for the pieces of this thread;
// kUnroll loads are issued before the first is used.
template <class T, int kUnroll, class Load, class Use>
__device__ void for_elements(int64_t begin, int64_t end, const Load& load, const Use& use) {
  constexpr int64_t kWidth = kPack<T>, kStride = kWidth * kThreads;
  const int64_t up = (begin + kWidth - 1) / kWidth * kWidth, down = end / kWidth * kWidth;
  const int64_t first = up < end ? up : end, last = down > first ? down : first;
  const int thread = threadIdx.x;
  if (begin + thread < first) use(Width<1>(), begin + thread, load(Width<1>(), begin + thread));
  int64_t i = first + kWidth * thread;
  for (; i + (kUnroll - 1) * kStride < last; i += kUnroll * kStride) {
    decltype(load(Width<kWidth>(), i)) loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load(Width<kWidth>(), i + u * kStride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) use(Width<kWidth>(), i + u * kStride, loaded[u]);
  }
  for (; i < last; i += kStride) use(Width<kWidth>(), i, load(Width<kWidth>(), i));
  if (last + thread < end) use(Width<1>(), last + thread, load(Width<1>(), last + thread));
}

// Returns the sum of `value` over the CTA's threads, in a fixed order, to every thread. All threads must call it.
template <class Value>
__device__ Value block_sum(Value value) {
  static_assert(kThreads % 32 == 0, "whole warps");
  __shared__ Value warp_sums[kThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  __syncthreads();  // warp_sums of the previous call have been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  Value sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += warp_sums[w];
  return sum;
}

// Returns the sum of partial[t * stride] over a segment's tiles to every thread. All threads must call it.
__device__ inline double segment_sum(const Layout& layout, int64_t segment, const double* partial, int64_t stride) {
  const int64_t probe = segment / layout.n_blocks, block = segment % layout.n_blocks;
  const double* mine = partial + probe * layout.n_tiles * stride;
  double sum = 0.0;
  for (int64_t t = layout.tile_offsets[block] + threadIdx.x; t < layout.tile_offsets[block + 1]; t += kThreads)
    sum += mine[t * stride];
  return block_sum(sum);
}

// Location of tile t = probe * n_tiles + tile.
struct Place {
  int64_t segment, begin, end;  // elements begin : end of the (n_probes, n) vector set
  int64_t first_tile;           // of the segment, numbered like t
  int64_t position;             // of `begin` within the segment
  bool several_tiles;
};

__device__ inline bool several_tiles(const Layout& layout, int64_t block) {
  return layout.tile_offsets[block + 1] - layout.tile_offsets[block] > 1;
}

__device__ inline Place place(const Layout& layout, int64_t t) {
  const int64_t probe = t / layout.n_tiles;
  const Tile tile = layout.tiles[t - probe * layout.n_tiles];
  return {probe * layout.n_blocks + tile.block,
          probe * layout.n + tile.start,
          probe * layout.n + tile.stop,
          probe * layout.n_tiles + layout.tile_offsets[tile.block],
          tile.start - layout.offsets[tile.block],
          several_tiles(layout, tile.block)};
}

// Whether all pointers are multiples of 16 bytes.
template <class... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

}  // namespace blockhess
