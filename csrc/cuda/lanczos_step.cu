// lanczos_step on CUDA: one CTA per tile. A segment of one tile takes one launch, longer segments take five.
#include <limits>

#include "launch.cuh"
#include "ops/lanczos_step.h"
#include "tile.cuh"

namespace blockhess {
namespace {

template <class T, int N>
struct Pair {
  Pack<T, N> w, v;
};

template <class T, int N>
struct Triple {
  Pack<T, N> w, v, p;
};

// Returns this thread's part of <w, v> over a tile.
template <bool kAligned, class T>
__device__ double dot(const LanczosStep<T>& op, const Place& at) {
  double sum = 0.0;
  for_elements<T, 4>(
      at.begin, at.end,
      [&](auto width, int64_t i) {
        return Pair<T, width>{load<kAligned, width>(op.w + i), load<kAligned, width>(op.v + i)};
      },
      [&](auto width, int64_t, const auto& x) {
#pragma unroll
        for (int k = 0; k < width; ++k) sum += double(x.w.x[k]) * double(x.v.x[k]);
      });
  return sum;
}

// v_prev <- w - alpha v - beta_prev v_prev over a tile; returns this thread's part of the squared norm.
template <bool kAligned, class T>
__device__ double residual(const LanczosStep<T>& op, const Place& at, double alpha) {
  const double beta = op.recurrences.last_beta(at.segment);
  double sum = 0.0;
  for_elements<T, 2>(
      at.begin, at.end,
      [&](auto width, int64_t i) {
        return Triple<T, width>{load<kAligned, width>(op.w + i), load<kAligned, width>(op.v + i),
                                load<kAligned, width>(op.v_prev + i)};
      },
      [&](auto width, int64_t i, const auto& x) {
        Pack<T, width> r;
#pragma unroll
        for (int k = 0; k < width; ++k) {
          r.x[k] = T(double(x.w.x[k]) - alpha * double(x.v.x[k]) - beta * double(x.p.x[k]));
          sum += double(r.x[k]) * double(r.x[k]);
        }
        store<kAligned>(op.v_prev + i, r);
      });
  return sum;
}

template <class T>
__device__ bool running(const LanczosStep<T>& op, int64_t segment) {
  return op.recurrences.running(segment);
}

template <class T>
__device__ bool deferred(const LanczosStep<T>& op, int64_t segment) {
  return op.basis_offsets[segment % op.layout.n_blocks] >= 0;
}

// Writes beta and completes the step, unless reorthogonalize is to complete it. Called by one thread.
template <class T>
__device__ void close(const LanczosStep<T>& op, int64_t segment, double squared_norm, double eps) {
  const Recurrences& r = op.recurrences;
  double& beta = r.beta[r.next(segment)];
  beta = std::sqrt(squared_norm);
  if (deferred(op, segment) && std::isfinite(r.alpha[r.next(segment)]) && std::isfinite(beta)) return;
  close_step(r, segment, op.limits[segment % op.layout.n_blocks], eps);
}

// v_next = r / beta over a tile, or zero if the recurrence has ended.
template <bool kAligned, class T>
__device__ void normalize(const LanczosStep<T>& op, const Place& at) {
  if (running(op, at.segment) && deferred(op, at.segment)) return;
  const bool active = running(op, at.segment);
  const double factor = active ? 1.0 / op.recurrences.last_beta(at.segment) : 0.0;
  for_elements<T, 4>(
      at.begin, at.end,
      [&](auto width, int64_t i) { return active ? load<kAligned, width>(op.v_prev + i) : Pack<T, width>{}; },
      [&](auto width, int64_t i, const auto& r) {
        Pack<T, width> next;
#pragma unroll
        for (int k = 0; k < width; ++k) next.x[k] = T(double(r.x[k]) * factor);
        store<kAligned>(op.v_prev + i, next);
      });
}

template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads, 4) first_pass_kernel(LanczosStep<T> op, double eps) {
  const Layout& layout = op.layout;
  for (int64_t t = blockIdx.x; t < layout.n_probes * layout.n_tiles; t += gridDim.x) {
    const Place at = place(layout, t);
    if (running(op, at.segment)) {
      const double alpha = block_sum(dot<kAligned>(op, at));
      if (at.several_tiles) {
        if (threadIdx.x == 0) op.partial[t] = alpha;
      } else {
        const double squared_norm = block_sum(residual<kAligned>(op, at, alpha));
        if (threadIdx.x == 0) {
          op.recurrences.alpha[op.recurrences.next(at.segment)] = alpha;
          close(op, at.segment, squared_norm, eps);
        }
        __syncthreads();
      }
    }
    if (!at.several_tiles) normalize<kAligned>(op, at);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) alpha_kernel(LanczosStep<T> op) {
  const Layout& layout = op.layout;
  for (int64_t s = blockIdx.x; s < layout.n_probes * layout.n_blocks; s += gridDim.x) {
    if (!several_tiles(layout, s % layout.n_blocks) || !running(op, s)) continue;
    const double alpha = segment_sum(layout, s, op.partial, 1);
    if (threadIdx.x == 0) op.recurrences.alpha[op.recurrences.next(s)] = alpha;
  }
}

template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads, 4) residual_kernel(LanczosStep<T> op) {
  const Layout& layout = op.layout;
  for (int64_t t = blockIdx.x; t < layout.n_probes * layout.n_tiles; t += gridDim.x) {
    const Place at = place(layout, t);
    if (!at.several_tiles || !running(op, at.segment)) continue;
    const double alpha = op.recurrences.alpha[op.recurrences.next(at.segment)];
    const double sum = block_sum(residual<kAligned>(op, at, alpha));
    if (threadIdx.x == 0) op.partial[t] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) close_kernel(LanczosStep<T> op, double eps) {
  const Layout& layout = op.layout;
  for (int64_t s = blockIdx.x; s < layout.n_probes * layout.n_blocks; s += gridDim.x) {
    if (!several_tiles(layout, s % layout.n_blocks) || !running(op, s)) continue;
    const double squared_norm = segment_sum(layout, s, op.partial, 1);
    if (threadIdx.x == 0) close(op, s, squared_norm, eps);
  }
}

template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads, 4) normalize_kernel(LanczosStep<T> op) {
  const Layout& layout = op.layout;
  for (int64_t t = blockIdx.x; t < layout.n_probes * layout.n_tiles; t += gridDim.x) {
    const Place at = place(layout, t);
    if (at.several_tiles) normalize<kAligned>(op, at);
  }
}

template <bool kAligned, class T>
const char* step(const LanczosStep<T>& op, const CudaQueue& queue) {
  const Layout& layout = op.layout;
  const double eps = std::numeric_limits<T>::epsilon();
  const int64_t n_tiles = layout.n_probes * layout.n_tiles, n_segments = layout.n_probes * layout.n_blocks;
  Launcher launch(queue);
  launch(first_pass_kernel<kAligned, T>, n_tiles, kThreads, 0, op, eps);
  if (layout.n_tiles > layout.n_blocks) {  // some segment has several tiles
    launch(alpha_kernel<T>, n_segments, kThreads, 0, op);
    launch(residual_kernel<kAligned, T>, n_tiles, kThreads, 0, op);
    launch(close_kernel<T>, n_segments, kThreads, 0, op, eps);
    launch(normalize_kernel<kAligned, T>, n_tiles, kThreads, 0, op);
  }
  return launch.error();
}

template <class T>
const char* dispatch(const LanczosStep<T>& op, const CudaQueue& queue) {
  return aligned(op.w, op.v, op.v_prev) ? step<true>(op, queue) : step<false>(op, queue);
}

}  // namespace

const char* lanczos_step_cuda(const LanczosStep<float>& op, const CudaQueue& queue) { return dispatch(op, queue); }
const char* lanczos_step_cuda(const LanczosStep<double>& op, const CudaQueue& queue) { return dispatch(op, queue); }

}  // namespace blockhess
