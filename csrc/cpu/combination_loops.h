// The loops of linear_combination, compiled per instruction set (see simd_dispatch.h).
//
// A run is a range of the last dimension at one index of the others. Along a run a term is a constant, a scaled vector
// or a scaled product of two vectors. A block of kLanes elements stays in registers while all terms are added. Operands
// of other strides than 0 and 1 are copied in tiles of kRuns runs first, so that transposed ones are read by the line.

namespace blockhess {
namespace BLOCKHESS_NAMESPACE {
namespace {

constexpr int64_t kVectorBytes = BLOCKHESS_LEVEL == 4 ? 64 : BLOCKHESS_LEVEL == 3 ? 32 : 16;
constexpr int64_t kVectors = 256 / kVectorBytes;
template <class T>
constexpr int64_t kLanes = 256 / sizeof(T);
template <class T>
constexpr int64_t kWidth = kVectorBytes / sizeof(T);
constexpr int64_t kRuns = 16;

template <class T>
struct Vector {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
BLOCKHESS_INLINE typename Vector<T>::Type load(const T* x) {
  typename Vector<T>::Type vector;
  std::memcpy(&vector, x, sizeof vector);
  return vector;
}

// factor x, or factor x y unless y is null, along a run; x and y are contiguous.
template <class T>
struct Product {
  const T *x, *y;
  T factor;
};

// sum[v] += the elements i + v kWidth ... of all products
template <int64_t n_vectors, class T>
BLOCKHESS_INLINE void add(typename Vector<T>::Type* sum, const Product<T>* products, int n, int64_t i) {
  for (int k = 0; k < n; ++k) {
    const T *x = products[k].x + i, factor = products[k].factor;
    if (products[k].y == nullptr) {
#pragma GCC unroll 16
      for (int64_t v = 0; v < n_vectors; ++v) sum[v] += factor * load(x + v * kWidth<T>);
    } else {
      const T* y = products[k].y + i;
#pragma GCC unroll 16
      for (int64_t v = 0; v < n_vectors; ++v) sum[v] += factor * load(y + v * kWidth<T>) * load(x + v * kWidth<T>);
    }
  }
}

template <class T>
BLOCKHESS_INLINE T add(T sum, const Product<T>* products, int n, int64_t i) {
  for (int k = 0; k < n; ++k) {
    const Product<T>& p = products[k];
    sum += p.y == nullptr ? p.factor * p.x[i] : p.factor * p.y[i] * p.x[i];
  }
  return sum;
}

// out_i = constant + the sum of products
template <class T>
void write(T* out, T constant, const Product<T>* products, int n, int64_t length) {
  using V = typename Vector<T>::Type;
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) {
    V sum[kVectors];
#pragma GCC unroll 16
    for (int64_t v = 0; v < kVectors; ++v) sum[v] = V{} + constant;
    add<kVectors>(sum, products, n, i);
#pragma GCC unroll 16
    for (int64_t v = 0; v < kVectors; ++v) std::memcpy(out + i + v * kWidth<T>, &sum[v], sizeof(V));
  }
  for (; i + kWidth<T> <= length; i += kWidth<T>) {
    V sum = V{} + constant;
    add<1>(&sum, products, n, i);
    std::memcpy(out + i, &sum, sizeof(V));
  }
  for (; i < length; ++i) out[i] = add(constant, products, n, i);
}

// Adds the elements of the products, in kLanes partial sums, to the kWidth ones of all tiles.
template <class T>
void accumulate(T* sums, const Product<T>* products, int n, int64_t length) {
  typename Vector<T>::Type sum[kVectors] = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) add<kVectors>(sum, products, n, i);
  for (; i + kWidth<T> <= length; i += kWidth<T>) add<1>(sum, products, n, i);
#pragma GCC unroll 4
  for (int64_t half = kVectors / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int64_t v = 0; v < half; ++v) sum[v] += sum[v + half];
  sum[0] += load(sums);
  std::memcpy(sums, sum, sizeof sum[0]);
  for (; i < length; ++i) sums[0] = add(sums[0], products, n, i);
}

// A base or coefficient from the start of a range of runs on: run j begins at x + j step.
template <class T>
struct Operand {
  const T* x;  // nullptr for 1
  int64_t stride, step;
  T* tile;  // (kRuns, kLanes) copy of the current tile, nullptr if none is needed

  // Run j of the tile whose first run is `first` and whose elements start at i.
  const T* run(int64_t j, int64_t first, int64_t i) const {
    return tile ? tile + (j - first) * kLanes<T> : x + j * step + i * stride;
  }

  void copy(int64_t first, int64_t last, int64_t start, int64_t size) const {
    if (tile == nullptr) return;
    const T* from = x + first * step + start * stride;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < last - first; ++j) tile[j * kLanes<T> + i] = from[j * step + i * stride];
  }
};

// Runs of `length` elements at one index of the row and the dimensions before the last two.
template <class T>
struct Runs {
  int64_t length, tile_length;
  T* out;
  int64_t out_stride, out_step;
  int n_terms = 0;
  T scalars[kMaxTerms];
  Operand<T> bases[kMaxTerms], coefficients[kMaxTerms];

