#include "linear_tile.h"

#include "check.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mgrpo {

TopEntries checked_entries(
    const at::Tensor& ids, const at::Tensor& logits, const at::Tensor& counts, const at::Tensor& rest, int64_t rows); // top_entries.cpp

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
  check_dtype("x", x, KERNEL_FLOATS);
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.size(1) >= 1 && x.is_contiguous(), "x: expected a contiguous tile (rows, columns >= 1), got shape ", x.sizes(),
      ", strides ", x.strides());
  check_tensor("bias", bias, {x.scalar_type()}, {x.size(1)});
  check_tensor("temperature_per_row", temperature_per_row, FLOATS, {x.size(0)});
  check_tensor("labels", labels, INTS, {x.size(0)});
  Arguments args{
      bias ? bias->contiguous() : Tensor(),
      temperature_per_row ? temperature_per_row->to(at::kFloat).contiguous() : Tensor(),
      labels ? labels->to(at::kLong).contiguous() : Tensor(),
      {}};
  args.tile = {
      .dtype = x.scalar_type(),
      .x = x.const_data_ptr(),
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

void check_rows(const char* name, const Tensor& values, int64_t count, int64_t rows) {
  check_tensor(name, values, FLOAT32, {count, rows});
  TORCH_CHECK_VALUE(rows <= 1 || values.stride(1) == 1, name, ": expected an inner stride of 1, got strides ", values.strides());
}

void fold_tile(const Arguments& args, const Tensor& state, Wanted wanted, const TopEntries* top) {
  check_rows("state", state, 6, args.tile.rows);
  MGRPO_CALL(tile_state_kernel)(args.tile, wanted, state.mutable_data_ptr<float>(), state.stride(0), top);
}

void tile_state(
    const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature_per_row, double temperature,
    double logit_scale, std::optional<double> softcap, int64_t vocab_start, const std::optional<Tensor>& labels,
    const Tensor& state, bool want_entropy, bool want_self_certainty) {
  const auto args = arguments(x, bias, temperature_per_row, temperature, logit_scale, softcap, vocab_start, labels);
  fold_tile(args, state, {want_entropy, want_self_certainty}, nullptr);
}

void tile_state_top(
    const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature_per_row, double temperature,
    double logit_scale, std::optional<double> softcap, int64_t vocab_start, const std::optional<Tensor>& labels, const Tensor& state,
    bool want_entropy, bool want_self_certainty, const Tensor& ids, const Tensor& logits, const Tensor& counts, const Tensor& rest, int64_t first_column, double smallest) {
  const auto args = arguments(x, bias, temperature_per_row, temperature, logit_scale, softcap, vocab_start, labels);
  TORCH_CHECK_VALUE(
      first_column >= 0 && first_column + x.size(1) <= INT32_MAX, "first_column: expected ids in [0, 2^31), got ", first_column);
  TopEntries top = checked_entries(ids, logits, counts, rest, x.size(0));
  top.first_column = first_column;
  top.smallest = smallest;
  fold_tile(args, state, {want_entropy, want_self_certainty}, &top);
}

void tile_gradient(
    const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature_per_row, double temperature,
    double logit_scale, std::optional<double> softcap, int64_t vocab_start, const std::optional<Tensor>& labels,
    const Tensor& coefficients, const Tensor& logsumexp, const Tensor& out, bool want_entropy, bool want_self_certainty) {
  const auto args = arguments(x, bias, temperature_per_row, temperature, logit_scale, softcap, vocab_start, labels);
  check_rows("coefficients", coefficients, 4, x.size(0));
  check_tensor("logsumexp", logsumexp, FLOAT32, {x.size(0)});
  TORCH_CHECK_VALUE(logsumexp.is_contiguous(), "logsumexp: expected a contiguous tensor, got strides ", logsumexp.strides());
  check_shape("out", out, {x.size(0), x.size(1)});
  TORCH_CHECK_VALUE(out.is_contiguous(), "out: expected a contiguous tensor, got strides ", out.strides());
  TORCH_CHECK_VALUE(
      out.scalar_type() == x.scalar_type() || (x.scalar_type() == at::kFloat && at::isReducedFloatingType(out.scalar_type())),
      "out: expected x's dtype ", x.scalar_type(), ", or 16 bits beside a float32 x, got ", out.scalar_type());
  MGRPO_CALL(tile_gradient_kernel)
  (args.tile, {want_entropy, want_self_certainty}, coefficients.const_data_ptr<float>(), coefficients.stride(0), logsumexp.const_data_ptr<float>(), out.scalar_type(),
   out.mutable_data_ptr());
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("tile_state_", &tile_state);
  m.impl("tile_state_top_", &tile_state_top);
  m.impl("tile_gradient_", &tile_gradient);
}

} // namespace
} // namespace mgrpo
