#pragma once

#include <type_traits>

#include <c10/core/ScalarType.h>

#include "dispatch.h"

namespace mgrpo {

// Rows of logits (rows, vocab): each row is contiguous, and starts at base + offsets[row] (in elements).
struct TokenStatsForward {
  c10::ScalarType dtype;
  const void* logits;
  const int64_t* offsets; // (rows,)
  int64_t rows, vocab, labels_per_row;
  const int64_t* labels; // (rows, labels_per_row) or null
  const bool* mask; // (rows,) or null
  const float* temperature_per_row; // (rows,) or null
  double temperature;
  float* logprob; // (rows, labels_per_row) or null, as the next two
  float* entropy; // (rows,)
  float* self_certainty; // (rows,)
  float* logsumexp; // (rows,)
};

// Gradients of the statistics of such rows, of their logits. A row of `out` may be the row of `logits` itself.
struct TokenStatsBackward {
  c10::ScalarType dtype;
  const void* logits;
  const int64_t* offsets; // (rows,)
  void* out; // (rows, vocab) as below
  const int64_t* out_offsets; // (rows,)
  int64_t rows, vocab, labels_per_row;
  const int64_t* labels; // (rows, labels_per_row) or null
  const bool* mask; // (rows,) or null
  const float* temperature_per_row; // (rows,) or null
  double temperature;
  const float* grad_logprob; // (rows, labels_per_row) or null, as the next two
  const float* grad_entropy; // (rows,)
  const float* grad_self_certainty; // (rows,)
  const float* logsumexp; // (rows,)
  const float* entropy; // (rows,), with grad_entropy
};

} // namespace mgrpo

MGRPO_KERNEL(token_stats_forward_kernel, void(const mgrpo::TokenStatsForward&))
MGRPO_KERNEL(token_stats_backward_kernel, void(const mgrpo::TokenStatsBackward&))
