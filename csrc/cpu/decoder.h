#pragma once

#include <cstdint>
#include <type_traits>

#include "dispatch.h"

namespace mgrpo {

// The newest tokens of `rollouts` of each of `prompts`: `heads` of keys, each for `queries` queries, of `inner` (keys) and `outer` (values)
// elements. The rows of q, k and v, and the heads in a row, lie that many elements apart; all else is contiguous.
struct Attention {
  const float *q, *k, *v, *prompt_keys, *prompt_values; // prompt_keys (prompts, heads, inner, longest), prompt_values (prompts, heads, longest, outer)
  const int64_t* lengths; // of the prompts
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  int64_t prompts, heads, rollouts, queries, inner, outer, longest, room;
  int64_t before, window; // tokens of each rollout before these; how many tokens a query attends to, itself included
  float scale;
};

} // namespace mgrpo

// Appends k and v to keys (prompts, heads, rollouts, inner, room) and values (prompts, heads, rollouts, room, outer); writes
// out (rows, heads * queries, outer).
MGRPO_KERNEL(attend_kernel, void(const mgrpo::Attention&, float* keys, float* values, float* out))

// out (rows, columns) = x / sqrt(mean(x^2) + eps) * weight
MGRPO_KERNEL(rms_norm_kernel, void(const float* x, const float* weight, float eps, int64_t rows, int64_t columns, float* out))

// out (rows, heads, 2 half) = x cos + (second half of x, first half of x) sin, with the cos and sin (rows, 2 half) of the row. The rows of x, and the
// heads in a row, lie that many elements apart.
MGRPO_KERNEL(
    rotate_kernel, void(const float* x, int64_t x_row, int64_t x_head, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t half, float* out))

// out (count) = gate / (1 + e^-gate) * up
MGRPO_KERNEL(swiglu_kernel, void(const float* gate, const float* up, int64_t count, float* out))
