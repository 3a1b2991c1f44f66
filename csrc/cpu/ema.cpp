#include "ema.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

constexpr int64_t CHUNK = 1 << 16;

void ema_update(
    at::TensorList ema, at::TensorList params, at::TensorList emit, double decay, at::IntArrayRef keys, at::IntArrayRef spans) {
  TORCH_CHECK(params.size() == ema.size() && (emit.empty() || emit.size() == ema.size()));
  TORCH_CHECK(spans.size() == 3 * ema.size() && (keys.empty() || keys.size() == 2 * ema.size()));
  std::vector<EmaTensor> tensors(ema.size());
  std::vector<EmaChunk> chunks;
  for (size_t i = 0; i < ema.size(); ++i) {
    TORCH_CHECK(ema[i].is_contiguous() && params[i].is_contiguous() && params[i].numel() == ema[i].numel());
    TORCH_CHECK(emit.empty() || (emit[i].is_contiguous() && emit[i].numel() == ema[i].numel()));
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
