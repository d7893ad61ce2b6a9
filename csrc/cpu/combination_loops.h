// The loops of linear_combination, compiled per instruction set (see simd_dispatch.h).
//
// A run is a range of the last dimension at one index of the others. Along a run a term is a constant, a scaled vector
// or a scaled product of two vectors. A block of kLanes elements stays in registers while all terms are added.

namespace blockhess {
namespace BLOCKHESS_NAMESPACE {
namespace {

constexpr int64_t kVectorBytes = BLOCKHESS_LEVEL == 4 ? 64 : BLOCKHESS_LEVEL == 3 ? 32 : 16;
constexpr int64_t kVectors = 256 / kVectorBytes;
template <class T>
constexpr int64_t kLanes = 256 / sizeof(T);
template <class T>
constexpr int64_t kWidth = kVectorBytes / sizeof(T);
constexpr int64_t kChunk = 256;  // elements of strided operands copied at a time

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

// factor x, or factor x y unless y is null, along a run.
template <class T>
struct Product {
  const T *x, *y;
  int64_t x_stride, y_stride;
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

// out_i = constant + the sum of products of unit stride
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

// The sum of the elements begin : end of products of unit stride, in kLanes partial sums.
template <class T>
T block_sum(const Product<T>* products, int n, int64_t begin, int64_t end) {
  typename Vector<T>::Type sum[kVectors] = {};
  int64_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) add<kVectors>(sum, products, n, i);
  for (; i + kWidth<T> <= end; i += kWidth<T>) add<1>(sum, products, n, i);
  T rest = 0;
  for (; i < end; ++i) rest = add(rest, products, n, i);
#pragma GCC unroll 4
  for (int64_t half = kVectors / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int64_t v = 0; v < half; ++v) sum[v] += sum[v + half];
  T lane[kWidth<T>];
  std::memcpy(lane, sum, sizeof lane);
#pragma GCC unroll 4
  for (int64_t half = kWidth<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int64_t k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0] + rest;
}

template <class T>
const T* packed(T* buffer, const T* x, int64_t stride, int64_t start, int64_t length) {
  if (stride == 1) return x + start;
  for (int64_t i = 0; i < length; ++i) buffer[i] = x[(start + i) * stride];
  return buffer;
}

// Calls use(products of unit stride, start, length) on chunks of a run.
template <class T, class Use>
void in_chunks(const Product<T>* products, int n, int64_t length, const Use& use) {
  T buffer[2 * kMaxTerms][kChunk];
  Product<T> chunk[kMaxTerms];
  for (int64_t start = 0; start < length; start += kChunk) {
    const int64_t size = std::min(kChunk, length - start);
    for (int k = 0; k < n; ++k) {
      const Product<T>& p = products[k];
      chunk[k] = {packed(buffer[2 * k], p.x, p.x_stride, start, size),
                  p.y ? packed(buffer[2 * k + 1], p.y, p.y_stride, start, size) : nullptr, 1, 1, p.factor};
    }
    use(chunk, start, size);
  }
}

template <class T>
void run(T* out, int64_t out_stride, T constant, const Product<T>* products, int n, int64_t length, bool packed) {
  if (packed) return write(out, constant, products, n, length);
  in_chunks(products, n, length, [&](const Product<T>* chunk, int64_t start, int64_t size) {
    T result[kChunk];
    write(out_stride == 1 ? out + start : result, constant, chunk, n, size);
    if (out_stride != 1)
      for (int64_t i = 0; i < size; ++i) out[(start + i) * out_stride] = result[i];
  });
}

template <class T>
void run_sum(T* out, T constant, const Product<T>* products, int n, int64_t length, bool packed) {
  constexpr int64_t kBlock = 4096;
  T sum = constant * T(length);
  if (packed)
    for (int64_t i = 0; i < length; i += kBlock) sum += block_sum(products, n, i, std::min(i + kBlock, length));
  else
    in_chunks(products, n, length,
              [&](const Product<T>* chunk, int64_t, int64_t size) { sum += block_sum(chunk, n, 0, size); });
  *out = sum;
}

// A term at the start of a run: pointers, strides along the run, and steps to the next run.
template <class T>
struct Position {
  const T *base, *coefficient;
  T scalar;
  int64_t base_stride, coefficient_stride, base_step, coefficient_step;
};

// Runs begin : end in the order (row, outer dimensions, range of the last dimension, second last dimension); each
// range has at most max_length elements.
template <class T>
void combine(const LinearCombination<T>& op, int64_t max_length, int64_t begin, int64_t end) {
  const int inner = op.n_dims - 1, next = inner > 0 ? inner - 1 : inner;
  const int64_t n = op.sizes[inner], n_ranges = op.sum ? 1 : (n + max_length - 1) / max_length;
  const int64_t n_next = inner > 0 ? op.sizes[next] : 1;
  const auto step = [&](const int64_t* strides) { return inner > 0 ? strides[next] : 0; };
  for (int64_t task = begin; task < end;) {
    const int64_t first = task % n_next, count = std::min(n_next - first, end - task);
    int64_t rest = task / n_next, index[kMaxDims];
    const int64_t start = rest % n_ranges * max_length, length = std::min(max_length, n - start);
    rest /= n_ranges;
    index[inner] = start;
    if (inner > 0) index[next] = first;
    for (int d = inner - 2; d >= 0; --d) index[d] = rest % op.sizes[d], rest /= op.sizes[d];
    const int64_t row = rest;
    const auto offset = [&](const int64_t* strides) {
      int64_t sum = 0;
      for (int d = 0; d <= inner; ++d) sum += index[d] * strides[d];
      return sum;
    };
    T* out = op.out + row * op.row_stride + offset(op.strides);
    Position<T> positions[kMaxTerms];
    int n_terms = 0;
    for (int k = 0; k < op.n_terms; ++k) {
      const Term<T>& term = op.terms[k];
      if (row < term.first_row || row >= term.end_row) continue;
      Position<T>& p = positions[n_terms++];
      p = {term.base + (row - term.first_row) * term.row_stride + offset(term.strides),
           nullptr,
           term.scalar,
           term.strides[inner],
           0,
           step(term.strides),
           0};
      if (term.coefficient == nullptr) continue;
      p.coefficient = term.coefficient + offset(term.coefficient_strides);
      p.coefficient_stride = term.coefficient_strides[inner];
      p.coefficient_step = step(term.coefficient_strides);
    }
    task += count;
    for (int64_t j = 0; j < count; ++j, out += step(op.strides)) {
      Product<T> products[kMaxTerms];
      int n_products = 0;
      T constant = 0;
      bool packed = op.sum || op.strides[inner] == 1 || length == 1;
      for (int k = 0; k < n_terms; ++k) {
        Position<T>& p = positions[k];
        const T* x = p.base;
        const T* y = p.coefficient;
        T factor = p.scalar;
        int64_t x_stride = p.base_stride, y_stride = p.coefficient_stride;
        p.base += p.base_step, p.coefficient += p.coefficient_step;
        if (y_stride == 0) factor *= y == nullptr ? T(1) : *y, y = nullptr;
        if (x_stride == 0) factor *= *x, x = y, x_stride = y_stride, y = nullptr;
        if (x == nullptr) {
          constant += factor;
          continue;
        }
        packed = packed && x_stride == 1 && (y == nullptr || y_stride == 1);
        products[n_products++] = {x, y, x_stride, y_stride, factor};
      }
      if (op.sum)
        run_sum(out, constant, products, n_products, length, packed);
      else
        run(out, op.strides[inner], constant, products, n_products, length, packed);
    }
  }
}

}  // namespace
}  // namespace BLOCKHESS_NAMESPACE
}  // namespace blockhess
