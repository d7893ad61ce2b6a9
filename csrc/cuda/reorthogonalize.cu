// reorthogonalize on CUDA: c = V^T r and r <- r - V c as matrix-vector products per tile of the blocks in the basis.
// One CTA computes a tile's coefficients, kRows at a time; a few share a tile if there are too few tiles to fill the
// device. One CTA updates a tile with all rows.
//
// The basis dominates the memory traffic and is read in aligned packs; r has another alignment and is read element by
// element. The coefficients of a segment overwrite the partial sums of its first tile.
#include <algorithm>
#include <limits>

#include "launch.cuh"
#include "ops/reorthogonalize.h"
#include "tile.cuh"

namespace blockhess {
namespace {

constexpr int kRows = 8;
constexpr int64_t kCtasPerProcessor = 8;  // fill the device in more than one wave

// The elements of a tile in a basis row and in r.
template <class T>
struct Columns {
  int64_t begin, end;  // elements of a basis row
  T* r;                // r[i] belongs to element i of the row
};

template <class T>
__device__ Columns<T> columns(const Reorthogonalize<T>& op, const Place& at) {
  const int64_t probe = at.segment / op.layout.n_blocks, block = at.segment % op.layout.n_blocks;
  const int64_t begin = probe * op.n_basis + op.basis_offsets[block] + at.position;
  return {begin, begin + at.end - at.begin, op.r + (at.begin - begin)};
}

template <class T, int N>
struct Rows {
  Pack<T, N> r, v[kRows];
};

// Number of filled rows among first_row ... first_row + kRows - 1, where rows 0 ... count - 1 are filled.
__device__ inline int filled_rows(int64_t first_row, int64_t count) {
  return int(count - first_row < kRows ? count - first_row : kRows);
}

// Loads N elements from element i on of `rows` basis rows from first_row on; the other v[k] are zero.
template <bool kAligned, int N, class T>
__device__ void load_rows(const Reorthogonalize<T>& op, int64_t first_row, int rows, int64_t i,
                          Pack<T, N> (&v)[kRows]) {
  const int64_t row = op.layout.n_probes * op.n_basis;
#pragma unroll
  for (int k = 0; k < kRows; ++k)
    v[k] = k < rows ? load<kAligned, N>(op.basis + (first_row + k) * row + i) : Pack<T, N>{};
}

// Number, as in Place, of the i-th tile of the blocks in the basis.
template <class T>
__device__ int64_t basis_tile(const Reorthogonalize<T>& op, int64_t i) {
  return i / op.n_basis_tiles * op.layout.n_tiles + op.basis_tiles[i % op.n_basis_tiles];
}

// partial[tile, k] = the tile's part of <v_k, r>. Of the `split` CTAs of a tile, each takes every split-th group of
// rows that are filled; the host does not know how many are. Unaligned loads need more registers, so fewer CTAs fit on
// an SM.
template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads, kAligned ? 3 : 2) coefficient_kernel(Reorthogonalize<T> op, int64_t split) {
  const Layout& layout = op.layout;
  for (int64_t task = blockIdx.x; task < layout.n_probes * op.n_basis_tiles * split; task += gridDim.x) {
    const int64_t t = basis_tile(op, task / split);
    const Place at = place(layout, t);
    const int64_t count = op.projects(at.segment) ? op.count(at.segment) : 0;
    const Columns<T> tile = columns(op, at);
    for (int64_t first_row = task % split * kRows; first_row < count; first_row += split * kRows) {
      const int rows = filled_rows(first_row, count);
      double sum[kRows] = {};
      for_elements<T, 1>(
          tile.begin, tile.end,
          [&](auto width, int64_t i) {
            Rows<T, width> x;
            x.r = load<false, width>(tile.r + i);
            load_rows<kAligned>(op, first_row, rows, i, x.v);
            return x;
          },
          [&](auto width, int64_t, const auto& x) {
#pragma unroll
            for (int k = 0; k < kRows; ++k)
#pragma unroll
              for (int e = 0; e < width; ++e) sum[k] += double(x.v[k].x[e]) * double(x.r.x[e]);
          });
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const double total = block_sum(sum[k]);
        if (threadIdx.x == 0 && k < rows) op.partial[t * (op.capacity + 1) + first_row + k] = total;
      }
    }
  }
}

// c_k = sum over the tiles of a segment, overwriting the partial sums of its first tile.
template <class T>
__global__ void __launch_bounds__(kThreads) segment_coefficient_kernel(Reorthogonalize<T> op) {
  const Layout& layout = op.layout;
  for (int64_t s = blockIdx.x; s < layout.n_probes * layout.n_blocks; s += gridDim.x) {
    const int64_t probe = s / layout.n_blocks, block = s % layout.n_blocks;
    if (!op.projects(s) || !several_tiles(layout, block)) continue;
    double* partial = op.partial + (probe * layout.n_tiles + layout.tile_offsets[block]) * (op.capacity + 1);
    const int64_t tiles = layout.tile_offsets[block + 1] - layout.tile_offsets[block];
    for (int64_t k = threadIdx.x, count = op.count(s); k < count; k += kThreads) {
      double sum = 0.0;
      for (int64_t t = 0; t < tiles; ++t) sum += partial[t * (op.capacity + 1) + k];
      partial[k] = sum;
    }
  }
}

