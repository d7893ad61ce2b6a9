// random_probes: a random unit vector per segment, by the counter-based generator Philox4x32-10 (Salmon et al. 2011).
//
// The element at `position` inside block `id` of probe `p` is a pure function of (seed, p, id, position):
//   key  = first two words of Philox(counter = (id, p), key = seed)
//   word = word (position mod 4) of Philox(counter = (position div 4, 0), key)
// Rademacher: +-1 / sqrt(dim), the sign being the top bit. Gaussian: Box-Muller on words 0 and 1 and on words 2 and 3,
// then division by the norm of the segment.
//
// Guarantees: the words are the same on every machine and device, however the work is divided. So are Rademacher
// probes; Gaussian probes agree to a few ulp across devices. float32 and float64 probes are the same vectors up to
// rounding.
#pragma once

#include "common.h"

namespace blockhess {

enum Distribution : int64_t { kGaussian = 0, kRademacher = 1 };

struct PhiloxWords {
  uint32_t word[4];
};

inline BLOCKHESS_HD PhiloxWords philox(uint64_t counter_low, uint64_t counter_high, uint64_t key) {
  uint32_t c0 = uint32_t(counter_low), c1 = uint32_t(counter_low >> 32);
  uint32_t c2 = uint32_t(counter_high), c3 = uint32_t(counter_high >> 32);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

inline BLOCKHESS_HD uint64_t probe_key(uint64_t seed, uint64_t block_id, uint64_t probe) {
  const PhiloxWords words = philox(block_id, probe, seed);
  return uint64_t(words.word[0]) | uint64_t(words.word[1]) << 32;
}

// Two independent standard normals from two words. (a + 1/2) 2^-32 is in (0, 1), so a segment never has norm zero.
inline BLOCKHESS_HD void box_muller(uint32_t a, uint32_t b, double* x, double* y) {
  const double radius = std::sqrt(-2.0 * std::log((double(a) + 0.5) * 0x1p-32));
  const double angle = 6.283185307179586 * (double(b) * 0x1p-32);
  *x = radius * std::cos(angle);
  *y = radius * std::sin(angle);
}

template <class T>
struct RandomProbes {
  Layout layout;  // of the probes first_probe, first_probe + 1, ..., n_probes in all
  int64_t seed, first_probe;
  Distribution distribution;
  const int64_t* block_ids;  // (n_blocks)
  T* probes;                 // (n_probes, n)
  double* partial;           // (n_probes, n_tiles) scratch
};

void random_probes_cpu(const RandomProbes<float>& op, const ParallelFor& parallel_for);
void random_probes_cpu(const RandomProbes<double>& op, const ParallelFor& parallel_for);
const char* random_probes_cuda(const RandomProbes<float>& op, const CudaQueue& queue);
const char* random_probes_cuda(const RandomProbes<double>& op, const CudaQueue& queue);

}  // namespace blockhess
