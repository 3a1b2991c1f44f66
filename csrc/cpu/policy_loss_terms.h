// The surrogates of the policy loss, a block of tokens at a time. For policy_loss_kernel.cpp only.
#pragma once

#include "vec.h"
// after the inline namespace has been opened
#include "policy_loss.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t BLOCK = POLICY_LOSS_BLOCK;

// The first n <= WIDTH elements; the other lanes are 0.
inline Vec load(const float* p, int64_t n) {
  return n == WIDTH ? Vec::loadu(p) : Vec::loadu(p, n);
}
inline void store(float* p, Vec v, int64_t n) {
  n == WIDTH ? v.store(p) : v.store(p, n);
}

void exponentiate(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += WIDTH) {
    const int64_t some = std::min(WIDTH, n - i);
    store(x + i, exp(load(x + i, some)), some);
  }
}

enum class Kind { Clip, Cispo, Sapo, Vespo, DppoTv, DppoKl, Gmpo };

// The surrogates of n tokens: losses and their two derivatives, by the log-prob directly and by the log importance weight of the token
// or its sequence. Scalar code, whose conditions compilers turn into better masks than at::vec's. NaN passes through every condition, as
// through torch.clamp. Masked tokens get values that nobody uses.
struct Terms {
  float value[BLOCK], by_logprob[BLOCK], by_log_weight[BLOCK];
  int32_t clip_low = 0, clip_high = 0;

  void clipped(const PolicyLossOptions& o, const float* ratios, const float* advantages, const uint32_t* keep, int64_t n) {
    const float low = 1 - o.clip_low, high = 1 + o.clip_high, delta = o.clip_delta;
    int32_t hits_low = 0, hits_high = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float advantage = advantages[i], given = ratios[i];
      const float seen = given > delta ? delta : given;
      hits_low += (seen < low) & (advantage < 0) & (keep[i] != 0);
      hits_high += (seen > high) & (advantage > 0) & (keep[i] != 0);

      const float ratio = (advantage == 0) & (given == given) ? 0.0f : given; // no loss, also where the ratio overflowed
      const float free_ratio = ratio > delta ? delta : ratio, at_least = ratio < low ? low : ratio;
      const float clipped_ratio = at_least > high ? high : at_least;
      const float free = free_ratio * advantage, clipped = clipped_ratio * advantage;
      const float free_slope = (ratio <= delta ? ratio : 0.0f) * advantage;
      const float clipped_slope = ((ratio >= low) & (ratio <= high) ? ratio : 0.0f) * advantage;
      const float tied = (free_slope + clipped_slope) / 2, other = free > clipped ? clipped_slope : tied;
      value[i] = -((free < clipped) | (free != free) ? free : clipped);
      by_logprob[i] = 0;
      by_log_weight[i] = -(free < clipped ? free_slope : other);
    }
    clip_low = hits_low;
    clip_high = hits_high;
  }

  // The weight is held constant.
  void cispo(
      const PolicyLossOptions& o, const float* logprobs, const float* ratios, const float* advantages, const uint32_t* keep, int64_t n) {
    const float cap = o.cispo_cap;
    int32_t hits = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float ratio = ratios[i], advantage = advantages[i];
      hits += (ratio > cap) & (advantage > 0) & (keep[i] != 0);
      by_logprob[i] = -(ratio > cap ? cap : ratio) * advantage;
      value[i] = by_logprob[i] * logprobs[i];
      by_log_weight[i] = 0;
    }
    clip_high = hits;
  }

  // Here too.
  void vespo(const float* logprobs, const float (&weights)[2][BLOCK], const float* advantages, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float advantage = advantages[i];
      by_logprob[i] = -(advantage >= 0 ? weights[0][i] : weights[1][i]) * advantage;
      value[i] = by_logprob[i] * logprobs[i];
      by_log_weight[i] = 0;
    }
  }

  void sapo(const PolicyLossOptions& o, const float* ratios, const float* advantages, int64_t n) {
    const float of_gain = o.sapo_temperature[0], of_others = o.sapo_temperature[1];
    for (int64_t i = 0; i < n; ++i) {
      value[i] = (advantages[i] > 0 ? of_gain : of_others) * (1 - ratios[i]);
    }
    exponentiate(value, n);
    for (int64_t i = 0; i < n; ++i) {
      const float advantage = advantages[i], temperature = advantage > 0 ? of_gain : of_others;
      const float gate = 1 / (1 + value[i]), slope = gate * (1 - gate);
      value[i] = -gate * 4 / temperature * advantage;
      by_logprob[i] = 0;
      by_log_weight[i] = -4 * (slope == 0 ? 0.0f : slope * ratios[i]) * advantage; // 0 x inf
    }
  }

  // The weight is truncated and held constant, and a token has no loss if its probability has moved too far in the direction of its
  // advantage: by the difference of the probabilities, or by the KL divergence of two distributions over this token and all others.
  template <bool KL>
  void dppo(
      const PolicyLossOptions& o, const float* logprobs, const float* olds, const float* ratios, const float* advantages,
      const uint32_t* keep, int64_t n) {
    const float cap = o.dppo_cap, *bounds = KL ? o.dppo_kl_bounds : o.dppo_tv_bounds, rise = bounds[0], fall = bounds[1];
    float before[BLOCK];
    std::copy(logprobs, logprobs + n, value);
    std::copy(olds, olds + n, before);
    exponentiate(value, n);
    exponentiate(before, n);
    int32_t hits_low = 0, hits_high = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float advantage = advantages[i], ratio = ratios[i];
      float p = value[i], q = before[i], divergence_up = p - q, divergence_down = q - p;
      if (KL) {
        p = p > 1 ? 1 : p;
        q = q > 1 ? 1 : q;
        const float of_token = q == 0 ? 0.0f : q * (olds[i] - logprobs[i]); // 0 x inf
        const float divergence = of_token + (1 - q) * std::log((1 - q + 1e-8f) / (1 - p + 1e-8f));
        divergence_up = p > q ? divergence : -std::numeric_limits<float>::infinity();
        divergence_down = p < q ? divergence : -std::numeric_limits<float>::infinity();
      }
      const bool masked = advantage > 0 ? divergence_up > rise : divergence_down > fall;
      hits_low += masked & (advantage < 0) & (keep[i] != 0);
      hits_high += masked & (advantage > 0) & (keep[i] != 0);
      by_logprob[i] = masked ? 0.0f : -(ratio > cap ? cap : ratio) * advantage;
      value[i] = masked ? 0.0f : by_logprob[i] * logprobs[i];
      by_log_weight[i] = 0;
    }
    clip_low = hits_low;
    clip_high = hits_high;
  }

  // The tokens of the ratio have been clipped.
  void gmpo(
      const PolicyLossOptions& o, const float* logprobs, const float* olds, const float* ratios, const float* advantages,
      const uint32_t* keep, int64_t n) {
    int32_t hits_low = 0, hits_high = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float advantage = advantages[i], ratio = ratios[i], log_ratio = logprobs[i] - olds[i];
      hits_low += (log_ratio < -o.clip_low) & (advantage < 0) & (keep[i] != 0);
      hits_high += (log_ratio > o.clip_high) & (advantage > 0) & (keep[i] != 0);
      value[i] = (advantage == 0) & (ratio == ratio) ? 0.0f : -ratio * advantage; // no loss, also where the ratio overflowed
      by_logprob[i] = 0;
      by_log_weight[i] = value[i];
    }
    clip_low = hits_low;
    clip_high = hits_high;
  }
};

} // namespace
} // namespace CPU_CAPABILITY
} // namespace mgrpo
