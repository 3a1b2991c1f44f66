#pragma once

#include <cstdint>
#include <type_traits>

#include <c10/core/ScalarType.h>

#include "dispatch.h"

namespace mgrpo {

// One tensor of the update, contiguous. mgrpo_kernels/ops/ema/specs.py has the meaning of key and span.
struct EmaTensor {
  void* ema;
  const void* param;
  void* emit; // or null
  c10::ScalarType ema_dtype, param_dtype, emit_dtype;
  int64_t size;
  bool stochastic;
  uint32_t key[2];
  int64_t base, inner, stride;
};

// A piece of a tensor: what a thread takes at a time.
struct EmaChunk {
  const EmaTensor* tensor;
  int64_t begin, end;
};

} // namespace mgrpo

MGRPO_KERNEL(ema_kernel, void(const mgrpo::EmaChunk* chunks, int64_t count, double decay))
