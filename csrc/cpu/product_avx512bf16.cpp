// x86-64 with avx512bf16: products of bf16 pairs, accumulated in fp32. The pragma rather than a flag, so that nothing
// included before it is affected.
//
// A block of out is the sum of products of slabs, at most slab_pairs pairs of k deep. A slab of a and one of b are
// packed into the scratch, so that the innermost loop reads both in order and from cache; there, a tile of out stays in
// registers while the slab is summed, and is then added to out. Pairs that lie side by side along k make one 32-bit
// number, which is what the instruction multiplies.
//
// vdpbf16ps rounds each of its two additions to the nearest fp32, ties to even, whatever the rounding mode, and takes
// subnormal numbers, those below 2^-126, for zeros: as input, as result, and in the conversion of a from fp32. That
// conversion is otherwise PyTorch's: to the nearest bf16, ties to even, NaN stays NaN.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "../mopo_math.h"
#include "product.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace {

using mopo::ProductArgs;
using mopo::ProductBlock;

constexpr int lanes = 16;
// 24 of the 32 registers hold a tile of out.
constexpr int tile_rows = 6;
constexpr int tile_vectors = 4;
constexpr int tile_columns = tile_vectors * lanes;
// A slab of b, 64 columns wide, and six rows of one of a take 54 KiB.
constexpr int64_t slab_pairs = 192;
// The larger the blocks, the less is packed, and read from memory, more than once.
constexpr int64_t block_rows = 171 * tile_rows;
constexpr int64_t block_columns = 16 * tile_columns;

// The cut of K into slabs, as even as it goes.
struct Slabs {
  int64_t pairs;  // in K
  int64_t count;
  int64_t line;  // what a row or column of a slab takes at most, in pairs: whole vectors

  static MOPO_INLINE Slabs of(int64_t depth) {
    const int64_t pairs = (depth + 1) / 2;
    const int64_t count = (pairs + slab_pairs - 1) / slab_pairs;
    const int64_t most = (pairs + count - 1) / count;
    return {pairs, count, (most + lanes - 1) / lanes * lanes};
  }
};

int64_t line_bytes(int64_t depth) { return Slabs::of(depth).line * int64_t(sizeof(uint32_t)); }

// The first `count` of as many bits as there are in Mask.
template <class Mask>
MOPO_INLINE Mask first_bits(int64_t count) {
  constexpr int bits = 8 * int(sizeof(Mask));
  return count >= bits ? Mask(-1) : count <= 0 ? Mask(0) : Mask((uint32_t(1) << count) - 1);
}

// 32 numbers as bf16, zeros from `count` on.
MOPO_INLINE __m512i load_bf16(const uint16_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_bits<__mmask32>(count), p);
}

MOPO_INLINE __m512i load_bf16(const float* p, int64_t count) {
  const __m512 low = _mm512_maskz_loadu_ps(first_bits<__mmask16>(count), p);
  const __m512 high = _mm512_maskz_loadu_ps(first_bits<__mmask16>(count - lanes), p + lanes);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 16 numbers of each of two arrays as bf16, the first array's in the lower half; zeros where the masks have none.
MOPO_INLINE __m512i load_two(const uint16_t* p, __mmask16 in_p, const uint16_t* q, __mmask16 in_q) {
  const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(in_p, p));
  return _mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(in_q, q), 1);
}

MOPO_INLINE __m512i load_two(const float* p, __mmask16 in_p, const float* q, __mmask16 in_q) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(in_q, q), _mm512_maskz_loadu_ps(in_p, p));
}

// Pairs of a number from the lower half and one from the upper.
MOPO_INLINE __m512i zip_halves(__m512i x) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), x);
}

