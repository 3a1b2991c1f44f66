#include "token_stats.h"

#include "check.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

Tensor last_dim_contiguous(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

// Where each row of x (..., V) starts, in elements: any strides of the leading dimensions.
std::vector<int64_t> row_offsets(const Tensor& x) {
  const int64_t leading = x.dim() - 1, rows = x.numel() / x.size(-1);
  std::vector<int64_t> offsets(rows), index(leading, 0);
  int64_t offset = 0;
  for (int64_t row = 0; row < rows; ++row) {
    offsets[row] = offset;
    for (int64_t dim = leading - 1; dim >= 0; --dim) {
      offset += x.stride(dim);
      if (++index[dim] < x.size(dim)) {
        break;
      }
      offset -= index[dim] * x.stride(dim);
      index[dim] = 0;
    }
  }
  return offsets;
}

Tensor contiguous_as(const std::optional<Tensor>& x, at::ScalarType dtype) {
  return x ? x->to(dtype).contiguous() : Tensor();
}

// Checks what forward and backward have in common; returns the shape of the rows.
at::IntArrayRef check_rows(
    const Tensor& logits, const std::optional<Tensor>& labels, const std::optional<Tensor>& mask, const std::optional<Tensor>& temperature) {
  check_dtype("logits", logits, KERNEL_FLOATS);
  TORCH_CHECK_VALUE(logits.dim() >= 1 && logits.size(-1) >= 1, "logits: expected shape (..., V) with V >= 1, got ", logits.sizes());
  const auto rows = logits.sizes().slice(0, logits.dim() - 1);
  if (labels) {
    check_dtype("labels", *labels, INTS);
    TORCH_CHECK_VALUE(
        labels->dim() == logits.dim() && labels->sizes().slice(0, logits.dim() - 1) == rows, "labels: expected shape (..., K) for logits ",
        logits.sizes(), ", got ", labels->sizes());
  }
  check_tensor("mask", mask, BOOLS, rows);
  check_tensor("temperature_per_row", temperature, FLOATS, rows);
  return rows;
}

template <typename T>
const T* data_or_null(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits_, const std::optional<Tensor>& labels_, const std::optional<Tensor>& mask_,
    const std::optional<Tensor>& temperature_, double temperature, bool want_logprob, bool want_entropy, bool want_self_certainty) {
  const auto rows = check_rows(logits_, labels_, mask_, temperature_);
  const Tensor logits = last_dim_contiguous(logits_);
  const Tensor labels = contiguous_as(labels_, at::kLong), mask = contiguous_as(mask_, at::kBool),
               temperature_per_row = contiguous_as(temperature_, at::kFloat);
  const auto options = logits.options().dtype(at::kFloat);
  want_logprob &= labels.defined();
  Tensor logprob = want_logprob ? at::empty(labels.sizes(), options) : at::empty({0}, options);
  Tensor entropy = want_entropy ? at::empty(rows, options) : at::empty({0}, options);
  Tensor self_certainty = want_self_certainty ? at::empty(rows, options) : at::empty({0}, options);
  Tensor logsumexp = at::empty(rows, options);
  const auto offsets = row_offsets(logits);
  MGRPO_CALL(token_stats_forward_kernel)
  ({.dtype = logits.scalar_type(),
    .logits = logits.const_data_ptr(),
    .offsets = offsets.data(),
    .rows = static_cast<int64_t>(offsets.size()),
    .vocab = logits.size(-1),
    .labels_per_row = want_logprob ? labels.size(-1) : 0,
    .labels = data_or_null<int64_t>(labels),
    .mask = data_or_null<bool>(mask),
    .temperature_per_row = data_or_null<float>(temperature_per_row),
    .temperature = temperature,
    .logprob = want_logprob ? logprob.mutable_data_ptr<float>() : nullptr,
    .entropy = want_entropy ? entropy.mutable_data_ptr<float>() : nullptr,
    .self_certainty = want_self_certainty ? self_certainty.mutable_data_ptr<float>() : nullptr,
    .logsumexp = logsumexp.mutable_data_ptr<float>()});
  return {logprob, entropy, self_certainty, logsumexp};
}

void backward(
    const Tensor& out_, const std::optional<Tensor>& grad_logprob_, const std::optional<Tensor>& grad_entropy_,
    const std::optional<Tensor>& grad_self_certainty_, const Tensor& logits_, const std::optional<Tensor>& labels_,
    const std::optional<Tensor>& mask_, const std::optional<Tensor>& temperature_, double temperature, const Tensor& logsumexp_,
    const std::optional<Tensor>& entropy_) {
  const auto rows = check_rows(logits_, labels_, mask_, temperature_);
  check_tensor("out", out_, {logits_.scalar_type()}, logits_.sizes());
  check_tensor("logsumexp", logsumexp_, FLOATS, rows);
  check_tensor("grad_entropy", grad_entropy_, FLOATS, rows);
  check_tensor("entropy", entropy_, FLOATS, rows);
  check_tensor("grad_self_certainty", grad_self_certainty_, FLOATS, rows);
  TORCH_CHECK_VALUE(entropy_ || !grad_entropy_, "entropy: expected a tensor with grad_entropy, got None");
  if (grad_logprob_) {
    TORCH_CHECK_VALUE(labels_, "labels: expected a tensor with grad_logprob, got None");
    check_tensor("grad_logprob", grad_logprob_, FLOATS, labels_->sizes());
  }
  if (logits_.numel() == 0) {
    return;
  }
  const Tensor logits = last_dim_contiguous(logits_), out = last_dim_contiguous(out_); // `out` is `logits` when in place
  const Tensor labels = contiguous_as(labels_, at::kLong), mask = contiguous_as(mask_, at::kBool),
               temperature_per_row = contiguous_as(temperature_, at::kFloat), grad_logprob = contiguous_as(grad_logprob_, at::kFloat),
               grad_entropy = contiguous_as(grad_entropy_, at::kFloat),
               grad_self_certainty = contiguous_as(grad_self_certainty_, at::kFloat),
               logsumexp = logsumexp_.to(at::kFloat).contiguous(), entropy = contiguous_as(entropy_, at::kFloat);
  const auto offsets = row_offsets(logits), out_offsets = row_offsets(out);
  MGRPO_CALL(token_stats_backward_kernel)
  ({.dtype = logits.scalar_type(),
    .logits = logits.const_data_ptr(),
    .offsets = offsets.data(),
    .out = out.mutable_data_ptr(),
    .out_offsets = out_offsets.data(),
    .rows = static_cast<int64_t>(offsets.size()),
    .vocab = logits.size(-1),
    .labels_per_row = labels.defined() ? labels.size(-1) : 0,
    .labels = data_or_null<int64_t>(labels),
    .mask = data_or_null<bool>(mask),
    .temperature_per_row = data_or_null<float>(temperature_per_row),
    .temperature = temperature,
    .grad_logprob = data_or_null<float>(grad_logprob),
    .grad_entropy = data_or_null<float>(grad_entropy),
    .grad_self_certainty = data_or_null<float>(grad_self_certainty),
    .logsumexp = logsumexp.const_data_ptr<float>(),
    .entropy = data_or_null<float>(entropy)});
  if (!out.is_same(out_)) {
    out_.copy_(out);
  }
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("token_stats_forward", &forward);
  m.impl("token_stats_backward", &backward);
}

} // namespace
} // namespace mgrpo
