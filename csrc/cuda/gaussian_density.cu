// gaussian_density on CUDA: one CTA per row and chunk of the grid, one thread per grid point.
//
// A CTA selects the nodes within kWindow sigma of its chunk, in their order; each thread then adds those within kWindow
// sigma of its grid point.
#include "launch.cuh"
#include "ops/gaussian_density.h"

namespace blockhess {
namespace {

constexpr int kThreads = 256;  // grid points per chunk, and nodes tested at a time
constexpr int kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) density_kernel(GaussianDensity op) {
  __shared__ double node[kThreads], weight[kThreads];
  __shared__ int selected_by_warp[kWarps];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t n_chunks = (op.n_grid + kThreads - 1) / kThreads;
  for (int64_t task = blockIdx.x; task < op.n_rows * n_chunks; task += gridDim.x) {
    const int64_t row = task / n_chunks, first = task % n_chunks * kThreads, g = first + thread;
    const int64_t last = (first + kThreads < op.n_grid ? first + kThreads : op.n_grid) - 1;
    const double sigma = op.sigma[row], window = kWindow * sigma, peak = 0.3989422804014327 / sigma;
    const double inverse = 1.0 / sigma, lowest = op.grid[first], highest = op.grid[last];
    const double point = op.grid[g < op.n_grid ? g : last];
    double density = 0.0;
    for (int64_t first_node = 0; first_node < op.n_nodes; first_node += kThreads) {
      const int64_t k = first_node + thread;
      const double x = k < op.n_nodes ? op.nodes[row * op.n_nodes + k] : 0.0;
      const double w = k < op.n_nodes ? op.weights[row * op.n_nodes + k] : 0.0;
      const bool acts = w != 0.0 && x - window <= highest && x + window >= lowest;
      const unsigned ballot = __ballot_sync(0xffffffffu, acts);
      if (lane == 0) selected_by_warp[warp] = __popc(ballot);
      __syncthreads();
      int slot = __popc(ballot & ((1u << lane) - 1u)), selected = 0;
#pragma unroll
      for (int v = 0; v < kWarps; ++v) {
        slot += v < warp ? selected_by_warp[v] : 0;
        selected += selected_by_warp[v];
      }
      if (acts) {
        node[slot] = x;
        weight[slot] = w * peak;
      }
      __syncthreads();
      for (int i = 0; i < selected; ++i) {
        if (!(point >= node[i] - window && point <= node[i] + window)) continue;
        const double z = (point - node[i]) * inverse;
        density += weight[i] * std::exp(-0.5 * z * z);
      }
    }
    if (g < op.n_grid) op.density[row * op.n_grid + g] = density;
  }
}

}  // namespace

const char* gaussian_density_cuda(const GaussianDensity& op, const CudaQueue& queue) {
  Launcher launch(queue);
  launch(density_kernel, op.n_rows * ((op.n_grid + kThreads - 1) / kThreads), kThreads, 0, op);
  return launch.error();
}

}  // namespace blockhess