  // Combines the elements start : start + size of run j of the tile whose first run is `first`. Writes them if sums is
  // null, otherwise adds them to kWidth partial sums.
  void combine(int64_t j, int64_t first, int64_t start, int64_t size, T* sums) const {
    Product<T> products[kMaxTerms];
    int n = 0;
    T constant = 0;
    for (int k = 0; k < n_terms; ++k) {
      const T *x = bases[k].run(j, first, start), *y = nullptr;
      T factor = scalars[k];
      if (coefficients[k].x) y = coefficients[k].run(j, first, start);
      if (y && coefficients[k].stride == 0) factor *= *y, y = nullptr;
      if (bases[k].stride == 0) factor *= *x, x = y, y = nullptr;
      if (x)
        products[n++] = {x, y, factor};
      else
        constant += factor;
    }
    T* to = out + j * out_step + start * out_stride;
    if (sums) {
      accumulate(sums, products, n, size);
      sums[0] += constant * T(size);  // after the vector store: a vector load right after a scalar store would stall
    } else if (out_stride == 1 || size == 1) {
      write(to, constant, products, n, size);
    } else {
      T result[kLanes<T>];
      write(result, constant, products, n, size);
      for (int64_t i = 0; i < size; ++i) to[i * out_stride] = result[i];
    }
  }

  void combine(int64_t count, bool sum) const {
    for (int64_t first = 0; first < count; first += kRuns) {
      const int64_t last = std::min(first + kRuns, count);
      T sums[kRuns][kWidth<T>];
      for (int64_t j = 0; sum && j < last - first; ++j) std::fill_n(sums[j], kWidth<T>, T(0));
      for (int64_t start = 0; start < length; start += tile_length) {
        const int64_t size = std::min(tile_length, length - start);
        for (int k = 0; k < n_terms; ++k) {
          bases[k].copy(first, last, start, size);
          coefficients[k].copy(first, last, start, size);
        }
        for (int64_t j = first; j < last; ++j) combine(j, first, start, size, sum ? sums[j - first] : nullptr);
      }
      for (int64_t half = kWidth<T> / 2; sum && half > 0; half /= 2)
        for (int64_t j = 0; j < last - first; ++j)
          for (int64_t k = 0; k < half; ++k) sums[j][k] += sums[j][k + half];
      for (int64_t j = first; sum && j < last; ++j) out[j * out_step] = sums[j - first][0];
    }
  }
};

// Whether an operand is copied.
inline bool strided(int64_t stride) { return stride != 0 && stride != 1; }

// Runs begin : end in the order (row, outer dimensions, range of the last dimension, second last dimension). A range
// has tile_length elements, at most kLanes if an operand or out is strided; a sum has one range.
template <class T>
void combine(const LinearCombination<T>& op, int64_t tile_length, int64_t begin, int64_t end) {
  const int inner = op.n_dims - 1;
  const int64_t n = op.sizes[inner], n_ranges = op.sum ? 1 : (n + tile_length - 1) / tile_length;
  const int64_t n_next = inner > 0 ? op.sizes[inner - 1] : 1;
  const auto step = [&](const int64_t* strides) { return inner > 0 ? strides[inner - 1] : 0; };
  std::vector<T> tiles(2 * op.n_terms * (tile_length <= kLanes<T> ? kRuns * kLanes<T> : 0));
  for (int64_t task = begin; task < end;) {
    const int64_t first = task % n_next, count = std::min(n_next - first, end - task);
    int64_t rest = task / n_next, index[kMaxDims];
    index[inner] = rest % n_ranges * tile_length;
    rest /= n_ranges;
    if (inner > 0) index[inner - 1] = first;
    for (int d = inner - 2; d >= 0; --d) index[d] = rest % op.sizes[d], rest /= op.sizes[d];
    const auto offset = [&](const int64_t* strides) {
      int64_t sum = 0;
      for (int d = 0; d <= inner; ++d) sum += index[d] * strides[d];
      return sum;
    };
    Runs<T> runs;
    runs.length = op.sum ? n : std::min(tile_length, n - index[inner]);
    runs.tile_length = tile_length;
    runs.out = op.out + rest * op.row_stride + offset(op.strides);
    runs.out_stride = op.strides[inner];
    runs.out_step = step(op.strides);
    T* tile = tiles.data();
    const auto operand = [&](const T* x, const int64_t* strides) {
      Operand<T> result{x + offset(strides), strides[inner], step(strides), nullptr};
      if (strided(result.stride)) result.tile = tile, tile += kRuns * kLanes<T>;
      return result;
    };
    for (int k = 0; k < op.n_terms; ++k) {
      const Term<T>& term = op.terms[k];
      if (rest < term.first_row || rest >= term.end_row) continue;
      const int i = runs.n_terms++;
      runs.scalars[i] = term.scalar;
      runs.bases[i] = operand(term.base + (rest - term.first_row) * term.row_stride, term.strides);
      runs.coefficients[i] = {nullptr, 0, 0, nullptr};
      if (term.coefficient) runs.coefficients[i] = operand(term.coefficient, term.coefficient_strides);
    }
    runs.combine(count, op.sum);
    task += count;
  }
}

}  // namespace
}  // namespace BLOCKHESS_NAMESPACE
}  // namespace blockhess
