// Tile work on a GPU: the portable fallback where Triton is missing, for fp32 and fp64 tiles of logits as for half
// precision. The products around it are torch's, so every tile is written and read once more than where Triton's fused
// product folds it; no claim of speed rests on it. Rows may start at any element, so each is split into the 16-byte
// vectors between its first and its last 16-byte boundary and the few scalars on either side. Which thread does which
// column, and the order of every sum, follow from the arguments alone: two runs give the same bits.
#include <cuda_runtime.h>

#include "tile.h"

namespace {

using mopo::LogitsBwdArgs;
using mopo::LseFwdArgs;
using mopo::TileArgs;

constexpr int warp = 32;
constexpr int threads = 256;
constexpr int warps = threads / warp;

// Vectors that a thread loads before it uses the first, to hide the latency of memory.
constexpr int depth = 4;

template <class T>
struct alignas(16) Vector {
  static constexpr int lanes = 16 / int(sizeof(T));
  T lane[lanes];
};

// All scalars of a row are taken by different threads, once.
static_assert(2 * (Vector<float>::lanes - 1) <= threads, "more scalars than threads");

template <class T>
struct DeviceMath;

template <>
struct DeviceMath<float> {
  // Of a number and NaN, the number.
  static __device__ __forceinline__ float max(float a, float b) { return fmaxf(a, b); }
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float expm1(float x) { return expm1f(x); }
  static __device__ __forceinline__ float power_of_two(float shifted) {
    using C = mopo::ExpConstants<float>;
    return __uint_as_float((__float_as_uint(shifted) + C::exponent_bias) << C::exponent_shift);
  }
};

template <>
struct DeviceMath<double> {
  static __device__ __forceinline__ double max(double a, double b) { return fmax(a, b); }
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
  static __device__ __forceinline__ double expm1(double x) { return ::expm1(x); }
  static __device__ __forceinline__ double power_of_two(double shifted) {
    using C = mopo::ExpConstants<double>;
    const uint64_t bits = uint64_t(__double_as_longlong(shifted)) + C::exponent_bias;
    return __longlong_as_double(int64_t(bits << C::exponent_shift));
  }
};

template <class T>
struct Row {
  static constexpr int lanes = Vector<T>::lanes;

  T* begin;
  int64_t leading;  // columns before the first vector
  int64_t vectors;
  int64_t scalars;  // columns in no vector

  __device__ Row(const TileArgs<T>& a, int64_t r) : begin(a.tile + r * a.row_stride) {
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(begin) % sizeof(Vector<T>) / sizeof(T));
    leading = past == 0 ? 0 : lanes - past;
    if (leading > a.width) leading = a.width;
    vectors = (a.width - leading) / lanes;
    scalars = a.width - vectors * lanes;
  }

  __device__ int64_t vector_column(int64_t v) const { return leading + v * lanes; }
  __device__ Vector<T>* vector(int64_t v) const { return reinterpret_cast<Vector<T>*>(begin + vector_column(v)); }
  __device__ int64_t scalar_column(int64_t s) const { return s < leading ? s : s + vectors * lanes; }

  // Whether logits_bwd_kernel's grid gives the column to this thread of this block.
  __device__ bool is_of_this_thread(int64_t column) const {
    if (column >= leading && column < vector_column(vectors)) {
      const int64_t v = (column - leading) / lanes;
      return v / (depth * threads) == blockIdx.y && v % threads == threadIdx.x;
    }
    return blockIdx.y == 0 && scalar_column(threadIdx.x) == column;
  }
};

template <bool biased, class T>
__device__ __forceinline__ T load_scalar(const TileArgs<T>& a, const Row<T>& row, int64_t column) {
  if constexpr (biased) {
    return row.begin[column] + a.bias[column];
  } else {
    return row.begin[column];
  }
}

