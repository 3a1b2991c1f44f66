#include "kept.h"

#include "check.h"

#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

constexpr at::ScalarType IDS[] = {at::kInt};

// Rows whose elements lie side by side: a copy only where they do not.
Tensor checked_rows(const char* name, const Tensor& x, Dtypes dtypes) {
  check_dtype(name, x, dtypes);
  TORCH_CHECK_VALUE(x.dim() == 2, name, ": expected 2 dimensions, got shape ", x.sizes());
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

Tensor checked_ids(const Tensor& ids, int64_t rows) {
  check_dtype("ids", ids, IDS);
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == rows, "ids: expected shape (", rows, ", K), got ", ids.sizes());
  return ids.contiguous();
}

Tensor checked_grad(const Tensor& grad, const Tensor& ids) {
  check_tensor("grad", grad, FLOAT32, ids.sizes());
  return grad.contiguous();
}

Tensor logits(const Tensor& hidden_, const Tensor& weight_, const Tensor& ids_) {
  const Tensor hidden = checked_rows("hidden", hidden_, KERNEL_FLOATS), weight = checked_rows("weight", weight_, {hidden.scalar_type()});
  check_shape("weight", weight, {weight.size(0), hidden.size(1)});
  const Tensor ids = checked_ids(ids_, hidden.size(0));
  const Tensor x = at::empty(ids.sizes(), hidden.options().dtype(at::kFloat));
  MGRPO_CALL(kept_logits_kernel)
  ({hidden.scalar_type(), hidden.const_data_ptr(), weight.const_data_ptr(), hidden.stride(0), weight.stride(0),
    ids.const_data_ptr<int32_t>(), ids.size(0), ids.size(1), hidden.size(1), weight.size(0)},
   x.mutable_data_ptr<float>());
  return x;
}

Tensor hidden_gradient(const Tensor& grad_, const Tensor& weight_, const Tensor& ids_) {
  const Tensor weight = checked_rows("weight", weight_, KERNEL_FLOATS), ids = checked_ids(ids_, ids_.dim() ? ids_.size(0) : 0);
  const Tensor grad = checked_grad(grad_, ids);
  const Tensor out = at::empty({ids.size(0), weight.size(1)}, grad.options());
  MGRPO_CALL(kept_hidden_gradient_kernel)
  ({weight.scalar_type(), nullptr, weight.const_data_ptr(), 0, weight.stride(0), ids.const_data_ptr<int32_t>(), ids.size(0), ids.size(1),
    weight.size(1), weight.size(0)},
   grad.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

// Lists the places of ids within [0, vocab) by id and then by place, and says where those of each id begin: a counting sort.
std::pair<std::vector<int64_t>, std::vector<int64_t>> by_id(const Tensor& ids, int64_t vocab) {
  const int32_t* values = ids.const_data_ptr<int32_t>();
  std::vector<int64_t> bounds(vocab + 1, 0);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    if (values[i] >= 0 && values[i] < vocab) {
      ++bounds[values[i] + 1];
    }
  }
  for (int64_t id = 0; id < vocab; ++id) {
    bounds[id + 1] += bounds[id];
  }
  std::vector<int64_t> order(bounds[vocab]), next(bounds.begin(), bounds.end() - 1);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    if (values[i] >= 0 && values[i] < vocab) {
      order[next[values[i]]++] = i;
    }
  }
  return {std::move(order), std::move(bounds)};
}

Tensor weight_gradient(const Tensor& grad_, const Tensor& hidden_, const Tensor& ids_, const Tensor& total, bool add) {
  const Tensor hidden = checked_rows("hidden", hidden_, KERNEL_FLOATS), ids = checked_ids(ids_, hidden.size(0));
  const Tensor grad = checked_grad(grad_, ids);
  check_dtype("total", total, {hidden.scalar_type()});
  TORCH_CHECK_VALUE(
      total.dim() == 2 && total.size(0) >= 1 && total.size(0) <= INT32_MAX && total.size(1) == hidden.size(1) && total.is_contiguous(),
      "total: expected a contiguous tensor of shape (vocab, ", hidden.size(1), ") with vocab in [1, 2^31), got ", total.sizes(),
      " with strides ", total.strides());
  const int64_t vocab = total.size(0);
  const auto [order, bounds] = by_id(ids, vocab);
  const Tensor bias = at::empty({vocab}, grad.options());
  MGRPO_CALL(kept_weight_gradient_kernel)
  ({hidden.scalar_type(), hidden.const_data_ptr(), nullptr, hidden.stride(0), 0, ids.const_data_ptr<int32_t>(), ids.size(0), ids.size(1),
    hidden.size(1), vocab},
   grad.const_data_ptr<float>(), order.data(), bounds.data(), add, total.mutable_data_ptr(), bias.mutable_data_ptr<float>());
  return bias;
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("kept_logits", &logits);
  m.impl("kept_hidden_gradient", &hidden_gradient);
  m.impl("kept_weight_gradient_", &weight_gradient);
}

} // namespace
} // namespace mgrpo
