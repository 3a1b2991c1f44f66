// What policy_loss.cpp asks of its kernels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dispatch.h"

namespace mgrpo {

// The options, read by their names in mgrpo_kernels/ops/policy_loss/options.py, and the loss type's row of the table in loss_types.py.
struct PolicyLossOptions {
  const char* surrogate; // a name that policy_loss_kernel knows
  bool per_sequence; // the surrogate needs a sum over its sequence
  bool sequence_mean; // a token's share is 1 / length of its sequence
  bool by_sequence; // the importance weight is of the sequence
  const char* kl_estimator;
  bool kl_bias_correction;
  bool geometric_mean; // the ratio is the geometric mean over the sequence of ratios that are clipped one by one; by_sequence is set
  bool masks_sequences; // by geometric_floor and geometric_cap, or by off_policy_delta
  enum class Behaviour { None, Token, Sequence, Geometric } behaviour; // whose the behaviour weight is
  bool truncates; // the behaviour weight
  float clip_low, clip_high, clip_delta, kl_coef, entropy_coef, behaviour_cap, behaviour_floor, geometric_cap, geometric_floor;
  float off_policy_delta, cispo_cap, dppo_cap;
  float sapo_temperature[2], vespo_k[2], vespo_lambda[2], dppo_tv_bounds[2], dppo_kl_bounds[2]; // by the advantage's sign: high, low
};

// Tokens are taken in blocks of this size, whatever the sequences: the same sums for any number of threads. A segment is what a
// block and a sequence share; results of segments stand at [block + sequence], which no two segments have in common.
constexpr int64_t POLICY_LOSS_BLOCK = 1024;

// What the counted tokens of a segment add up to.
struct PolicyLossSegment {
  double tokens, log_ratio, log_behaviour;
  double divergence; // log-prob of the sampler, or the old one, - log-prob
  double of_surrogate; // a sum that the surrogate asked for with per_sequence
};

// What a counted token needs of its whole sequence.
struct PolicyLossSequence {
  float length; // at least 1
  float ratio; // by_sequence
  float behaviour_weight; // of a sequence, or its geometric mean
  float keep[2]; // masks_sequences: 1, 0 or NaN, for advantages >= 0 and < 0
  float of_surrogate; // per_sequence
};

// What the counted tokens of a block add up to.
struct PolicyLossSums {
  double tokens, loss, kl, entropy, ratio, clip_low, clip_high, masked;
  float ratio_max;
};

struct PolicyLossTokens {
  PolicyLossOptions options;
  int64_t tokens, sequences;
  const int64_t* offsets; // (sequences + 1,)
  const float *logprob, *old, *ref, *entropy, *behaviour, *weights; // (tokens,), all but the first null where absent
  const float* advantages; // (tokens,) or (sequences,)
  bool advantage_per_token;
  const bool *mask, *rollout_mask; // (tokens,), (sequences,); null: all count
};

} // namespace mgrpo

// Writes segments (blocks + sequences,), which hold zeros.
MGRPO_KERNEL(policy_loss_segments_kernel, void(const mgrpo::PolicyLossTokens&, mgrpo::PolicyLossSegment* segments))
// Writes sums (blocks,) and gradient (tokens,), and with by_sequence adds to through_ratio (blocks + sequences,) what is to reach the
// gradient by way of the sequence's ratio. `values` (sequences,) is null if no option needs it. Returns whether it knows the surrogate and
// the KL estimator.
MGRPO_KERNEL(
    policy_loss_kernel,
    bool(const mgrpo::PolicyLossTokens&, const mgrpo::PolicyLossSequence* values, mgrpo::PolicyLossSums* sums, float* gradient,
         double* through_ratio))