// r <- r - V c;  partial[tile, capacity] = the tile's part of |r|^2
template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads) update_kernel(Reorthogonalize<T> op) {
  const Layout& layout = op.layout;
  for (int64_t i = blockIdx.x; i < layout.n_probes * op.n_basis_tiles; i += gridDim.x) {
    const int64_t t = basis_tile(op, i);
    const Place at = place(layout, t);
    if (!op.projects(at.segment)) continue;
    const int64_t count = op.count(at.segment);
    const Columns<T> tile = columns(op, at);
    const double* c = op.partial + at.first_tile * (op.capacity + 1);
    double sum = 0.0;
    for_elements<T, 1>(
        tile.begin, tile.end, [&](auto width, int64_t i) { return load<false, width>(tile.r + i); },
        [&](auto width, int64_t i, const auto& old) {
          double r[width];
#pragma unroll
          for (int e = 0; e < width; ++e) r[e] = old.x[e];
          for (int64_t first_row = 0; first_row < count; first_row += kRows) {
            const int rows = filled_rows(first_row, count);
            Pack<T, width> v[kRows];
            load_rows<kAligned>(op, first_row, rows, i, v);
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
              const double c_k = k < rows ? c[first_row + k] : 0.0;
#pragma unroll
              for (int e = 0; e < width; ++e) r[e] -= c_k * double(v[k].x[e]);
            }
          }
          Pack<T, width> rounded;
#pragma unroll
          for (int e = 0; e < width; ++e) {
            rounded.x[e] = T(r[e]);
            sum += double(rounded.x[e]) * double(rounded.x[e]);
          }
          store<false>(tile.r + i, rounded);
        });
    sum = block_sum(sum);
    if (threadIdx.x == 0) op.partial[t * (op.capacity + 1) + op.capacity] = sum;
  }
}

// beta = |r|; completes the step. Stores the factor in v_next = factor r in place of the first coefficient: 0 if the
// recurrence ends here, -1 if the segment does not take part.
template <class T>
__global__ void __launch_bounds__(kThreads) close_kernel(Reorthogonalize<T> op, double eps) {
  const Layout& layout = op.layout;
  for (int64_t s = blockIdx.x; s < layout.n_probes * layout.n_blocks; s += gridDim.x) {
    const int64_t probe = s / layout.n_blocks, block = s % layout.n_blocks;
    double factor = -1.0;
    const bool projected = op.projects(s);
    if (op.takes_part(s)) {
      const double squared_norm = projected ? segment_sum(layout, s, op.partial + op.capacity, op.capacity + 1) : 0.0;
      if (threadIdx.x == 0) {
        if (projected) op.recurrences.beta[op.recurrences.next(s)] = std::sqrt(squared_norm);
        factor = close_step(op.recurrences, s, op.limits[block], eps);
      }
    }
    if (threadIdx.x == 0)
      op.partial[(probe * layout.n_tiles + layout.tile_offsets[block]) * (op.capacity + 1)] = factor;
  }
}

// v_next = factor r, stored as the next row of the basis too; zero if the recurrence ends here.
template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads) normalize_kernel(Reorthogonalize<T> op) {
  const Layout& layout = op.layout;
  for (int64_t i = blockIdx.x; i < layout.n_probes * op.n_basis_tiles; i += gridDim.x) {
    const int64_t t = basis_tile(op, i);
    const Place at = place(layout, t);
    const double factor = op.partial[at.first_tile * (op.capacity + 1)];
    if (factor < 0.0) continue;
    const int64_t filled = op.recurrences.steps[at.segment];  // includes this step
    const bool stored = factor > 0.0 && filled < op.capacity;
    T* row = op.basis + filled * layout.n_probes * op.n_basis;
    const Columns<T> tile = columns(op, at);
    for_elements<T, 4>(
        tile.begin, tile.end,
        [&](auto width, int64_t i) { return factor > 0.0 ? load<false, width>(tile.r + i) : Pack<T, width>{}; },
        [&](auto width, int64_t i, const auto& r) {
          Pack<T, width> next;
#pragma unroll
          for (int e = 0; e < width; ++e) next.x[e] = T(double(r.x[e]) * factor);
          store<false>(tile.r + i, next);
          if (stored) store<kAligned>(row + i, next);
        });
  }
}

template <bool kAligned, class T>
const char* reorthogonalize(const Reorthogonalize<T>& op, const CudaQueue& queue) {
  const Layout& layout = op.layout;
  const int64_t n_tiles = layout.n_probes * op.n_basis_tiles, n_segments = layout.n_probes * layout.n_blocks;
  if (n_tiles == 0) return nullptr;
  Launcher launch(queue);
  const int64_t groups = (op.capacity + kRows - 1) / kRows;
  const int64_t wanted = kCtasPerProcessor * launch.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t split = std::min(groups, (wanted + n_tiles - 1) / n_tiles);
  for (int pass = 0; pass < 2; ++pass) {
    launch(coefficient_kernel<kAligned, T>, n_tiles * split, kThreads, 0, op, split);
    if (layout.n_tiles > layout.n_blocks) launch(segment_coefficient_kernel<T>, n_segments, kThreads, 0, op);
    launch(update_kernel<kAligned, T>, n_tiles, kThreads, 0, op);
  }
  const double eps = std::numeric_limits<T>::epsilon();
  launch(close_kernel<T>, n_segments, kThreads, 0, op, eps);
  launch(normalize_kernel<kAligned, T>, n_tiles, kThreads, 0, op);
  return launch.error();
}

template <class T>
const char* dispatch(const Reorthogonalize<T>& op, const CudaQueue& queue) {
  const bool rows_aligned = op.layout.n_probes * op.n_basis % kPack<T> == 0;
  return aligned(op.basis) && rows_aligned ? reorthogonalize<true>(op, queue) : reorthogonalize<false>(op, queue);
}

}  // namespace

const char* reorthogonalize_cuda(const Reorthogonalize<float>& op, const CudaQueue& queue) {
  return dispatch(op, queue);
}
const char* reorthogonalize_cuda(const Reorthogonalize<double>& op, const CudaQueue& queue) {
  return dispatch(op, queue);
}

}  // namespace blockhess
