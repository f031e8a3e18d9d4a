// The CPU implementation of the operators in ops.cpp: checks, choice of instruction set, threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <type_traits>

#include "tile_args.h"

namespace {

using at::Tensor;
using std::optional;

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

void check_rows(const Tensor& t, const char* name, const Tensor& tile, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == tile.size(0) && t.is_contiguous(),
      name, " must be a contiguous CPU tensor of shape (", tile.size(0), ",) and dtype ", dtype,
      " for a tile of shape ", tile.sizes(), "; got shape ", t.sizes(), ", strides ", t.strides(), ", dtype ",
      t.scalar_type(), " on ", t.device());
}

// Checks the arguments that both operators share and returns the bias in the tile's dtype.
optional<Tensor> check_tile(const Tensor& tile, const optional<Tensor>& bias, const Tensor& target,
                            optional<double> softcap, double logit_scale, double temperature) {
  TORCH_CHECK_VALUE(tile.device().is_cpu() && tile.dim() == 2,
                    "tile must be a CPU tensor of shape (rows, columns); got shape ", tile.sizes(), " on ",
                    tile.device());
  TORCH_CHECK_VALUE(tile.scalar_type() == at::kFloat || tile.scalar_type() == at::kDouble,
                    "tile must be float32 or float64; got ", tile.scalar_type());
  TORCH_CHECK_VALUE((tile.size(1) <= 1 || tile.stride(1) == 1) && (tile.size(0) <= 1 || tile.stride(0) >= tile.size(1)),
                    "tile must have column stride 1 and rows that do not overlap; got shape ", tile.sizes(),
                    ", strides ", tile.strides());
  check_rows(target, "target", tile, at::kLong);
  TORCH_CHECK_VALUE(!softcap || (std::isfinite(*softcap) && *softcap > 0), "softcap must be positive and finite; got ",
                    softcap.value_or(0.0));
  TORCH_CHECK_VALUE(std::isfinite(logit_scale), "logit_scale must be finite; got ", logit_scale);
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature > 0, "temperature must be positive and finite; got ",
                    temperature);
  if (!bias) return bias;
  TORCH_CHECK_VALUE(bias->device().is_cpu() && bias->dim() == 1 && bias->size(0) == tile.size(1),
                    "bias must be a CPU tensor of shape (", tile.size(1), ",) for a tile of shape ", tile.sizes(),
                    "; got shape ", bias->sizes(), " on ", bias->device());
  return bias->to(tile.scalar_type()).contiguous();
}

template <class T>
mopo::TileArgs<T> tile_args(const Tensor& tile, const optional<Tensor>& bias, const Tensor& target, int64_t start,
                            optional<double> softcap, double logit_scale, double temperature) {
  return {tile.data_ptr<T>(),
          tile.stride(0),
          tile.size(1),
          bias ? bias->const_data_ptr<T>() : nullptr,
          target.const_data_ptr<int64_t>(),
          start,
          softcap.has_value(),
          mopo::Head<T>::make(softcap.value_or(1.0), logit_scale, temperature)};
}

// A row belongs to one thread, so the result does not depend on their number.
template <class Args>
void over_rows(const Tensor& tile, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, grain_elements / std::max<int64_t>(1, tile.size(1)));
  at::parallel_for(0, tile.size(0), grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void fold(const Tensor& tile, const optional<Tensor>& bias, const Tensor& target, int64_t start,
          optional<double> softcap, double logit_scale, double temperature, const Tensor& maximum, const Tensor& total,
          const Tensor& picked) {
  const optional<Tensor> cast_bias = check_tile(tile, bias, target, softcap, logit_scale, temperature);
  check_rows(maximum, "maximum", tile, tile.scalar_type());
  check_rows(total, "total", tile, tile.scalar_type());
  check_rows(picked, "picked", tile, tile.scalar_type());
  const auto run = [&](auto element) {
    using T = decltype(element);
    const mopo::FoldArgs<T> args = {tile_args<T>(tile, cast_bias, target, start, softcap, logit_scale, temperature),
                                    maximum.data_ptr<T>(), total.data_ptr<T>(), picked.data_ptr<T>()};
    over_rows(tile, args, kernels_for<T>().fold);
  };
  tile.scalar_type() == at::kFloat ? run(float()) : run(double());
}

void gradient_(const Tensor& tile, const optional<Tensor>& bias, const Tensor& target, int64_t start,
               optional<double> softcap, double logit_scale, double temperature, const Tensor& logsumexp,
               const optional<Tensor>& coefficient) {
  const optional<Tensor> cast_bias = check_tile(tile, bias, target, softcap, logit_scale, temperature);
  const bool exact = logsumexp.scalar_type() == at::kDouble;
  check_rows(logsumexp, "logsumexp", tile, exact ? at::kDouble : tile.scalar_type());
  const Tensor exact_logsumexp = logsumexp.to(at::kDouble);
  if (coefficient) check_rows(*coefficient, "coefficient", tile, tile.scalar_type());
  const auto run = [&](auto element) {
    using T = decltype(element);
    const mopo::GradientArgs<T> args = {tile_args<T>(tile, cast_bias, target, start, softcap, logit_scale, temperature),
                                        exact_logsumexp.const_data_ptr<double>(),
                                        coefficient ? coefficient->const_data_ptr<T>() : nullptr};
    over_rows(tile, args, kernels_for<T>().gradient);
  };
  tile.scalar_type() == at::kFloat ? run(float()) : run(double());
}

}  // namespace

TORCH_LIBRARY_IMPL(mopo_tile, CPU, m) {
  m.impl("fold", fold);
  m.impl("gradient_", gradient_);
}
