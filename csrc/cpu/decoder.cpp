#include "decoder.h"

#include "check.h"

#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

Tensor attend_(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& prompt_keys_, const Tensor& prompt_values_, const Tensor& lengths_,
    const Tensor& keys, const Tensor& values, int64_t before, std::optional<int64_t> window, double scale) {
  check_dtype("keys", keys, FLOAT32);
  check_dtype("values", values, FLOAT32);
  TORCH_CHECK_VALUE(
      keys.dim() == 5 && values.dim() == 5 && keys.is_contiguous() && values.is_contiguous(),
      "keys, values: expected 5 dimensions, contiguous, got shapes ", keys.sizes(), " and ", values.sizes());
  const int64_t U = keys.size(0), K = keys.size(1), c = keys.size(2), D = keys.size(3), room = keys.size(4), E = values.size(4);
  check_shape("values", values, {U, K, c, room, E});
  TORCH_CHECK_VALUE(0 <= before && before < room, "before: expected at least 0 and less than the room of ", room, ", got ", before);
  TORCH_CHECK_VALUE(!window || *window >= 1, "window: expected at least 1, got ", window.value_or(0));
  check_dtype("q", q_, FLOAT32);
  TORCH_CHECK_VALUE(
      q_.dim() == 3 && q_.size(0) == U * c && (K ? q_.size(1) % K == 0 : q_.size(1) == 0) && q_.size(2) == D,
      "q: expected shape (", U * c, ", a multiple of ", K, ", ", D, "), got ", q_.sizes());
  check_tensor("k", k_, FLOAT32, {U * c, K, D});
  check_tensor("v", v_, FLOAT32, {U * c, K, E});
  check_dtype("prompt_keys", prompt_keys_, FLOAT32);
  TORCH_CHECK_VALUE(prompt_keys_.dim() == 3, "prompt_keys: expected 3 dimensions, got shape ", prompt_keys_.sizes());
  const int64_t longest = prompt_keys_.size(2);
  check_shape("prompt_keys", prompt_keys_, {U * K, D, longest});
  check_tensor("prompt_values", prompt_values_, FLOAT32, {U * K, longest, E});
  check_tensor("lengths", lengths_, LONGS, {U});
  const Tensor lengths = lengths_.contiguous(), prompt_keys = prompt_keys_.contiguous(), prompt_values = prompt_values_.contiguous();
  const int64_t* given = lengths.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(
      std::all_of(given, given + U, [&](int64_t each) { return 0 <= each && each <= longest; }), "lengths: expected 0 to ", longest, ", got ",
      at::IntArrayRef(given, std::min<int64_t>(U, 16)));
  const auto side_by_side = [](const Tensor& each) { return each.size(2) <= 1 || each.stride(2) == 1 ? each : each.contiguous(); };
  const Tensor q = side_by_side(q_), k = side_by_side(k_), v = side_by_side(v_);
  const Tensor out = at::empty({U * c, q.size(1), E}, q.options());
  if (U * K * c) {
    const Attention of{
        .q = q.const_data_ptr<float>(),
        .k = k.const_data_ptr<float>(),
        .v = v.const_data_ptr<float>(),
        .prompt_keys = prompt_keys.const_data_ptr<float>(),
        .prompt_values = prompt_values.const_data_ptr<float>(),
        .lengths = given,
        .q_row = q.stride(0),
        .q_head = q.stride(1),
        .k_row = k.stride(0),
        .k_head = k.stride(1),
        .v_row = v.stride(0),
        .v_head = v.stride(1),
        .prompts = U,
        .heads = K,
        .rollouts = c,
        .queries = q.size(1) / K,
        .inner = D,
        .outer = E,
        .longest = longest,
        .room = room,
        .before = before,
        .window = std::min(window.value_or(longest + room), longest + room),
        .scale = static_cast<float>(scale)};
    MGRPO_CALL(attend_kernel)(of, keys.mutable_data_ptr<float>(), values.mutable_data_ptr<float>(), out.mutable_data_ptr<float>());
  }
  return out;
}

Tensor rms_norm(const Tensor& x_, const Tensor& weight_, double eps) {
  check_dtype("x", x_, FLOAT32);
  TORCH_CHECK_VALUE(x_.dim() >= 1, "x: expected at least 1 dimension, got a scalar");
  const int64_t columns = x_.size(-1);
  check_tensor("weight", weight_, FLOAT32, {columns});
  const Tensor x = x_.contiguous(), weight = weight_.contiguous(), out = at::empty(x.sizes(), x.options());
  if (out.numel()) {
    MGRPO_CALL(rms_norm_kernel)(
        x.const_data_ptr<float>(), weight.const_data_ptr<float>(), static_cast<float>(eps), x.numel() / columns, columns,
        out.mutable_data_ptr<float>());
  }
  return out;
}

Tensor rotate(const Tensor& x_, const Tensor& cos_, const Tensor& sin_) {
  check_dtype("x", x_, FLOAT32);
  TORCH_CHECK_VALUE(x_.dim() == 3 && x_.size(2) % 2 == 0, "x: expected shape (rows, heads, an even number), got ", x_.sizes());
  const int64_t rows = x_.size(0), heads = x_.size(1), inner = x_.size(2);
  check_tensor("cos", cos_, FLOAT32, {rows, inner});
  check_tensor("sin", sin_, FLOAT32, {rows, inner});
  const Tensor x = x_.stride(2) == 1 ? x_ : x_.contiguous(), cos = cos_.contiguous(), sin = sin_.contiguous();
  const Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel()) {
    MGRPO_CALL(rotate_kernel)(
        x.const_data_ptr<float>(), x.stride(0), x.stride(1), cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), rows, heads, inner / 2,
        out.mutable_data_ptr<float>());
  }
  return out;
}

Tensor swiglu(const Tensor& gate_, const Tensor& up_) {
  check_dtype("gate", gate_, FLOAT32);
  check_tensor("up", up_, FLOAT32, gate_.sizes());
  const Tensor gate = gate_.contiguous(), up = up_.contiguous(), out = at::empty(gate.sizes(), gate.options());
  if (out.numel()) {
    MGRPO_CALL(swiglu_kernel)(gate.const_data_ptr<float>(), up.const_data_ptr<float>(), gate.numel(), out.mutable_data_ptr<float>());
  }
  return out;
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("attend_", &attend_);
  m.impl("rms_norm", &rms_norm);
  m.impl("rotate", &rotate);
  m.impl("swiglu", &swiglu);
}

} // namespace
} // namespace mgrpo
