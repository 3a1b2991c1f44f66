// Keeps the largest logits of a row while its tiles go by (top_entries.h). For <op>_kernel.cpp files only.
#pragma once

#include <bit>

#include "row_state.h"
// after the inline namespace has been opened
#include "top_entries.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {

// What is kept are all logits above a bound. The bound is that of probabilities which are a tiny share of what lies beside the row's largest.
// Where the room is used up, it rises until a quarter of the kept logits, the smallest, go to the rest.
class TopRow {
 public:
  // `state` is that of the tiles before, in units of z.
  TopRow(const TopEntries& top, int64_t row, const RowState& state)
      : top_(top), row_(row), ids_(top.ids + row * top.room), logits_(top.logits + row * top.room), count_(top.counts[row]),
        bound_(top.rest[3 * top.stride + row]) {
    rest_.max = top.rest[row];
    rest_.sum_exp = top.rest[top.stride + row];
    rest_.sum_expt = top.rest[2 * top.stride + row] * LOG2_E;
    // A float32 sum resolves 1e-7, but the gradient of a row that is sure of its token, and so what may be left out of it, is smaller.
    constexpr double LEAST_BESIDE = 1e-12;
    const double beside = std::max(state.sum_exp - 1, LEAST_BESIDE) * top.smallest;
    if (const double bound = state.max + std::log(beside); bound > bound_) {
      bound_ = static_cast<float>(bound);
    }
  }

  // Adds n <= BLOCK logits x = z / scale to the state as add_block does, and keeps the largest. Without EXPT, the rest has none: NaN.
  template <bool SUM, bool EXPT, typename T>
  void add(RowState& state, const T* x, int64_t column, int64_t n, double scale) {
    Watch<EXPT> watch{*this, column, scale, Vec(bound_in(scale)), Vec(0.0f), Vec(0.0f)};
    add_block<SUM, EXPT>(state, x, n, scale * LOG2_E, watch);
    RowState block;
    block.max = static_cast<float>(state.max * scale);
    block.sum_exp = sum(watch.exp);
    block.sum_expt = EXPT ? sum(watch.expt) : std::numeric_limits<double>::quiet_NaN();
    rest_.merge(block, LOG2_E);
  }

  void set_label(int64_t column, float z) {
    ids_[0] = static_cast<int32_t>(top_.first_column + column);
    logits_[0] = z;
  }

  void store() {
    top_.counts[row_] = static_cast<int32_t>(count_);
    top_.rest[row_] = rest_.max;
    top_.rest[top_.stride + row_] = static_cast<float>(rest_.sum_exp);
    top_.rest[2 * top_.stride + row_] = static_cast<float>(rest_.sum_expt * LOG_2);
    top_.rest[3 * top_.stride + row_] = bound_;
  }

 private:
  // Sums up what is not kept of a block; what is kept goes to the row.
  template <bool EXPT>
  struct Watch {
    TopRow& row;
    int64_t column;
    double scale;
    Vec bound, exp, expt;

    void operator()(int64_t place, Vec x, Vec e, Vec t) {
      const Vec above = x > bound;
      e = Vec::blendv(e, Vec(0.0f), above);
      exp = exp + e;
      if constexpr (EXPT) {
        expt = at::vec::fmadd(e, t, expt);
      }
      unsigned lanes = ~static_cast<unsigned>(above.zero_mask()) & ((1u << WIDTH) - 1);
      if (lanes != 0) {
        float values[WIDTH];
        x.store(values);
        for (; lanes != 0; lanes &= lanes - 1) {
          const int lane = std::countr_zero(lanes);
          row.append(column + place + lane, static_cast<float>(values[lane] * scale));
        }
        bound = Vec(row.bound_in(scale));
      }
    }
  };

  float bound_in(double scale) const {
    return static_cast<float>(bound_ / scale);
  }

  void append(int64_t column, float z) {
    if (count_ == top_.room) {
      make_room();
    }
    ids_[count_] = static_cast<int32_t>(top_.first_column + column);
    logits_[count_++] = z;
  }

  void make_room() {
    keep_above(bound_); // it has risen since the first ones came
    if (count_ > top_.room / 4 * 3) {
      float sorted[MAX_ROOM];
      float *end = std::copy(logits_ + 1, logits_ + count_, sorted), *quarter = sorted + (count_ - 1) / 4;
      std::nth_element(sorted, quarter, end);
      bound_ = *quarter;
      keep_above(bound_);
    }
  }

  void keep_above(float bound) {
    float others[BLOCK];
    int64_t kept = 1, gone = 0;
    for (int64_t i = 1; i < count_; ++i) {
      if (logits_[i] > bound) {
        ids_[kept] = ids_[i];
        logits_[kept++] = logits_[i];
      } else {
        others[gone++] = logits_[i];
        if (gone == BLOCK) {
          add_block<false, true>(rest_, others, gone, LOG2_E);
          gone = 0;
        }
      }
    }
    if (gone > 0) {
      add_block<false, true>(rest_, others, gone, LOG2_E);
    }
    count_ = kept;
  }

  const TopEntries& top_;
  int64_t row_;
  int32_t* ids_;
  float* logits_;
  int64_t count_;
  float bound_;
  RowState rest_;
};

} // namespace CPU_CAPABILITY
} // namespace mgrpo
