// The operators has_native_products and product_ of ops.cpp on the CPU: checks, choice of instruction set, threads.
#include "product.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

namespace {

using mopo::ProductArgs;
using mopo::ProductBlock;
using mopo::ProductKernel;

// Fewer multiplications than this cost less than waking a thread.
constexpr int64_t grain_multiplications = int64_t(1) << 21;
// Packing a row of a, or a column of b, costs as much as multiplying it with so many of the other.
constexpr double packing_lines = 24;

// Null where there is none. AVX512, which includes bw, dq and vl, is what torch itself chose for this processor, so
// that ATEN_CPU_CAPABILITY=avx2|default applies here as well.
const ProductKernel* product_kernel() {
  static const ProductKernel* const chosen = []() -> const ProductKernel* {
#if defined(__x86_64__)
    if (at::get_cpu_capability() == "AVX512" && __builtin_cpu_supports("avx512bf16")) return &mopo::product_avx512bf16;
#endif
    return nullptr;
  }();
  return chosen;
}

bool has_native_products(at::ScalarType dtype) { return dtype == at::kBFloat16 && product_kernel() != nullptr; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Size of the parts, a multiple of `step`, that cut `size` into at most `parts`.
int64_t part_size(int64_t size, int64_t parts, int64_t step) { return ceil_div(ceil_div(size, parts), step) * step; }

struct BlockSize {
  int64_t rows;
  int64_t columns;
};

// The largest block whose rows and columns together are at most `lines`: square if it can be.
BlockSize largest_block(const ProductKernel& kernel, int64_t m, int64_t n, int64_t lines) {
  const auto whole = [](int64_t size, int64_t step) { return size / step * step; };
  const int64_t rows = std::min(part_size(m, 1, kernel.tile_rows), kernel.block_rows);
  const int64_t columns = std::min(part_size(n, 1, kernel.tile_columns), kernel.block_columns);
  const int64_t spare = std::max(lines - rows, whole(lines / 2, kernel.tile_columns));
  const int64_t kept = std::max(std::min(columns, whole(spare, kernel.tile_columns)), kernel.tile_columns);
  return {std::min(rows, whole(lines - kept, kernel.tile_rows)), kept};
}

// The cut that takes so many threads the shortest time: large blocks pack little, many keep every thread at work.
BlockSize block_size(const ProductKernel& kernel, int64_t m, int64_t n, int64_t threads, int64_t lines) {
  const BlockSize largest = largest_block(kernel, m, n, lines);
  const int64_t row_parts = ceil_div(m, largest.rows);
  const int64_t column_parts = ceil_div(n, largest.columns);
  BlockSize best{};
  double least = 0;
  for (int64_t i = row_parts; i < row_parts + threads; ++i) {
    for (int64_t j = column_parts; j < column_parts + threads; ++j) {
      const BlockSize size{part_size(m, i, kernel.tile_rows), part_size(n, j, kernel.tile_columns)};
      const int64_t rounds = ceil_div(ceil_div(m, size.rows) * ceil_div(n, size.columns), threads);
      const double rows = double(size.rows), columns = double(size.columns);
      const double time = double(rounds) * (rows * columns + packing_lines * (rows + columns));
      if (best.rows == 0 || time < least) {
        best = size;
        least = time;
      }
    }
  }
  return best;
}

void check_factor(const at::Tensor& t, const char* name, const at::Tensor& out) {
  TORCH_CHECK_VALUE(t.device() == out.device() && t.dim() == 2, name, ": expected a matrix on ", out.device(),
                    "; got shape ", t.sizes(), " on ", t.device());
  TORCH_CHECK_VALUE(t.size(0) <= 1 || t.size(1) <= 1 || t.stride(0) == 1 || t.stride(1) == 1, name,
                    ": expected stride 1 in one dimension; got shape ", t.sizes(), ", strides ", t.strides());
}

struct Strides {
  int64_t row;
  int64_t column;
};

// The strides, with a 1 among them: in a dimension of size 1 any will do.
Strides factor_strides(const at::Tensor& t) {
  if (t.stride(1) == 1 || t.size(1) <= 1) return {t.stride(0), 1};
  return {1, t.stride(1)};
}

void product_(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate,
              std::optional<int64_t> scratch_bytes) {
  const ProductKernel* kernel = product_kernel();
  TORCH_CHECK_NOT_IMPLEMENTED(kernel != nullptr,
                              "product_ needs a processor with avx512_bf16 and a CPU capability of AVX512; it is ",
                              at::get_cpu_capability());
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 2, "out: expected a float32 matrix; got shape ",
                    out.sizes(), " and dtype ", out.scalar_type());
  TORCH_CHECK_VALUE((out.size(1) <= 1 || out.stride(1) == 1) && (out.size(0) <= 1 || out.stride(0) >= out.size(1)),
                    "out: expected column stride 1 and rows that do not overlap; got shape ", out.sizes(), ", strides ",
                    out.strides());
  check_factor(a, "a", out);
  check_factor(b, "b", out);
  TORCH_CHECK_VALUE(a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kFloat,
                    "a: expected bfloat16 or float32; got ", a.scalar_type());
  TORCH_CHECK_VALUE(b.scalar_type() == at::kBFloat16, "b: expected bfloat16; got ", b.scalar_type());
  TORCH_CHECK_VALUE(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1),
                    "out, a, b: expected shapes (M, N), (M, K), (K, N); got ", out.sizes(), ", ", a.sizes(), ", ",
                    b.sizes());
  at::assert_no_overlap(out, a);
  at::assert_no_overlap(out, b);

