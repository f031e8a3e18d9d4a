// Products of bf16 matrices, accumulated and stored in fp32: what the operator product_ hands to its kernels.
#pragma once

#include <cstdint>

namespace mopo {

// out (M, N) (+)= a (M, K) @ b (K, N). Of the two strides of a, and of b, one is 1; out has column stride 1.
struct ProductArgs {
  float* out;
  int64_t out_row;
  const void* a;  // float, rounded to bf16 as it is packed, or the bits of bf16
  bool a_is_float;
  int64_t a_row;
  int64_t a_column;
  const uint16_t* b;  // the bits of bf16
  int64_t b_row;
  int64_t b_column;
  int64_t depth;  // K
  bool accumulate;
};

// A block of out: rows m0 .. m1, columns n0 .. n1.
struct ProductBlock {
  int64_t m0;
  int64_t m1;
  int64_t n0;
  int64_t n1;
};

// Blocks start at multiples of tile_rows and tile_columns and are at most block_rows x block_columns. Every element of
// out is summed over K in an order that depends on K alone.
struct ProductKernel {
  int64_t tile_rows;
  int64_t tile_columns;
  int64_t block_rows;
  int64_t block_columns;
  // A block of m x n, rounded up to whole tiles, takes (m + n) * line_bytes(K) of scratch, aligned to 64 bytes.
  int64_t (*line_bytes)(int64_t depth);
  void (*multiply)(const ProductArgs&, const ProductBlock&, void* scratch);
};

#if defined(__x86_64__)
extern const ProductKernel product_avx512bf16;
#endif

}  // namespace mopo
