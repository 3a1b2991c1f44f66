#include "few_rows.h"

#include "check.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

Tensor few_rows(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_) {
  check_dtype("x", x_, FLOAT32);
  check_dtype("weight", weight_, FLOAT32);
  TORCH_CHECK_VALUE(x_.dim() == 2, "x: expected 2 dimensions, got shape ", x_.sizes());
  TORCH_CHECK_VALUE(
      weight_.dim() == 2 && weight_.size(1) == x_.size(1), "weight: expected shape (columns, ", x_.size(1), "), got ", weight_.sizes());
  check_tensor("bias", bias_, FLOAT32, {weight_.size(0)});
  const auto side_by_side = [](const Tensor& each) { return each.size(1) <= 1 || each.stride(1) == 1 ? each : each.contiguous(); };
  const Tensor x = side_by_side(x_), weight = side_by_side(weight_), bias = bias_ ? bias_->contiguous() : Tensor();
  const Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  if (out.numel()) {
    const FewRows of{
        x.const_data_ptr<float>(), weight.const_data_ptr<float>(), bias.defined() ? bias.const_data_ptr<float>() : nullptr,
        x.stride(0),               weight.stride(0),               x.size(0),
        x.size(1),                 weight.size(0)};
    const Tensor packed = of.rows % 32 ? at::zeros({of.rows / 32 * 32 + 32, of.inner}, x.options()) : at::empty(x.sizes(), x.options());
    MGRPO_CALL(few_rows_kernel)(of, packed.mutable_data_ptr<float>(), out.mutable_data_ptr<float>());
  }
  return out;
}

// Whether this is faster than aten's product. It was not compared with MKL on Intel's processors.
bool is_faster() {
  return mkl_is_held_back() && isa() != Isa::Default;
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("few_rows", &few_rows);
}

TORCH_LIBRARY_FRAGMENT(mgrpo_native, m) {
  m.def("few_rows_is_faster() -> bool", &is_faster);
}

} // namespace
} // namespace mgrpo
