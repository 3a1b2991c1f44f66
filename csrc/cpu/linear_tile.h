#pragma once

#include <type_traits>

#include <c10/core/ScalarType.h>

#include "dispatch.h"
#include "top_entries.h"

namespace mgrpo {

// A contiguous tile (rows, columns) of raw logits x, and the head between them and final logits z:
// y = logit_scale (x + bias); y = softcap tanh(y / softcap) if softcap > 0; z = y / temperature.
struct LinearTile {
  c10::ScalarType dtype; // of x and bias
  const void* x;
  int64_t rows, columns;
  int64_t vocab_start; // vocabulary entry of column 0
  const void* bias; // (columns,) or null
  const float* temperature_per_row; // (rows,) or null
  double temperature, logit_scale, softcap;
  const int64_t* labels; // (rows,) or null
};

// Which statistics are asked for beside the log-prob; of a gradient, which of them have one.
struct Wanted {
  bool entropy, self_certainty;
};

} // namespace mgrpo

// Folds the tile into state (6, rows), whose rows lie `stride` apart: MAX, SUM_EXP, SUM_EXPZ, SUM, LABEL, COUNT. Sums of statistics that are not
// wanted are neither read nor written. `top` may be null.
MGRPO_KERNEL(tile_state_kernel, void(const mgrpo::LinearTile&, mgrpo::Wanted, float* state, int64_t stride, const mgrpo::TopEntries* top))
// Writes the gradient of x to `out` (rows, columns), which may be x: of coefficients (4, rows), rows `stride` apart: alpha, beta, gamma,
// delta, of which beta and gamma are read where entropy and self-certainty are wanted. A float32 tile may have a gradient of another dtype.
MGRPO_KERNEL(
    tile_gradient_kernel,
    void(
        const mgrpo::LinearTile&, mgrpo::Wanted, const float* coefficients, int64_t stride, const float* logsumexp, c10::ScalarType out_dtype,
        void* out))
