#include "ema.h"

#include "check.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

constexpr int64_t CHUNK = 1 << 16;

void check_part(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
  check_tensor(name, x, FLOATS, sizes);
  TORCH_CHECK_VALUE(x.is_contiguous(), name, ": expected contiguous tensors, got strides ", x.strides());
}

void ema_update(
    at::TensorList ema, at::TensorList params, at::TensorList emit, double decay, at::IntArrayRef keys, at::IntArrayRef spans) {
  TORCH_CHECK_VALUE(
      params.size() == ema.size() && (emit.empty() || emit.size() == ema.size()), "ema_update_: expected as many params as ema, ", ema.size(),
      ", and as many emit or none, got ", params.size(), " and ", emit.size());
  TORCH_CHECK_VALUE(
      spans.size() == 3 * ema.size() && (keys.empty() || keys.size() == 2 * ema.size()),
      "ema_update_: expected 3 spans for each tensor, and 2 keys or none, got ", spans.size(), " and ", keys.size(), " for ", ema.size());
  std::vector<EmaTensor> tensors(ema.size());
  std::vector<EmaChunk> chunks;
  for (size_t i = 0; i < ema.size(); ++i) {
    check_part("ema", ema[i], ema[i].sizes());
    check_part("params", params[i], ema[i].sizes());
    if (!emit.empty()) {
      check_part("emit", emit[i], ema[i].sizes());
    }
    TORCH_CHECK_VALUE(spans[3 * i + 1] >= 1, "spans: expected at least 1 inner element, got ", spans[3 * i + 1]);
    tensors[i] = {
        .ema = ema[i].mutable_data_ptr(),
        .param = params[i].const_data_ptr(),
        .emit = emit.empty() ? nullptr : emit[i].mutable_data_ptr(),
        .ema_dtype = ema[i].scalar_type(),
        .param_dtype = params[i].scalar_type(),
        .emit_dtype = emit.empty() ? ema[i].scalar_type() : emit[i].scalar_type(),
        .size = ema[i].numel(),
        .stochastic = !keys.empty(),
        .key = {keys.empty() ? 0 : static_cast<uint32_t>(keys[2 * i]), keys.empty() ? 0 : static_cast<uint32_t>(keys[2 * i + 1])},
        .base = spans[3 * i],
        .inner = spans[3 * i + 1],
        .stride = spans[3 * i + 2]};
    for (int64_t begin = 0; begin < tensors[i].size; begin += CHUNK) {
      chunks.push_back({&tensors[i], begin, std::min(begin + CHUNK, tensors[i].size)});
    }
  }
  MGRPO_CALL(ema_kernel)(chunks.data(), static_cast<int64_t>(chunks.size()), decay);
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("ema_update_", &ema_update);
}

} // namespace
} // namespace mgrpo
