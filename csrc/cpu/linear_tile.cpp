#include "linear_tile.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

// Keeps the converted tensors alive that the tile points into.
struct Arguments {
  Tensor bias, temperature, labels;
  LinearTile tile;
};

Arguments arguments(
    const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature_per_row, double temperature,
    double logit_scale, std::optional<double> softcap, int64_t vocab_start, const std::optional<Tensor>& labels) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "tile: expected contiguous (rows, columns)");
  Arguments args{
      bias ? bias->contiguous() : Tensor(),
      temperature_per_row ? temperature_per_row->to(at::kFloat).contiguous() : Tensor(),
      labels ? labels->to(at::kLong).contiguous() : Tensor(),
      {}};
  TORCH_CHECK(!args.bias.defined() || (args.bias.scalar_type() == x.scalar_type() && args.bias.numel() == x.size(1)));
  TORCH_CHECK(!args.temperature.defined() || args.temperature.numel() == x.size(0));
  TORCH_CHECK(!args.labels.defined() || args.labels.numel() == x.size(0));
  args.tile = {
      .dtype = x.scalar_type(),
      .x = x.mutable_data_ptr(),
      .rows = x.size(0),
      .columns = x.size(1),
      .vocab_start = vocab_start,
      .bias = args.bias.defined() ? args.bias.const_data_ptr() : nullptr,
      .temperature_per_row = args.temperature.defined() ? args.temperature.const_data_ptr<float>() : nullptr,
      .temperature = temperature,
      .logit_scale = logit_scale,
      .softcap = softcap.value_or(0),
      .labels = args.labels.defined() ? args.labels.const_data_ptr<int64_t>() : nullptr};
  return args;
}

void check_rows(const Tensor& values, int64_t count, int64_t rows) {
  TORCH_CHECK(
      values.scalar_type() == at::kFloat && values.dim() == 2 && values.size(0) == count && values.size(1) == rows &&
      (rows <= 1 || values.stride(1) == 1));
}

void tile_state(
    const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature_per_row, double temperature,
    double logit_scale, std::optional<double> softcap, int64_t vocab_start, const std::optional<Tensor>& labels,
    const Tensor& state) {
  const auto args = arguments(x, bias, temperature_per_row, temperature, logit_scale, softcap, vocab_start, labels);
  check_rows(state, 6, x.size(0));
  MGRPO_CALL(tile_state_kernel)(args.tile, state.mutable_data_ptr<float>(), state.stride(0));
}

void tile_gradient(
    const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature_per_row, double temperature,
    double logit_scale, std::optional<double> softcap, int64_t vocab_start, const std::optional<Tensor>& labels,
    const Tensor& coefficients, const Tensor& logsumexp) {
  const auto args = arguments(x, bias, temperature_per_row, temperature, logit_scale, softcap, vocab_start, labels);
  check_rows(coefficients, 4, x.size(0));
  TORCH_CHECK(logsumexp.scalar_type() == at::kFloat && logsumexp.is_contiguous() && logsumexp.numel() == x.size(0));
  MGRPO_CALL(tile_gradient_kernel)
  (args.tile, coefficients.const_data_ptr<float>(), coefficients.stride(0), logsumexp.const_data_ptr<float>());
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("tile_state_", &tile_state);
  m.impl("tile_gradient_", &tile_gradient);
}

} // namespace
} // namespace mgrpo