  const int64_t m = out.size(0), n = out.size(1), k = a.size(1);
  const int64_t line_bytes = kernel->line_bytes(std::max<int64_t>(k, 1));
  const int64_t least_lines = kernel->tile_rows + kernel->tile_columns;
  const int64_t most_lines = kernel->block_rows + kernel->block_columns;
  TORCH_CHECK_VALUE(!scratch_bytes || *scratch_bytes >= least_lines * line_bytes, "scratch_bytes: expected at least ",
                    least_lines * line_bytes, " for a of shape ", a.sizes(), "; got ", scratch_bytes.value_or(0));
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (!accumulate) out.zero_();
    return;
  }
  const Strides a_strides = factor_strides(a), b_strides = factor_strides(b);
  const ProductArgs args{out.data_ptr<float>(),
                         out.stride(0),
                         a.const_data_ptr(),
                         a.scalar_type() == at::kFloat,
                         a_strides.row,
                         a_strides.column,
                         static_cast<const uint16_t*>(b.const_data_ptr()),
                         b_strides.row,
                         b_strides.column,
                         k,
                         accumulate};
  const double multiplications = double(m) * double(n) * double(k);
  const int64_t worthwhile = int64_t(std::min(multiplications / grain_multiplications, 1e6));
  int64_t threads = std::clamp<int64_t>(worthwhile, 1, at::get_num_threads());
  int64_t lines = most_lines;
  if (scratch_bytes) {
    const int64_t all_lines = *scratch_bytes / line_bytes;
    threads = std::min(threads, all_lines / least_lines);
    lines = std::min(lines, all_lines / threads);
  }
  const BlockSize size = block_size(*kernel, m, n, threads, lines);
  const int64_t row_blocks = ceil_div(m, size.rows), column_blocks = ceil_div(n, size.columns);
  const int64_t blocks = row_blocks * column_blocks;
  const int64_t block_bytes = (size.rows + size.columns) * line_bytes;
  const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(std::min(threads, blocks) * block_bytes);
  // A block belongs to one thread, and how it is cut changes no sum, so the result does not depend on their number.
  at::parallel_for(0, blocks, ceil_div(blocks, threads), [&](int64_t begin, int64_t end) {
    char* const own_scratch = static_cast<char*>(scratch.get()) + at::get_thread_num() * block_bytes;
    for (int64_t block = begin; block < end; ++block) {
      // Neighbours share a part of the larger factor, which the second then finds in cache.
      const int64_t i = m <= n ? block % row_blocks : block / column_blocks;
      const int64_t j = m <= n ? block / row_blocks : block % column_blocks;
      const ProductBlock at{i * size.rows, std::min((i + 1) * size.rows, m), j * size.columns,
                            std::min((j + 1) * size.columns, n)};
      kernel->multiply(args, at, own_scratch);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mopo_tile, CompositeExplicitAutograd, m) { m.impl("has_native_products", has_native_products); }

TORCH_LIBRARY_IMPL(mopo_tile, CPU, m) { m.impl("product_", product_); }
