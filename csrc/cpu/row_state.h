// The state of a row of logits, mergeable over parts of the vocabulary (mgrpo_kernels/ops/_statistics.py has the algebra).
// For <op>_kernel.cpp files only.
#pragma once

#include "vec.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {

// Logits are seen in blocks that stay in the L1 cache: one pass for the maximum, one for the sums. Sums within a block are float32
// (PAIR chains of 2^7 terms), those over blocks float64.
constexpr int64_t BLOCK = 4096;

// Of logits x with z = x / temperature. Only MAX and SUM are in units of x.
struct RowState {
  float max = -std::numeric_limits<float>::infinity();
  double sum_exp = 0; // sum exp(z - max z); NaN exactly if a NaN or +inf was seen
  double sum_expz = 0; // sum exp(z - max z) (z - max z)
  double sum = 0; // sum x

  void rescale(float new_max, float inv_temperature) {
    if (new_max > max) {
      const double shift = (static_cast<double>(max) - new_max) * inv_temperature, scale = std::exp(shift);
      sum_expz = std::isinf(shift) ? 0 * sum_exp : scale * (sum_expz + shift * sum_exp);
      sum_exp *= scale;
      max = new_max;
    }
  }

  void merge(RowState other, float inv_temperature) {
    rescale(other.max, inv_temperature);
    other.rescale(max, inv_temperature);
    sum_exp += other.sum_exp;
    sum_expz += other.sum_expz;
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

// Adds a block of n <= BLOCK logits.
template <typename T>
inline void add_block(RowState& state, const T* x, int64_t n, float inv_temperature) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const float top = block_max(x, n);
  state.rescale(top, inv_temperature);
  const Vec max(state.max == lowest ? 0.0f : state.max); // a block of -inf alone (or a NaN beside them) must not give inf - inf
  const Vec inv(inv_temperature);
  struct Sums {
    Vec exp{0.0f}, expz{0.0f}, x{0.0f};
    void add(Vec value, Vec max, Vec inv) {
      const Vec shifted = at::vec::clamp_min((value - max) * inv, Vec(EXP_LOWEST));
      const Vec e = exp_nonpositive(shifted);
      exp = exp + e;
      expz = at::vec::fmadd(e, shifted, expz);
      x = x + value;
    }
  } sums[2];
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) {
    const Pair v = load_pair(x + i);
    sums[0].add(v.a, max, inv);
    sums[1].add(v.b, max, inv);
  }
  if (i < n) {
    const Pair v = load_pair(x + i, n - i, lowest);
    const Pair zero_padded = load_pair(x + i, n - i, 0.0f);
    const Vec before_a = sums[0].x, before_b = sums[1].x;
    sums[0].add(v.a, max, inv);
    sums[1].add(v.b, max, inv);
    sums[0].x = before_a + zero_padded.a; // -inf is nothing to the other sums
    sums[1].x = before_b + zero_padded.b;
  }
  state.sum_exp += sum(sums[0].exp + sums[1].exp);
  state.sum_expz += sum(sums[0].expz + sums[1].expz);
  state.sum += sum(sums[0].x + sums[1].x);
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
