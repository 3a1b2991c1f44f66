#pragma once

#include <cstdint>
#include <type_traits>

#include "dispatch.h"

namespace mgrpo {

// The largest final logits of each row, as far as there is room, and sums over all others.
//
// Place 0 is the label's: id -1 where it is not in this part of the vocabulary. Places 1 .. count - 1 hold others, by ascending id; the label
// may be among them once more.
struct TopEntries {
  int64_t room; // length of a row of ids and logits, at most MAX_ROOM
  int32_t* ids; // (rows, room)
  float* logits; // (rows, room)
  int32_t* counts; // (rows,)
  float* rest; // (4, rows), rows `stride` apart: MAX, SUM_EXP, SUM_EXPZ of the logits that are not kept, and the bound that a kept one exceeds
  int64_t stride;
  int64_t first_column; // id of the tile's column 0
  double smallest; // of the probability beside the row's largest, the share below which an entry is not kept
};
constexpr int64_t MAX_ROOM = 4096, ROOM_STEP = 16; // a multiple of the width of a vector

// What the gradient of kept entries is computed from. Rows lie side by side.
struct EntryGradient {
  TopEntries entries;
  int64_t rows;
  const float* coefficients; // (4, rows): alpha, beta, gamma, delta
  const float* logsumexp; // (rows,)
  const float* temperature_per_row; // (rows,) or null
  double temperature, logit_scale, softcap;
  double tolerance; // share of a row's absolute gradient that may be left out
};

} // namespace mgrpo

// Writes to `kept` and `gradient` (rows, room) the ids of as few entries as keep the rest of the row's absolute gradient below the tolerance (to
// within an eighth of its magnitude), and the gradient of their raw logits; to all other places the id -1. `outside` (rows,): whether a row
// cannot be held to the tolerance with the entries that there are; it keeps none.
MGRPO_KERNEL(entry_gradient_kernel, void(const mgrpo::EntryGradient&, int32_t* kept, float* gradient, bool* outside))
