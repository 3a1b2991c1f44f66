#pragma once

#include <type_traits>

#include <c10/core/ScalarType.h>

#include "dispatch.h"

namespace mgrpo {

// Tokens (rows, width) and a weight (vocab, width), both with rows that lie `stride` elements apart, of one dtype; ids (rows, kept): the rows of
// the weight that a token multiplies. An id outside [0, vocab) stands for none.
struct KeptRows {
  c10::ScalarType dtype;
  const void *hidden, *weight;
  int64_t hidden_stride, weight_stride;
  const int32_t* ids;
  int64_t rows, kept, width, vocab;
};

} // namespace mgrpo

// Writes x (rows, kept), each token's products with its rows of the weight: 0 for none.
MGRPO_KERNEL(kept_logits_kernel, void(const mgrpo::KeptRows&, float* x))
// Writes out (rows, width), the sum of each token's rows of the weight times grad (rows, kept). Does not read `hidden`.
MGRPO_KERNEL(kept_hidden_gradient_kernel, void(const mgrpo::KeptRows&, const float* grad, float* out))
// Writes out (vocab, width), of the dtype, and bias (vocab,): for each id the sums of its tokens times grad and of grad. With `add` it adds to
// what is in `out`. `order` lists the places of all ids by id and then by place; those of id v begin at bounds[v], bounds (vocab + 1,). Does not
// read `weight`.
MGRPO_KERNEL(
    kept_weight_gradient_kernel,
    void(
        const mgrpo::KeptRows&, const float* grad, const int64_t* order, const int64_t* bounds, bool add, void* out, float* bias))
