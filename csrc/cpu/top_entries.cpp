#include "top_entries.h"

#include "check.h"

#include <tuple>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mgrpo {

using at::Tensor;

TopEntries checked_entries(const Tensor& ids, const Tensor& logits, const Tensor& counts, const Tensor& rest, int64_t rows) {
  check_dtype("ids", ids, INT32);
  TORCH_CHECK_VALUE(
      ids.dim() == 2 && ids.size(0) == rows && ids.size(1) % ROOM_STEP == 0 && ids.size(1) >= ROOM_STEP && ids.size(1) <= MAX_ROOM,
      "ids: expected shape (", rows, ", a multiple of ", ROOM_STEP, " up to ", MAX_ROOM, "), got ", ids.sizes());
  check_tensor("logits", logits, FLOAT32, ids.sizes());
  check_tensor("counts", counts, INT32, {rows});
  check_tensor("rest", rest, FLOAT32, {4, rows});
  TORCH_CHECK_VALUE(
      ids.is_contiguous() && logits.is_contiguous() && counts.is_contiguous() && (rows <= 1 || rest.stride(1) == 1),
      "expected contiguous ids, logits and counts, and a rest with an inner stride of 1");
  const int64_t room = ids.size(1);
  if (rows > 0) {
    const auto [least, most] = counts.aminmax();
    TORCH_CHECK_VALUE(
        least.item<int32_t>() >= 1 && most.item<int32_t>() <= room, "counts: expected numbers in [1, ", room, "], got ", least, " to ", most);
  }
  return {
      .room = room,
      .ids = ids.mutable_data_ptr<int32_t>(),
      .logits = logits.mutable_data_ptr<float>(),
      .counts = counts.mutable_data_ptr<int32_t>(),
      .rest = rest.mutable_data_ptr<float>(),
      .stride = rest.stride(0)};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> entry_gradient(
    const Tensor& ids, const Tensor& logits, const Tensor& counts, const Tensor& rest, const Tensor& coefficients_, const Tensor& logsumexp_,
    const std::optional<Tensor>& temperature_per_row, double temperature, double logit_scale, std::optional<double> softcap,
    double tolerance) {
  check_dtype("ids", ids, INT32);
  const int64_t rows = ids.dim() ? ids.size(0) : 0;
  check_tensor("coefficients", coefficients_, FLOAT32, {4, rows});
  check_tensor("logsumexp", logsumexp_, FLOAT32, {rows});
  check_tensor("temperature_per_row", temperature_per_row, FLOATS, {rows});
  const Tensor coefficients = coefficients_.contiguous(), logsumexp = logsumexp_.contiguous();
  const Tensor per_row = temperature_per_row ? temperature_per_row->to(at::kFloat).contiguous() : Tensor();
  const Tensor kept = at::empty(ids.sizes(), ids.options()), gradient = at::empty(ids.sizes(), logits.options());
  const Tensor outside = at::empty({rows}, ids.options().dtype(at::kBool));
  MGRPO_CALL(entry_gradient_kernel)
  ({.entries = checked_entries(ids, logits, counts, rest, rows),
    .rows = rows,
    .coefficients = coefficients.const_data_ptr<float>(),
    .logsumexp = logsumexp.const_data_ptr<float>(),
    .temperature_per_row = per_row.defined() ? per_row.const_data_ptr<float>() : nullptr,
    .temperature = temperature,
    .logit_scale = logit_scale,
    .softcap = softcap.value_or(0),
    .tolerance = tolerance},
   kept.mutable_data_ptr<int32_t>(), gradient.mutable_data_ptr<float>(), outside.mutable_data_ptr<bool>());
  return {kept, gradient, outside};
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("entry_gradient", &entry_gradient);
}

} // namespace
} // namespace mgrpo
