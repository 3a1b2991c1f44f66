// Quartiles of small groups: a sort each, nothing for vectors to do.

#include "check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

// As torch.quantile interpolates: "linear", by torch.lerp.
float quantile(const std::vector<float>& sorted, float q) {
  if (sorted.empty()) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float rank = q * static_cast<float>(sorted.size() - 1), below = std::floor(rank), weight = rank - below;
  const size_t at = static_cast<size_t>(below);
  const float low = sorted[at], high = sorted[std::min(at + 1, sorted.size() - 1)];
  return weight < 0.5f ? low + weight * (high - low) : high - (high - low) * (1.0f - weight);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> iqr_filter(
    const Tensor& entropy_, const Tensor& offsets_, const std::optional<Tensor>& mask_, double k) {
  check_dtype("entropy", entropy_, FLOAT32);
  TORCH_CHECK_VALUE(entropy_.dim() == 1, "entropy: expected shape (B,), got ", entropy_.sizes());
  check_tensor("mask", mask_, BOOLS, entropy_.sizes());
  const Tensor entropy = entropy_.contiguous(), offsets = checked_offsets("groups", offsets_, entropy_.size(0)),
               mask = mask_ ? mask_->contiguous() : Tensor();
  const int64_t groups = offsets.size(0) - 1;
  Tensor keep = at::zeros(entropy.sizes(), entropy.options().dtype(at::kBool));
  Tensor lower = at::empty({groups}, entropy.options()), q1 = at::empty_like(lower), q3 = at::empty_like(lower);
  const float* values = entropy.const_data_ptr<float>();
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  const bool* chosen = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  bool* kept = keep.mutable_data_ptr<bool>();
  float *lower_out = lower.mutable_data_ptr<float>(), *q1_out = q1.mutable_data_ptr<float>(), *q3_out = q3.mutable_data_ptr<float>();
  at::parallel_for(0, groups, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> sorted;
    for (int64_t group = begin; group < end; ++group) {
      auto valid = [&](int64_t i) { return !std::isnan(values[i]) && (!chosen || chosen[i]); };
      sorted.clear();
      for (int64_t i = starts[group]; i < starts[group + 1]; ++i) {
        if (valid(i)) {
          sorted.push_back(values[i]);
        }
      }
      std::sort(sorted.begin(), sorted.end());
      q1_out[group] = quantile(sorted, 0.25f);
      q3_out[group] = quantile(sorted, 0.75f);
      lower_out[group] = q1_out[group] - static_cast<float>(k) * (q3_out[group] - q1_out[group]);
      for (int64_t i = starts[group]; i < starts[group + 1]; ++i) {
        kept[i] = valid(i) && values[i] >= lower_out[group];
      }
    }
  });
  return {keep, lower, q1, q3};
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("iqr_filter", &iqr_filter);
}

} // namespace
} // namespace mgrpo
