// The three kernels, compiled once for each instruction set by tile_default.cpp, tile_avx2.cpp and tile_avx512.cpp,
// which define MOPO_VECTOR_BYTES and MOPO_KERNELS, the table's name. No library header but <cstdint>: an inline
// function of the standard library compiled here for AVX-512 could otherwise be the copy that the linker keeps for
// everybody.
#include <cstdint>

#include "kernels.h"
#include "simd.h"

namespace {

using mopo::LogitsBwdArgs;
using mopo::LseFwdArgs;
using mopo::MarkArgs;
using mopo::TileArgs;

// Columns whose logits are held in the first-level cache between finding their maximum and summing their exponentials.
constexpr int64_t block_columns = 2048;

// Independent chains of additions, enough to hide the latency of one.
constexpr int chains = 4;

template <class T, bool biased>
MOPO_INLINE typename Simd<T>::F load_product(const TileArgs<T>& a, const T* row, int64_t column) {
  using M = SimdMath<T>;
  if constexpr (biased) {
    return M::load(row + column) + M::load(a.bias + column);
  } else {
    return M::load(row + column);
  }
}

// One element in every lane, so that it is rounded exactly as it is in the middle of a row.
template <class T, bool biased>
MOPO_INLINE typename Simd<T>::F splat_product(const TileArgs<T>& a, const T* row, int64_t column) {
  using F = typename Simd<T>::F;
  if constexpr (biased) {
    return (F{} + row[column]) + (F{} + a.bias[column]);
  } else {
    return F{} + row[column];
  }
}

// Writes the logits of columns first .. first + count to z, then -infinity up to a multiple of a group; returns the
// largest. A NaN is written but is not the largest.
template <class T, bool biased, bool capped>
MOPO_INLINE T block_logits(const TileArgs<T>& a, const T* row, int64_t first, int64_t count, T* z) {
  using M = SimdMath<T>;
  using F = typename M::F;
  constexpr int group = chains * M::lanes;
  const F bottom = F{} - T(__builtin_inf());
  F top[chains];
  for (int k = 0; k < chains; ++k) top[k] = bottom;
  int64_t column = 0;
  for (; column + group <= count; column += group) {
    for (int k = 0; k < chains; ++k) {
      const int64_t at = column + k * M::lanes;
      const F logit = mopo::make_logit<M, capped>(load_product<T, biased>(a, row, first + at), a.transform).value;
      M::store(z + at, logit);
      top[k] = M::max(logit, top[k]);
    }
  }
  for (; column + M::lanes <= count; column += M::lanes) {
    const F logit = mopo::make_logit<M, capped>(load_product<T, biased>(a, row, first + column), a.transform).value;
    M::store(z + column, logit);
    top[0] = M::max(logit, top[0]);
  }
  T largest = -T(__builtin_inf());
  for (int k = 0; k < chains; ++k) {
    for (int lane = 0; lane < M::lanes; ++lane) largest = top[k][lane] > largest ? top[k][lane] : largest;
  }
  for (; column < count; ++column) {
    z[column] = mopo::make_logit<M, capped>(splat_product<T, biased>(a, row, first + column), a.transform).value[0];
    largest = z[column] > largest ? z[column] : largest;
  }
  for (; column % group != 0; ++column) z[column] = -T(__builtin_inf());
  return largest;
}

// sum exp(z - shift) over count columns; block_logits filled the last group.
template <class T>
MOPO_INLINE double block_sum(const T* z, int64_t count, T shift) {
  using M = SimdMath<T>;
  using F = typename M::F;
  constexpr int group = chains * M::lanes;
  F sum[chains] = {};
  for (int64_t column = 0; column < count; column += group) {
    for (int k = 0; k < chains; ++k) sum[k] += M::exp(M::load(z + column + k * M::lanes) - shift);
  }
  const F summed = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double total = 0.0;
  for (int lane = 0; lane < M::lanes; ++lane) total += double(summed[lane]);
  return total;
}

template <class T, bool biased, bool capped>
void lse_fwd_rows(const LseFwdArgs<T>& a, int64_t begin, int64_t end) {
  using M = SimdMath<T>;
  alignas(64) T z[block_columns];
  for (int64_t r = begin; r < end; ++r) {
    const T* row = a.tile + r * a.row_stride;
    T top = a.row_max[r];
    double total = double(a.sum_exp[r]);
    for (int64_t first = 0; first < a.width; first += block_columns) {
      const int64_t count = a.width - first < block_columns ? a.width - first : block_columns;
      const T largest = block_logits<T, biased, capped>(a, row, first, count, z);
      if (largest > top) {
        total *= __builtin_exp(double(top) - double(largest));
        top = largest;
      }
      // While every logit is -infinity, exp(z - 0) = 0 where exp(z - top) would be NaN.
      total += block_sum(z, count, top == -T(__builtin_inf()) ? T(0) : top);
    }
    const int64_t column = a.target[r] - a.start;
    if (column >= 0 && column < a.width) {
      a.target_logit[r] = mopo::make_logit<M, capped>(splat_product<T, biased>(a, row, column), a.transform).value[0];
    }
    a.row_max[r] = top;
    a.sum_exp[r] = T(total);
  }
}

template <class T, bool biased, bool capped>
void logits_bwd_rows(const LogitsBwdArgs<T>& a, int64_t begin, int64_t end) {
  using M = SimdMath<T>;
  using F = typename M::F;
  for (int64_t r = begin; r < end; ++r) {
    T* row = a.tile + r * a.row_stride;
    if (a.target[r] < 0) {
      __builtin_memset(row, 0, a.width * sizeof(T));
      continue;
    }
    const mopo::Constant<T> logsumexp = mopo::Constant<T>::make(a.logsumexp[r]);
    const T factor = a.transform.slope.times(a.grad_logprob == nullptr ? T(1) : a.grad_logprob[r]);
    const int64_t column = a.target[r] - a.start;
    const bool inside = column >= 0 && column < a.width;
    T at_target = T(0);
    if (inside) {
      const F x = splat_product<T, biased>(a, row, column);
      at_target = mopo::target_gradient<M, capped>(x, a.transform, logsumexp, factor)[0];
    }
    int64_t c = 0;
    for (; c + chains * M::lanes <= a.width; c += chains * M::lanes) {
      for (int k = 0; k < chains; ++k) {
        const F x = load_product<T, biased>(a, row, c + k * M::lanes);
        M::store(row + c + k * M::lanes, mopo::other_gradient<M, capped>(x, a.transform, logsumexp, factor));
      }
    }
    for (; c + M::lanes <= a.width; c += M::lanes) {
      const F x = load_product<T, biased>(a, row, c);
      M::store(row + c, mopo::other_gradient<M, capped>(x, a.transform, logsumexp, factor));
    }
    for (; c < a.width; ++c) {
      const F x = splat_product<T, biased>(a, row, c);
      row[c] = mopo::other_gradient<M, capped>(x, a.transform, logsumexp, factor)[0];
    }
    if (inside) row[column] = at_target;
  }
}

template <class T>
void lse_fwd(const LseFwdArgs<T>& a, int64_t begin, int64_t end) {
  if (a.bias != nullptr) {
    a.capped ? lse_fwd_rows<T, true, true>(a, begin, end) : lse_fwd_rows<T, true, false>(a, begin, end);
  } else {
    a.capped ? lse_fwd_rows<T, false, true>(a, begin, end) : lse_fwd_rows<T, false, false>(a, begin, end);
  }
}

template <class T>
void logits_bwd(const LogitsBwdArgs<T>& a, int64_t begin, int64_t end) {
  if (a.bias != nullptr) {
    a.capped ? logits_bwd_rows<T, true, true>(a, begin, end) : logits_bwd_rows<T, true, false>(a, begin, end);
  } else {
    a.capped ? logits_bwd_rows<T, false, true>(a, begin, end) : logits_bwd_rows<T, false, false>(a, begin, end);
  }
}

// Whether a logit of the column is at least its row's least one, or not comparable with it, for columns begin .. end.
template <class T, bool biased, bool capped>
void mark_block(const MarkArgs<T>& a, int64_t begin, int64_t end) {
  using M = SimdMath<T>;
  using F = typename M::F;
  using U = typename M::U;
  // All bits set while every logit of the column so far was less.
  alignas(64) U less[block_columns / M::lanes];
  for (int64_t first = begin; first < end; first += block_columns) {
    const int64_t count = end - first < block_columns ? end - first : block_columns;
    const int64_t vectors = count / M::lanes;
    for (int64_t k = 0; k < vectors; ++k) less[k] = ~U{};
    for (int64_t c = vectors * M::lanes; c < count; ++c) a.marked[first + c] = false;
    for (int64_t r = 0; r < a.rows; ++r) {
      const T* row = a.tile + r * a.row_stride;
      const F least = F{} + a.least[r];
      for (int64_t k = 0; k < vectors; ++k) {
        const F x = load_product<T, biased>(a, row, first + k * M::lanes);
        less[k] &= (U)(mopo::make_logit<M, capped>(x, a.transform).value < least);
      }
      for (int64_t c = vectors * M::lanes; c < count; ++c) {
        const F x = splat_product<T, biased>(a, row, first + c);
        if (!(mopo::make_logit<M, capped>(x, a.transform).value[0] < least[0])) a.marked[first + c] = true;
      }
    }
    for (int64_t k = 0; k < vectors; ++k) {
      for (int lane = 0; lane < M::lanes; ++lane) a.marked[first + k * M::lanes + lane] = less[k][lane] == 0;
    }
  }
}

template <class T>
void mark(const MarkArgs<T>& a, int64_t begin, int64_t end) {
  if (a.bias != nullptr) {
    a.capped ? mark_block<T, true, true>(a, begin, end) : mark_block<T, true, false>(a, begin, end);
  } else {
    a.capped ? mark_block<T, false, true>(a, begin, end) : mark_block<T, false, false>(a, begin, end);
  }
}

}  // namespace

namespace mopo {

const Kernels MOPO_KERNELS = {{lse_fwd<float>, logits_bwd<float>, mark<float>},
                              {lse_fwd<double>, logits_bwd<double>, mark<double>}};

}  // namespace mopo
