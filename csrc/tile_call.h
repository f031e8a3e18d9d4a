// The torch side of the operators in ops.cpp, the same on every device: checks the arguments, picks the number type and
// hands structs of pointers to the device's launch functions.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "tile_args.h"

namespace mopo {

inline void check_rows(const at::Tensor& t, const char* name, const at::Tensor& tile, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.device() == tile.device() && t.scalar_type() == dtype && t.dim() == 1 &&
                        t.size(0) == tile.size(0) && t.is_contiguous(),
                    name, ": expected a contiguous ", at::DeviceTypeName(tile.device().type()), " tensor of shape (",
                    tile.size(0), ",) and dtype ", dtype, " for a tile of shape ", tile.sizes(), " on ", tile.device(),
                    "; got shape ", t.sizes(), ", strides ", t.strides(), ", dtype ", t.scalar_type(), " on ",
                    t.device());
}

// Checks the arguments that both operators share and returns the bias in the tile's dtype.
inline std::optional<at::Tensor> check_tile(at::DeviceType device, const at::Tensor& tile,
                                            const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                            std::optional<double> softcap, double logit_scale, double temperature) {
  const auto kind = at::DeviceTypeName(device);
  TORCH_CHECK_VALUE(tile.device().type() == device && tile.dim() == 2, "tile: expected a ", kind,
                    " tensor of shape (rows, columns); got shape ", tile.sizes(), " on ", tile.device());
  TORCH_CHECK_VALUE(tile.scalar_type() == at::kFloat || tile.scalar_type() == at::kDouble,
                    "tile: expected float32 or float64; got ", tile.scalar_type());
  TORCH_CHECK_VALUE((tile.size(1) <= 1 || tile.stride(1) == 1) && (tile.size(0) <= 1 || tile.stride(0) >= tile.size(1)),
                    "tile: expected column stride 1 and rows that do not overlap; got shape ", tile.sizes(),
                    ", strides ", tile.strides());
  check_rows(target, "target", tile, at::kLong);
  TORCH_CHECK_VALUE(!softcap || (std::isfinite(*softcap) && *softcap > 0),
                    "softcap: expected a positive finite number; got ", softcap.value_or(0.0));
  TORCH_CHECK_VALUE(std::isfinite(logit_scale), "logit_scale: expected a finite number; got ", logit_scale);
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature > 0,
                    "temperature: expected a positive finite number; got ", temperature);
  if (!bias) return bias;
  TORCH_CHECK_VALUE(bias->device() == tile.device() && bias->dim() == 1 && bias->size(0) == tile.size(1),
                    "bias: expected a ", kind, " tensor of shape (", tile.size(1), ",) for a tile of shape ",
                    tile.sizes(), " on ", tile.device(), "; got shape ", bias->sizes(), " on ", bias->device());
  return bias->to(tile.scalar_type()).contiguous();
}

template <class T>
TileArgs<T> tile_args(const at::Tensor& tile, const std::optional<at::Tensor>& bias, const at::Tensor& target,
                      int64_t start, std::optional<double> softcap, double logit_scale, double temperature) {
  return {tile.data_ptr<T>(),
          tile.stride(0),
          tile.size(1),
          bias ? bias->const_data_ptr<T>() : nullptr,
          target.const_data_ptr<int64_t>(),
          start,
          softcap.has_value(),
          LogitTransform<T>::make(softcap.value_or(1.0), logit_scale, temperature)};
}

// The operator "lse_fwd": Device::lse_fwd(tile, LseFwdArgs) does the work.
template <class Device>
void lse_fwd(const at::Tensor& tile, const std::optional<at::Tensor>& bias, const at::Tensor& target, int64_t start,
             std::optional<double> softcap, double logit_scale, double temperature, const at::Tensor& row_max,
             const at::Tensor& sum_exp, const at::Tensor& target_logit) {
  const auto cast_bias = check_tile(Device::type, tile, bias, target, softcap, logit_scale, temperature);
  check_rows(row_max, "row_max", tile, tile.scalar_type());
  check_rows(sum_exp, "sum_exp", tile, tile.scalar_type());
  check_rows(target_logit, "target_logit", tile, tile.scalar_type());
  const auto run = [&](auto element) {
    using T = decltype(element);
    Device::lse_fwd(tile, LseFwdArgs<T>{tile_args<T>(tile, cast_bias, target, start, softcap, logit_scale, temperature),
                                        row_max.data_ptr<T>(), sum_exp.data_ptr<T>(), target_logit.data_ptr<T>()});
  };
  tile.scalar_type() == at::kFloat ? run(float()) : run(double());
}

// The operator "logits_bwd_": Device::logits_bwd(tile, LogitsBwdArgs) does the work.
template <class Device>
void logits_bwd_(const at::Tensor& tile, const std::optional<at::Tensor>& bias, const at::Tensor& target, int64_t start,
                 std::optional<double> softcap, double logit_scale, double temperature, const at::Tensor& logsumexp,
                 const std::optional<at::Tensor>& grad_logprob) {
  const auto cast_bias = check_tile(Device::type, tile, bias, target, softcap, logit_scale, temperature);
  const bool exact = logsumexp.scalar_type() == at::kDouble;
  check_rows(logsumexp, "logsumexp", tile, exact ? at::kDouble : tile.scalar_type());
  const at::Tensor exact_logsumexp = logsumexp.to(at::kDouble);
  if (grad_logprob) check_rows(*grad_logprob, "grad_logprob", tile, tile.scalar_type());
  const auto run = [&](auto element) {
    using T = decltype(element);
    Device::logits_bwd(tile,
                       LogitsBwdArgs<T>{tile_args<T>(tile, cast_bias, target, start, softcap, logit_scale, temperature),
                                        exact_logsumexp.const_data_ptr<double>(),
                                        grad_logprob ? grad_logprob->const_data_ptr<T>() : nullptr});
  };
  tile.scalar_type() == at::kFloat ? run(float()) : run(double());
}

// The operator "mark_columns_": Device::mark(tile, MarkArgs) does the work.
template <class Device>
void mark_columns_(const at::Tensor& marked, const at::Tensor& tile, const std::optional<at::Tensor>& bias,
                   const at::Tensor& target, int64_t start, std::optional<double> softcap, double logit_scale,
                   double temperature, const at::Tensor& least) {
  const auto cast_bias = check_tile(Device::type, tile, bias, target, softcap, logit_scale, temperature);
  check_rows(least, "least", tile, tile.scalar_type());
  TORCH_CHECK_VALUE(marked.device() == tile.device() && marked.scalar_type() == at::kBool && marked.dim() == 1 &&
                        marked.size(0) == tile.size(1) && marked.is_contiguous(),
                    "marked: expected a contiguous bool tensor of shape (", tile.size(1), ",) for a tile of shape ",
                    tile.sizes(), " on ", tile.device(), "; got shape ", marked.sizes(), ", dtype ",
                    marked.scalar_type(), " on ", marked.device());
  const auto run = [&](auto element) {
    using T = decltype(element);
    Device::mark(tile, MarkArgs<T>{tile_args<T>(tile, cast_bias, target, start, softcap, logit_scale, temperature),
                                   tile.size(0), least.const_data_ptr<T>(), marked.data_ptr<bool>()});
  };
  tile.scalar_type() == at::kFloat ? run(float()) : run(double());
}

}  // namespace mopo
