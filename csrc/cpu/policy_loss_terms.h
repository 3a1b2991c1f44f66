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

// Whether the weight is held constant: the slope is then by the log-prob directly, else by the log importance weight of the token or its
// sequence.
constexpr bool holds_weight(Kind kind) {
  return kind == Kind::Cispo || kind == Kind::Vespo || kind == Kind::DppoTv || kind == Kind::DppoKl;
}

// The surrogates of n tokens: losses and their slopes. Scalar code, whose conditions compilers turn into better masks than at::vec's. NaN
// passes through every condition, as through torch.clamp. Masked tokens get values that nobody uses.
struct Terms {
  float value[BLOCK], slope[BLOCK];
  int32_t clip_low = 0, clip_high = 0;

  // The smaller of two products, of the advantage and the ratio (at most `delta`) or the clipped ratio: one product, of the advantage and a
  // ratio that is clipped to a range for the advantage's sign. An infinite advantage makes the two equal: 0 x inf in either is NaN in both.
  void clipped(const PolicyLossOptions& o, const float* ratios, const float* advantages, const uint32_t* keep, int64_t n) {
    const float low = 1 - o.clip_low, high = 1 + o.clip_high, delta = o.clip_delta;
    const float gain_high = std::min(high, delta), loss_high = std::max(high, delta);
    int32_t hits_low = 0, hits_high = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float advantage = advantages[i], ratio = ratios[i], seen = ratio > delta ? delta : ratio;
      hits_low += (seen < low) & (advantage < 0) & (keep[i] != 0);
      hits_high += (seen > high) & (advantage > 0) & (keep[i] != 0);

      const float at_least = ratio < low ? low : ratio, of_loss = (at_least > loss_high ? loss_high : at_least) * advantage;
      const float of_gain = (ratio > gain_high ? gain_high : ratio) * advantage;
      value[i] = -((advantage < 0) & (of_gain == of_gain) ? of_loss : of_gain);
      const bool free = (advantage < 0 ? (ratio >= low) & (ratio <= loss_high) : ratio <= gain_high);
      const float nothing = 0 * ((ratio >= low) & (ratio <= gain_high) ? 0.0f : advantage); // or NaN
      slope[i] = nothing - (free ? ratio : 0.0f) * advantage;
    }
    clip_low = hits_low;
    clip_high = hits_high;
  }

  void cispo(
      const PolicyLossOptions& o, const float* logprobs, const float* ratios, const float* advantages, const uint32_t* keep, int64_t n) {
    const float cap = o.cispo_cap;
    int32_t hits = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float ratio = ratios[i], advantage = advantages[i];
      hits += (ratio > cap) & (advantage > 0) & (keep[i] != 0);
      slope[i] = -(ratio > cap ? cap : ratio) * advantage;
      value[i] = slope[i] * logprobs[i];
    }
    clip_high = hits;
  }

  void vespo(const float* logprobs, const float (&weights)[2][BLOCK], const float* advantages, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float advantage = advantages[i];
      slope[i] = -(advantage >= 0 ? weights[0][i] : weights[1][i]) * advantage;
      value[i] = slope[i] * logprobs[i];
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
      const float gate = 1 / (1 + value[i]), rise = gate * (1 - gate);
      value[i] = -gate * 4 / temperature * advantage;
      slope[i] = -4 * (rise == 0 ? 0.0f : rise * ratios[i]) * advantage; // 0 x inf
    }
  }

  // The weight is truncated, and a token has no loss if its probability has moved too far in the direction of its
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
      slope[i] = masked ? 0.0f : -(ratio > cap ? cap : ratio) * advantage;
      value[i] = masked ? 0.0f : slope[i] * logprobs[i];
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
      slope[i] = value[i];
    }
    clip_low = hits_low;
    clip_high = hits_high;
  }
};

} // namespace
} // namespace CPU_CAPABILITY
} // namespace mgrpo