// r as a matrix of 16 rows of 16 pairs.
MOPO_INLINE void transpose(__m512i (&r)[lanes]) {
  __m512i t[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // The 128-bit quarter q of r[4 * g + c] now holds column 4 * q + c of rows 4 * g .. 4 * g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i upper_even = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i lower_even = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i upper_odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i lower_odd = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(upper_even, lower_even, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(upper_odd, lower_odd, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(upper_even, lower_even, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(upper_odd, lower_odd, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) r[i] = t[i];
}

// The three ways of packing, of `count` lines (rows of a, columns of b) of k numbers each; an odd k is filled up with a
// zero. Which one follows from where the stride is 1, the other being `stride`.

// Lines contiguous, and kept so: out[line * out_line + pair].
template <class T>
void pack_lines(const T* x, int64_t stride, int64_t count, int64_t k, uint32_t* out, int64_t out_line) {
  for (int64_t line = 0; line < count; ++line, x += stride, out += out_line) {
    for (int64_t first = 0; first < k; first += 2 * lanes) {
      _mm512_storeu_si512(out + first / 2, load_bf16(x + first, k - first));
    }
  }
}

// Lines contiguous: out[line / width][pair][line % width], zeros beyond the last line.
template <int width>
void pack_transposed(const uint16_t* x, int64_t stride, int64_t count, int64_t k, uint32_t* out) {
  static_assert(width % lanes == 0);
  const int64_t pairs = (k + 1) / 2;
  for (int64_t panel = 0; panel < count; panel += width, out += pairs * width) {
    for (int group = 0; group < width; group += lanes) {
      const uint16_t* corner = x + (panel + group) * stride;
      const int64_t present = count - panel - group;
      for (int64_t first = 0; first < k; first += 2 * lanes) {
        __m512i r[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          r[i] = i < present ? load_bf16(corner + i * stride + first, k - first) : _mm512_setzero_si512();
        }
        transpose(r);
        uint32_t* to = out + first / 2 * width + group;
        const int64_t left = pairs - first / 2;
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < left) _mm512_storeu_si512(to + i * width, r[i]);
        }
      }
    }
  }
}

// Numbers of the same k contiguous: out[line / width][pair][line % width], zeros beyond the last line.
template <int width, class T>
void pack_across(const T* x, int64_t stride, int64_t count, int64_t k, uint32_t* out) {
  constexpr int step = width < lanes ? width : lanes;
  static_assert(width % step == 0);
  const int64_t pairs = (k + 1) / 2;
  for (int64_t pair = 0; pair < pairs; ++pair, x += 2 * stride) {
    const bool whole = 2 * pair + 1 < k;
    const T* next = whole ? x + stride : x;
    uint32_t* to = out + pair * width;
    for (int64_t panel = 0; panel < count; panel += width, to += pairs * width) {
#pragma GCC unroll 4
      for (int group = 0; group < width; group += step) {
        const int64_t at = panel + group;
        const __mmask16 present = first_bits<__mmask16>(count - at < step ? count - at : step);
        const __m512i two = load_two(x + at, present, next + at, whole ? present : __mmask16(0));
        _mm512_mask_storeu_epi32(to + group, first_bits<__mmask16>(step), zip_halves(two));
      }
    }
  }
}

// Adds products of `pairs` pairs to the sums, and steps over them.
template <int rows, bool panels>
MOPO_INLINE void add_products(const uint32_t*& a, int64_t a_line, const uint32_t*& b, int64_t pairs,
                              __m512 (&sum)[rows][tile_vectors]) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh y[tile_vectors];
#pragma GCC unroll 4
    for (int j = 0; j < tile_vectors; ++j) y[j] = (__m512bh)_mm512_loadu_si512(b + j * lanes);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[panels ? i : i * a_line]));
#pragma GCC unroll 4
      for (int j = 0; j < tile_vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, y[j]);
    }
    a += panels ? tile_rows : 1;
    b += tile_columns;
  }
}

// A tile of `rows` x `columns` (at most tile_columns) of out. b is packed in panels, a in panels too or in lines.
template <int rows, bool panels>
void multiply_tile(const uint32_t* a, int64_t a_line, const uint32_t* b, int64_t pairs, float* out, int64_t out_row,
                   int64_t columns, bool add) {
  __m512 sum[rows][tile_vectors];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < tile_vectors; ++j) {
      sum[i][j] = _mm512_setzero_ps();
      // Arrives while the slab is summed.
      if (add) __builtin_prefetch(out + i * out_row + j * lanes, 1);
    }
  }
  // In two halves: what a sum rounds away grows with the number of its terms.
  float half[rows][tile_columns];
  add_products<rows, panels>(a, a_line, b, pairs / 2, sum);
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < tile_vectors; ++j) {
      _mm512_storeu_ps(&half[i][j * lanes], sum[i][j]);
      sum[i][j] = _mm512_setzero_ps();
    }
  }
  add_products<rows, panels>(a, a_line, b, pairs - pairs / 2, sum);