// Product plus bias of vectors first, first + threads, ...: as many as there are, up to depth.
template <bool biased, class T>
__device__ __forceinline__ void load_vectors(const TileArgs<T>& a, const Row<T>& row, int64_t first,
                                             Vector<T> (&x)[depth]) {
#pragma unroll
  for (int k = 0; k < depth; ++k) {
    const int64_t v = first + k * threads;
    if (v < row.vectors) {
      x[k] = *row.vector(v);
    }
  }
  if constexpr (biased) {
#pragma unroll
    for (int k = 0; k < depth; ++k) {
      const int64_t v = first + k * threads;
      if (v < row.vectors) {
#pragma unroll
        for (int i = 0; i < row.lanes; ++i) x[k].lane[i] += a.bias[row.vector_column(v) + i];
      }
    }
  }
}

// What one thread has seen: the largest logit and the sum of exp(logit - top).
template <class T>
struct Statistics {
  T top = -T(__builtin_inf());
  T sum = T(0);

  template <int count>
  __device__ __forceinline__ void take(const T (&z)[count]) {
    using M = DeviceMath<T>;
    // A NaN is not the largest, but ends up in the sum.
    T largest = top;
#pragma unroll
    for (int i = 0; i < count; ++i) largest = M::max(largest, z[i]);
    if (largest > top) {
      sum *= M::exp(top - largest);
      top = largest;
    }
    // While every logit is -infinity, exp(z - 0) = 0 where exp(z - top) would be NaN.
    const T shift = top == -T(__builtin_inf()) ? T(0) : top;
    T part = T(0);
#pragma unroll
    for (int i = 0; i < count; ++i) part += M::exp(z[i] - shift);
    sum += part;
  }
};

// exp(from - to) for from <= to, and 1 where both are the same infinity.
template <class T>
__device__ __forceinline__ T rescale(T from, T to) {
  return from == to ? T(1) : DeviceMath<T>::exp(from - to);
}

enum class Over { maximum, sum };

__device__ __forceinline__ double combine(Over what, double a, double b) {
  return what == Over::sum ? a + b : fmax(a, b);
}

