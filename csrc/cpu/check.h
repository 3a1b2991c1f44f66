// Guards of what a plain kernel is given: after them, no kernel reads or writes outside of a tensor, whoever calls it. They compare sizes,
// and only offsets are read. Not for <op>_kernel.cpp files.
#pragma once

#include <algorithm>
#include <optional>

#include <ATen/ATen.h>

namespace mgrpo {

using Dtypes = at::ArrayRef<at::ScalarType>;

inline constexpr at::ScalarType BOOLS[] = {at::kBool}, FLOAT32[] = {at::kFloat}, INT32[] = {at::kInt}, INTS[] = {at::kInt, at::kLong}, LONGS[] = {at::kLong},
                                KERNEL_FLOATS[] = {at::kFloat, at::kBFloat16, at::kHalf},
                                FLOATS[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};

inline void check_dtype(const char* name, const at::Tensor& x, Dtypes dtypes) {
  TORCH_CHECK_TYPE(
      std::find(dtypes.begin(), dtypes.end(), x.scalar_type()) != dtypes.end(), name, ": expected one of the dtypes ", dtypes, ", got ",
      x.scalar_type());
  TORCH_CHECK_VALUE(
      x.is_cpu() && x.layout() == at::kStrided, name, ": expected a dense tensor on cpu, got layout ", x.layout(), " on ", x.device());
}

inline void check_shape(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.sizes() == sizes, name, ": expected shape ", sizes, ", got ", x.sizes());
}

inline void check_tensor(const char* name, const at::Tensor& x, Dtypes dtypes, at::IntArrayRef sizes) {
  check_dtype(name, x, dtypes);
  check_shape(name, x, sizes);
}

inline void check_tensor(const char* name, const std::optional<at::Tensor>& x, Dtypes dtypes, at::IntArrayRef sizes) {
  if (x) {
    check_tensor(name, *x, dtypes, sizes);
  }
}

// Returns offsets (parts + 1,), contiguous, that ascend from 0 to `total`.
inline at::Tensor checked_offsets(const char* name, const at::Tensor& x, int64_t total) {
  check_dtype(name, x, LONGS);
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) >= 1, name, ": expected shape (parts + 1,), got ", x.sizes());
  const at::Tensor offsets = x.contiguous();
  const int64_t *begin = offsets.const_data_ptr<int64_t>(), *end = begin + offsets.size(0);
  TORCH_CHECK_VALUE(
      *begin == 0 && end[-1] == total && std::is_sorted(begin, end), name, ": expected ascending offsets from 0 to ", total, ", got ",
      at::IntArrayRef(begin, std::min<size_t>(end - begin, 16)));
  return offsets;
}

} // namespace mgrpo