#pragma GCC unroll 4
  for (int j = 0; j < tile_vectors; ++j) {
    const __mmask16 present = first_bits<__mmask16>(columns - j * lanes);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      float* to = out + i * out_row + j * lanes;
      const __m512 slab = _mm512_add_ps(_mm512_loadu_ps(&half[i][j * lanes]), sum[i][j]);
      const __m512 total = add ? _mm512_add_ps(_mm512_maskz_loadu_ps(present, to), slab) : slab;
      _mm512_mask_storeu_ps(to, present, total);
    }
  }
}

using MultiplyTile = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, float*, int64_t, int64_t, bool);

// By the number of rows less one.
template <bool panels>
constexpr MultiplyTile multiply_tiles[tile_rows] = {multiply_tile<1, panels>, multiply_tile<2, panels>,
                                                    multiply_tile<3, panels>, multiply_tile<4, panels>,
                                                    multiply_tile<5, panels>, multiply_tile<6, panels>};

template <class T>
void multiply_block(const ProductArgs& p, const ProductBlock& block, void* scratch) {
  const int64_t m = block.m1 - block.m0;
  const int64_t n = block.n1 - block.n0;
  uint32_t* packed_a = static_cast<uint32_t*>(scratch);
  const Slabs slabs = Slabs::of(p.depth);
  uint32_t* packed_b = packed_a + (m + tile_rows - 1) / tile_rows * tile_rows * slabs.line;
  const T* a = static_cast<const T*>(p.a) + block.m0 * p.a_row;
  const uint16_t* b = p.b + block.n0 * p.b_column;
  float* out = p.out + block.m0 * p.out_row + block.n0;
  const bool panels = p.a_column != 1;
  const MultiplyTile* tiles = panels ? multiply_tiles<true> : multiply_tiles<false>;

  for (int64_t slab = 0; slab < slabs.count; ++slab) {
    const int64_t first = slabs.pairs * slab / slabs.count;
    const int64_t pairs = slabs.pairs * (slab + 1) / slabs.count - first;
    const int64_t k0 = 2 * first;
    const int64_t k = p.depth - k0 < 2 * pairs ? p.depth - k0 : 2 * pairs;
    if (p.b_column == 1) {
      pack_across<tile_columns>(b + k0 * p.b_row, p.b_row, n, k, packed_b);
    } else {
      pack_transposed<tile_columns>(b + k0, p.b_column, n, k, packed_b);
    }
    if (panels) {
      pack_across<tile_rows>(a + k0 * p.a_column, p.a_column, m, k, packed_a);
    } else {
      pack_lines(a + k0, p.a_row, m, k, packed_a, slabs.line);
    }
    const int64_t a_line = panels ? pairs : slabs.line;
    for (int64_t c = 0; c < n; c += tile_columns) {
      for (int64_t r = 0; r < m; r += tile_rows) {
        const int64_t rows = m - r < tile_rows ? m - r : tile_rows;
        tiles[rows - 1](packed_a + r * a_line, a_line, packed_b + c * pairs, pairs, out + r * p.out_row + c, p.out_row,
                        n - c, p.accumulate || slab > 0);
      }
    }
  }
}

void multiply(const ProductArgs& p, const ProductBlock& block, void* scratch) {
  p.a_is_float ? multiply_block<float>(p, block, scratch) : multiply_block<uint16_t>(p, block, scratch);
}

}  // namespace

namespace mopo {

const ProductKernel product_avx512bf16 = {tile_rows, tile_columns, block_rows, block_columns, line_bytes, multiply};

}  // namespace mopo

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
