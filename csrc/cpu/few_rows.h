#pragma once

#include <cstdint>
#include <type_traits>

#include "dispatch.h"

namespace mgrpo {

// x (rows, inner) and a weight (columns, inner), both with rows that lie `stride` elements apart; bias (columns) or null.
struct FewRows {
  const float *x, *weight, *bias;
  int64_t x_stride, weight_stride, rows, inner, columns;
};

} // namespace mgrpo

// Writes out (rows, columns) = x weight^T + bias. `packed` (rows rounded up to a multiple of 32, inner) has zeros; x is rearranged there.
MGRPO_KERNEL(few_rows_kernel, void(const mgrpo::FewRows&, float* packed, float* out))
