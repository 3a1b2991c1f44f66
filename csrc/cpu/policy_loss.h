// What policy_loss.cpp asks of its kernels. Enumerations follow the tuples in mgrpo_kernels/ops/policy_loss/specs.py.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dispatch.h"

namespace mgrpo {

enum class LossType { Grpo, Bnpo, Dapo, DrGrpo, Cispo, Sapo, Vespo, Luspo };
enum class BehaviourMode { TokenTruncate, TokenMask, SequenceTruncate, SequenceMask };

struct PolicyLossOptions {
  LossType type;
  bool by_sequence; // the importance weight is of the sequence
  int64_t kl_estimator;
  bool kl_bias_correction;
  BehaviourMode behaviour_mode;
  float clip_low, clip_high, clip_delta, kl_coef, entropy_coef, behaviour_cap, cispo_cap;
  float sapo_temperature[2], vespo_k[2], vespo_lambda[2]; // by the advantage's sign
  float max_response_tokens;

  bool clipped() const {
    return type != LossType::Cispo && type != LossType::Sapo && type != LossType::Vespo;
  }
  bool sequence_mean() const {
    return type == LossType::Grpo || type == LossType::Sapo;
  }
  bool counts_sequences() const {
    return sequence_mean() || type == LossType::Luspo;
  }
  bool truncates() const {
    return behaviour_mode == BehaviourMode::TokenTruncate || behaviour_mode == BehaviourMode::SequenceTruncate;
  }
  bool behaviour_by_sequence() const {
    return behaviour_mode == BehaviourMode::SequenceTruncate || behaviour_mode == BehaviourMode::SequenceMask;
  }
};

// Tokens are taken in blocks of this size, whatever the sequences: the same sums for any number of threads. A segment is what a
// block and a sequence share; results of segments stand at [block + sequence], which no two segments have in common.
constexpr int64_t POLICY_LOSS_BLOCK = 1024;

// What the counted tokens of a segment add up to.
struct PolicyLossSegment {
  double tokens, log_ratio, log_behaviour, vespo_log_weight;
};

// What a counted token needs of its whole sequence.
struct PolicyLossSequence {
  float length; // at least 1
  float ratio; // by_sequence
  float behaviour_weight; // behaviour_by_sequence
  float vespo_weight[2]; // gamma, for advantages >= 0 and the others
};

// What the counted tokens of a block add up to.
struct PolicyLossSums {
  double tokens, loss, kl, entropy, ratio, clip_low, clip_high;
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
// gradient by way of the sequence's ratio. `values` (sequences,) is null if no option needs it.
MGRPO_KERNEL(
    policy_loss_kernel,
    void(const mgrpo::PolicyLossTokens&, const mgrpo::PolicyLossSequence* values, mgrpo::PolicyLossSums* sums, float* gradient,
         double* through_ratio))
