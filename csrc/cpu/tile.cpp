// The CPU implementation of the operators in ops.cpp: choice of instruction set, threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "../tile_call.h"
#include "kernels.h"

namespace {

// Fewer elements than this cost less than waking a thread.
constexpr int64_t grain_elements = 32768;

// What torch itself chose for this processor, so that ATEN_CPU_CAPABILITY=avx2|default applies here as well.
const mopo::Kernels& kernels() {
  static const mopo::Kernels& chosen = []() -> const mopo::Kernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return mopo::kernels_avx512;
    if (capability == "AVX2") return mopo::kernels_avx2;
#endif
    return mopo::kernels_default;
  }();
  return chosen;
}

template <class T>
const mopo::TileKernels<T>& kernels_for() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().f32;
  } else {
    return kernels().f64;
  }
}

// A row belongs to one thread, so the result does not depend on their number.
template <class Args>
void over_rows(const at::Tensor& tile, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, grain_elements / std::max<int64_t>(1, tile.size(1)));
  at::parallel_for(0, tile.size(0), grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

struct Cpu {
  static constexpr at::DeviceType type = at::kCPU;

  template <class T>
  static void lse_fwd(const at::Tensor& tile, const mopo::LseFwdArgs<T>& args) {
    over_rows(tile, args, kernels_for<T>().lse_fwd);
  }

  template <class T>
  static void logits_bwd(const at::Tensor& tile, const mopo::LogitsBwdArgs<T>& args) {
    over_rows(tile, args, kernels_for<T>().logits_bwd);
  }

  // Columns belong to one thread each; those at the targets are marked afterwards.
  template <class T>
  static void mark(const at::Tensor& tile, const mopo::MarkArgs<T>& args) {
    const int64_t grain = std::max<int64_t>(1, grain_elements / std::max<int64_t>(1, args.rows));
    at::parallel_for(0, args.width, grain,
                     [&](int64_t begin, int64_t end) { kernels_for<T>().mark(args, begin, end); });
    for (int64_t r = 0; r < args.rows; ++r) {
      const int64_t column = args.target[r] - args.start;
      if (args.target[r] >= 0 && column >= 0 && column < args.width) args.marked[column] = true;
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mopo_tile, CPU, m) {
  m.impl("lse_fwd", mopo::lse_fwd<Cpu>);
  m.impl("logits_bwd_", mopo::logits_bwd_<Cpu>);
  m.impl("mark_columns_", mopo::mark_columns_<Cpu>);
}