// Over the values of all threads of the block, in a fixed order; the same in every thread.
__device__ double over_block(Over what, double value) {
  __shared__ double partial[warps];
  for (int offset = warp / 2; offset > 0; offset /= 2) {
    value = combine(what, value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  // A warp that is still reading the last call's must not find this one's.
  __syncthreads();
  if (threadIdx.x % warp == 0) partial[threadIdx.x / warp] = value;
  __syncthreads();
  value = partial[0];
  for (int w = 1; w < warps; ++w) value = combine(what, value, partial[w]);
  return value;
}

// One block a row.
template <class T, bool biased, bool capped>
__global__ void __launch_bounds__(threads) lse_fwd_kernel(LseFwdArgs<T> a) {
  using M = DeviceMath<T>;
  const int64_t r = blockIdx.x;
  const Row<T> row(a, r);
  const T before = a.row_max[r];
  Statistics<T> seen;
  for (int64_t first = threadIdx.x; first < row.vectors; first += depth * threads) {
    Vector<T> x[depth] = {};
    load_vectors<biased>(a, row, first, x);
    T z[depth * row.lanes];
#pragma unroll
    for (int k = 0; k < depth; ++k) {
      const bool present = first + k * threads < row.vectors;
#pragma unroll
      for (int i = 0; i < row.lanes; ++i) {
        const T logit = mopo::make_logit<M, capped>(x[k].lane[i], a.transform).value;
        z[k * row.lanes + i] = present ? logit : -T(__builtin_inf());
      }
    }
    seen.take(z);
  }
  if (threadIdx.x < row.scalars) {
    const T x = load_scalar<biased>(a, row, row.scalar_column(threadIdx.x));
    const T z[1] = {mopo::make_logit<M, capped>(x, a.transform).value};
    seen.take(z);
  }
  const T largest = T(over_block(Over::maximum, double(seen.top)));
  const T top = M::max(largest, before);
  const double sum = over_block(Over::sum, double(seen.sum * rescale(seen.top, top)));
  if (threadIdx.x == 0) {
    a.row_max[r] = top;
    a.sum_exp[r] = T(double(a.sum_exp[r]) * rescale(double(before), double(top)) + sum);
    const int64_t column = a.target[r] - a.start;
    if (column >= 0 && column < a.width) {
      a.target_logit[r] = mopo::make_logit<M, capped>(load_scalar<biased>(a, row, column), a.transform).value;
    }
  }
}

// blockIdx.x is the row, blockIdx.y a stretch of depth * threads vectors of it; the first block takes the scalars too.
template <class T, bool biased, bool capped>
__global__ void __launch_bounds__(threads) logits_bwd_kernel(LogitsBwdArgs<T> a) {
  using M = DeviceMath<T>;
  const int64_t r = blockIdx.x;
  const Row<T> row(a, r);
  const bool scored = a.target[r] >= 0;
  const mopo::Constant<T> logsumexp = mopo::Constant<T>::make(a.logsumexp[r]);
  const T factor = a.transform.slope.times(a.grad_logprob == nullptr ? T(1) : a.grad_logprob[r]);
  // The target's gradient needs the product that the column's thread is about to overwrite, so that thread computes it.
  const int64_t column = a.target[r] - a.start;
  const bool mine = column >= 0 && column < a.width && row.is_of_this_thread(column);
  T at_target = T(0);
  if (mine) {
    const T x = load_scalar<biased>(a, row, column);
    at_target = mopo::target_gradient<M, capped>(x, a.transform, logsumexp, factor);
  }
  const auto at_other = [&](T x) {
    return scored ? mopo::other_gradient<M, capped>(x, a.transform, logsumexp, factor) : T(0);
  };
  const int64_t first = int64_t(blockIdx.y) * depth * threads + threadIdx.x;
  Vector<T> x[depth] = {};
  if (scored) load_vectors<biased>(a, row, first, x);
#pragma unroll
  for (int k = 0; k < depth; ++k) {
    const int64_t v = first + k * threads;
    if (v < row.vectors) {
#pragma unroll
      for (int i = 0; i < row.lanes; ++i) x[k].lane[i] = at_other(x[k].lane[i]);
      *row.vector(v) = x[k];
    }
  }
  if (blockIdx.y == 0 && threadIdx.x < row.scalars) {
    const int64_t c = row.scalar_column(threadIdx.x);
    row.begin[c] = at_other(load_scalar<biased>(a, row, c));
  }
  if (mine) row.begin[column] = at_target;
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), int64_t rows, int64_t stretches, const Args& args, cudaStream_t stream) {
  if (rows > INT32_MAX || stretches > UINT16_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(rows), unsigned(stretches));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

namespace mopo {

template <class T>
cudaError_t launch_lse_fwd(const LseFwdArgs<T>& a, int64_t rows, cudaStream_t stream) {
  if (rows == 0 || a.width == 0) return cudaSuccess;
  const auto biased = a.capped ? lse_fwd_kernel<T, true, true> : lse_fwd_kernel<T, true, false>;
  const auto unbiased = a.capped ? lse_fwd_kernel<T, false, true> : lse_fwd_kernel<T, false, false>;
  return launch(a.bias != nullptr ? biased : unbiased, rows, 1, a, stream);
}

template <class T>
cudaError_t launch_logits_bwd(const LogitsBwdArgs<T>& a, int64_t rows, cudaStream_t stream) {
  if (rows == 0 || a.width == 0) return cudaSuccess;
  const auto biased = a.capped ? logits_bwd_kernel<T, true, true> : logits_bwd_kernel<T, true, false>;
  const auto unbiased = a.capped ? logits_bwd_kernel<T, false, true> : logits_bwd_kernel<T, false, false>;
  constexpr int64_t stretch = depth * threads * Vector<T>::lanes;
  return launch(a.bias != nullptr ? biased : unbiased, rows, (a.width + stretch - 1) / stretch, a, stream);
}

template cudaError_t launch_lse_fwd(const LseFwdArgs<float>&, int64_t, cudaStream_t);
template cudaError_t launch_lse_fwd(const LseFwdArgs<double>&, int64_t, cudaStream_t);
template cudaError_t launch_logits_bwd(const LogitsBwdArgs<float>&, int64_t, cudaStream_t);
template cudaError_t launch_logits_bwd(const LogitsBwdArgs<double>&, int64_t, cudaStream_t);

}  // namespace mopo
