// The state of a row of logits, mergeable over parts of the vocabulary (mgrpo_kernels/ops/_statistics.py has the algebra).
// For <op>_kernel.cpp files only.
#pragma once

#include "vec.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {

// Logits are seen in blocks that stay in the L1 cache: one pass for the maximum, one for the sums. Sums within a block are float32
// (PAIR chains of 2^7 terms), those over blocks float64.
constexpr int64_t BLOCK = 2048;

// Of logits x with t = (x - max x) / (temperature log 2): base 2, which saves an instruction in the inner loop.
struct RowState {
  float max = -std::numeric_limits<float>::infinity(); // of x
  double sum_exp = 0; // sum 2^t; NaN exactly if a NaN or +inf was seen
  double sum_expt = 0; // sum 2^t t
  double sum = 0; // of x

  // `factor` is 1 / (temperature log 2), here and below.
  void rescale(float new_max, double factor) {
    if (new_max > max) {
      const double shift = (static_cast<double>(max) - new_max) * factor, scale = std::exp2(shift);
      sum_expt = std::isinf(shift) ? 0 * sum_exp : scale * (sum_expt + shift * sum_exp);
      sum_exp *= scale;
      max = new_max;
    }
  }

  void merge(RowState other, double factor) {
    rescale(other.max, factor);
    other.rescale(max, factor);
    sum_exp += other.sum_exp;
    sum_expt += other.sum_expt;
    sum += other.sum;
  }
};

// The maximum of n numbers (any number if there is a NaN among them).
template <typename T>
inline float block_max(const T* x, int64_t n) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  Pair top{Vec(lowest), Vec(lowest)};
  auto add = [&top](Pair v) {
    top.a = at::vec::clamp_min(v.a, top.a);
    top.b = at::vec::clamp_min(v.b, top.b);
  };
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) {
    add(load_pair(x + i));
  }
  if (i < n) {
    add(load_pair(x + i, n - i, lowest));
  }
  return maximum(at::vec::clamp_min(top.a, top.b));
}

// Adds a block of n <= BLOCK logits. SUM, EXPT: whether anyone wants state.sum, state.sum_expt. `watch` is called with the place of each vector of logits in the
// block, the vector, 2^t and t; beyond n, a logit is -inf.
template <bool SUM, bool EXPT, typename T, typename Watch>
inline void add_block(RowState& state, const T* x, int64_t n, double factor, Watch& watch) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const float top = block_max(x, n);
  state.rescale(top, factor);
  const Vec max(state.max == lowest ? 0.0f : state.max); // a block of -inf alone (or a NaN beside them) must not give inf - inf
  const Vec by(static_cast<float>(factor));
  struct Sums {
    Vec exp{0.0f}, expt{0.0f}, x{0.0f};
    void add(Vec value, Vec max, Vec by, int64_t place, Watch& watch) {
      const Vec t = at::vec::clamp_min((value - max) * by, Vec(EXP2_LOWEST));
      const Vec e = exp2(t);
      exp = exp + e;
      if constexpr (EXPT) {
        expt = at::vec::fmadd(e, t, expt);
      }
      watch(place, value, e, t);
      if constexpr (SUM) {
        x = x + value;
      }
    }
  } sums[2];
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) {
    // The maximum of the next block must not wait for memory: this loop has time to fetch it. (A fetch past the end does nothing.)
    __builtin_prefetch(x + i + BLOCK);
    __builtin_prefetch(x + i + BLOCK + WIDTH);
    const Pair v = load_pair(x + i);
    sums[0].add(v.a, max, by, i, watch);
    sums[1].add(v.b, max, by, i + WIDTH, watch);
  }
  if (i < n) {
    const Pair v = load_pair(x + i, n - i, lowest);
    const Pair zero_padded = load_pair(x + i, n - i, 0.0f);
    const Vec before_a = sums[0].x, before_b = sums[1].x;
    sums[0].add(v.a, max, by, i, watch);
    sums[1].add(v.b, max, by, i + WIDTH, watch);
    sums[0].x = before_a + zero_padded.a; // -inf is nothing to the other sums
    sums[1].x = before_b + zero_padded.b;
  }
  state.sum_exp += sum(sums[0].exp + sums[1].exp);
  if constexpr (EXPT) {
    state.sum_expt += sum(sums[0].expt + sums[1].expt);
  }
  if constexpr (SUM) {
    state.sum += sum(sums[0].x + sums[1].x);
  }
}

template <bool SUM, bool EXPT, typename T>
inline void add_block(RowState& state, const T* x, int64_t n, double factor) {
  auto nothing = [](int64_t, Vec, Vec, Vec) {};
  add_block<SUM, EXPT>(state, x, n, factor, nothing);
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
