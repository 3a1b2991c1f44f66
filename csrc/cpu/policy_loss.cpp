// Group advantages and policy losses: one thread a sequence, a few scalar operations a token.
// The formulas, with their sources, are in mgrpo_kernels/ops/policy_loss/reference.py; enumerations follow the tuples in specs.py.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

enum class LossType { Grpo, Bnpo, Dapo, DrGrpo, Cispo, Sapo, Vespo, Luspo };
enum class Behaviour { TokenTruncate, TokenMask, SequenceTruncate, SequenceMask };
enum class Scale { Std, Batch, None };

constexpr float inf = std::numeric_limits<float>::infinity();

// NaN passes through both, as through torch.clamp.
float at_most(float x, float high) {
  return x > high ? high : x;
}
float clamp(float x, float low, float high) {
  return x < low ? low : at_most(x, high);
}

Tensor group_advantages(
    const Tensor& rewards_, const Tensor& offsets_, const std::optional<Tensor>& mask_, int64_t baseline, int64_t scale_, double eps) {
  const Tensor rewards = rewards_.contiguous(), offsets = offsets_.contiguous(), mask = mask_ ? mask_->contiguous() : Tensor();
  TORCH_CHECK(rewards.scalar_type() == at::kFloat);
  Tensor out = at::zeros_like(rewards);
  const float* reward = rewards.const_data_ptr<float>();
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  const bool* keep = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  float* advantage = out.mutable_data_ptr<float>();
  const bool leave_one_out = baseline == 1;
  const auto scale = static_cast<Scale>(scale_);
  auto kept = [&](int64_t i) { return !keep || keep[i]; };
  struct Moments {
    int64_t count = 0;
    double sum = 0, squares = 0;
    float low = inf, high = -inf;
    bool nan = false;
    double std() const {
      return std::sqrt(squares / std::max<int64_t>(count - 1, 1));
    }
  };
  auto moments = [&](int64_t begin, int64_t end) {
    Moments m;
    for (int64_t i = begin; i < end; ++i) {
      if (kept(i)) {
        ++m.count;
        m.sum += reward[i];
        m.low = std::min(m.low, reward[i]);
        m.high = std::max(m.high, reward[i]);
        m.nan |= std::isnan(reward[i]);
      }
    }
    const double mean = m.sum / std::max<int64_t>(m.count, 1);
    for (int64_t i = begin; i < end; ++i) {
      if (kept(i)) {
        m.squares += (reward[i] - mean) * (reward[i] - mean);
      }
    }
    return m;
  };
  const double of_batch = scale == Scale::Batch ? moments(0, rewards.size(0)).std() : 0;
  for (int64_t group = 0; group + 1 < offsets.size(0); ++group) {
    const Moments m = moments(starts[group], starts[group + 1]);
    if (m.count < 2 || (m.low == m.high && !m.nan)) {
      continue; // equal rewards teach nothing
    }
    const double divisor = scale == Scale::None ? 1 : eps + (scale == Scale::Std ? m.std() : of_batch);
    for (int64_t i = starts[group]; i < starts[group + 1]; ++i) {
      if (kept(i)) {
        const double base = leave_one_out ? (m.sum - reward[i]) / static_cast<double>(m.count - 1) : m.sum / static_cast<double>(m.count);
        advantage[i] = static_cast<float>((reward[i] - base) / divisor);
      }
    }
  }
  return out;
}

struct Options {
  LossType type;
  bool by_sequence;
  int64_t kl_estimator;
  bool kl_bias_correction;
  Behaviour behaviour;
  float clip_low, clip_high, clip_delta, kl_coef, entropy_coef, behaviour_cap, cispo_cap;
  float sapo_temperature[2], vespo_k[2], vespo_lambda[2];
  float max_response_tokens;

  bool clipped() const {
    return type != LossType::Cispo && type != LossType::Sapo && type != LossType::Vespo;
  }
  bool sequence_mean() const {
    return type == LossType::Grpo || type == LossType::Sapo;
  }
  bool counts_sequences() const {
    return sequence_mean() || type == LossType::Luspo || type == LossType::DrGrpo;
  }
};

struct Inputs {
  const float *logprob, *old, *advantages, *ref, *entropy, *behaviour, *weights; // null where absent
  const bool *mask, *rollout_mask;
  bool advantage_per_token;
};

// A token's loss and its two derivatives: by its log-prob directly, and by the log importance weight of its token or sequence.
struct Term {
  float value = 0, by_logprob = 0, by_log_weight = 0;
};

struct Sums {
  double loss = 0, kl = 0, entropy = 0, ratio = 0;
  float ratio_max = 0;
  int64_t tokens = 0, clip_low = 0, clip_high = 0;

  void add(const Sums& other) {
    loss += other.loss;
    kl += other.kl;
    entropy += other.entropy;
    ratio += other.ratio;
    ratio_max = std::isnan(ratio_max) || ratio_max > other.ratio_max ? ratio_max : other.ratio_max;
    tokens += other.tokens;
    clip_low += other.clip_low;
    clip_high += other.clip_high;
  }
};

// What is one number for a whole sequence.
struct Sequence {
  float length = 0; // at least 1
  double log_ratio = 0, log_behaviour = 0;
  float vespo_log_weight = 0;
};

Term surrogate(const Options& o, float logprob, float ratio, float advantage, const Sequence& sequence) {
  switch (o.type) {
    case LossType::Cispo: {
      const float factor = -at_most(ratio, o.cispo_cap) * advantage;
      return {factor * logprob, factor, 0};
    }
    case LossType::Vespo: {
      const bool negative = !(advantage >= 0);
      const float scale = std::max(o.vespo_lambda[negative], 1e-4f), w = sequence.vespo_log_weight;
      const float factor = -std::exp(scale + o.vespo_k[negative] * w - scale * std::exp(w)) * advantage;
      return {factor * logprob, factor, 0};
    }
    case LossType::Sapo: {
      const float temperature = o.sapo_temperature[!(advantage > 0)];
      const float gate = 1 / (1 + std::exp(-temperature * (ratio - 1))), slope = gate * (1 - gate);
      return {-gate * 4 / temperature * advantage, 0, slope == 0 ? 0 : -4 * slope * ratio * advantage};
    }
    default: {
      if (advantage == 0 && !std::isnan(ratio)) { // also where the ratio overflowed
        return {};
      }
      const float low = 1 - o.clip_low, high = 1 + o.clip_high;
      const float free = at_most(ratio, o.clip_delta) * advantage, clipped = clamp(ratio, low, high) * advantage;
      const float free_slope = ratio <= o.clip_delta ? ratio * advantage : 0;
      const float clipped_slope = ratio >= low && ratio <= high ? ratio * advantage : 0;
      if (std::isnan(ratio) || std::isnan(advantage)) {
        const float nan = ratio * advantage;
        return {nan, 0, nan};
      }
      const float slope = free < clipped ? free_slope : free > clipped ? clipped_slope : (free_slope + clipped_slope) / 2;
      return {-std::min(free, clipped), 0, -slope};
    }
  }
}

Term kl_term(const Options& o, float difference) {
  switch (o.kl_estimator) {
    case 0:
      return {-difference, 1, 0};
    case 1:
      return {difference * difference / 2, -difference, 0};
    default: {
      const float exp = std::exp(difference);
      return {exp - difference - 1, 1 - exp, 0};
    }
  }
}

Sums sequence_loss(const Inputs& in, const Options& o, int64_t index, int64_t begin, int64_t end, float* gradient) {
  Sums sums;
  auto counted = [&](int64_t t) { return (!in.rollout_mask || in.rollout_mask[index]) && (!in.mask || in.mask[t]); };
  auto old_of = [&](int64_t t) { return in.old ? in.old[t] : in.logprob[t]; };

  auto behaviour_of = [&](float log_weight) {
    const float weight = std::exp(log_weight);
    if (o.behaviour == Behaviour::TokenTruncate || o.behaviour == Behaviour::SequenceTruncate) {
      return at_most(weight, o.behaviour_cap);
    }
    return weight > o.behaviour_cap ? 0.0f : weight;
  };
  const bool behaviour_by_sequence = o.behaviour == Behaviour::SequenceTruncate || o.behaviour == Behaviour::SequenceMask;

  const bool whole_sequences = o.by_sequence || (in.behaviour && behaviour_by_sequence) || o.type == LossType::Vespo;
  Sequence sequence;
  const float lowest = std::log(1e-8f);
  double vespo = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (!counted(t)) {
      continue;
    }
    ++sums.tokens;
    if (!whole_sequences) {
      continue;
    }
    const float log_ratio = in.logprob[t] - old_of(t);
    sequence.log_ratio += log_ratio;
    const float log_behaviour = in.behaviour ? old_of(t) - in.behaviour[t] : 0;
    sequence.log_behaviour += log_behaviour;
    if (o.type == LossType::Vespo) {
      vespo += clamp(log_ratio, -20, 20) + (in.behaviour ? clamp(std::log(behaviour_of(log_behaviour)), lowest, 20) : 0);
    }
  }
  sequence.length = static_cast<float>(std::max<int64_t>(sums.tokens, 1));
  sequence.vespo_log_weight = clamp(static_cast<float>(vespo), lowest, 20);

  double through_ratio = 0;
  for (int64_t t = begin; t < end; ++t) {
    gradient[t] = 0;
    if (!counted(t)) {
      continue;
    }
    const float logprob = in.logprob[t], advantage = in.advantages[in.advantage_per_token ? t : index];
    const float ratio = std::exp(o.by_sequence ? static_cast<float>(sequence.log_ratio) / sequence.length : logprob - old_of(t));
    Term term = surrogate(o, logprob, ratio, advantage, sequence);
    if (in.behaviour && o.type != LossType::Vespo) {
      const float weight = behaviour_of(behaviour_by_sequence ? static_cast<float>(sequence.log_behaviour) : old_of(t) - in.behaviour[t]);
      term = {term.value * weight, term.by_logprob * weight, term.by_log_weight * weight};
    }
    if (in.ref) {
      Term kl = kl_term(o, in.ref[t] - logprob);
      if (o.kl_bias_correction) {
        kl = {kl.value * ratio, kl.by_logprob * ratio, kl.value * ratio};
      }
      sums.kl += kl.value;
      term.value += o.kl_coef * kl.value;
      term.by_logprob += o.kl_coef * kl.by_logprob;
      term.by_log_weight += o.kl_coef * kl.by_log_weight;
    }
    const float share = in.weights ? in.weights[t] : o.sequence_mean() ? 1 / sequence.length : 1;
    sums.loss += static_cast<double>(share) * term.value;
    gradient[t] = share * (o.by_sequence ? term.by_logprob : term.by_logprob + term.by_log_weight);
    through_ratio += static_cast<double>(share) * term.by_log_weight;

    sums.entropy += in.entropy ? in.entropy[t] : 0;
    sums.ratio += ratio;
    sums.ratio_max = ratio > sums.ratio_max || std::isnan(ratio) ? ratio : sums.ratio_max;
    if (o.clipped()) {
      const float seen = at_most(ratio, o.clip_delta);
      sums.clip_low += seen < 1 - o.clip_low && advantage < 0;
      sums.clip_high += seen > 1 + o.clip_high && advantage > 0;
    } else if (o.type == LossType::Cispo) {
      sums.clip_high += ratio > o.cispo_cap && advantage > 0;
    }
  }
  if (o.by_sequence) { // the weight is the exponential of a mean: every token has its part
    const float each = static_cast<float>(through_ratio / sequence.length);
    for (int64_t t = begin; t < end; ++t) {
      gradient[t] += counted(t) ? each : 0;
    }
  }
  return sums;
}

Tensor as_float(const std::optional<Tensor>& x) {
  return x ? x->to(at::kFloat).contiguous() : Tensor();
}
const float* floats_or_null(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprob_, const std::optional<Tensor>& old_, const Tensor& advantages_, const std::optional<Tensor>& mask_,
    const Tensor& offsets_, const std::optional<Tensor>& ref_, const std::optional<Tensor>& entropy_,
    const std::optional<Tensor>& behaviour_, const std::optional<Tensor>& normalizer, const std::optional<Tensor>& entropy_normalizer,
    const std::optional<Tensor>& weights_, const std::optional<Tensor>& rollout_mask_, int64_t loss_type, int64_t importance_level,
    int64_t kl_estimator, bool kl_bias_correction, int64_t behaviour_mode, at::ArrayRef<double> numbers) {
  const Tensor logprob = as_float(logprob_), old = as_float(old_), advantages = as_float(advantages_), ref = as_float(ref_),
               entropy = as_float(entropy_), behaviour = as_float(behaviour_), weights = as_float(weights_),
               mask = mask_ ? mask_->contiguous() : Tensor(), rollout_mask = rollout_mask_ ? rollout_mask_->contiguous() : Tensor(),
               offsets = offsets_.contiguous();
  TORCH_CHECK(numbers.size() == 14 && offsets.scalar_type() == at::kLong);
  auto number = [&](size_t i) { return static_cast<float>(numbers[i]); };
  const Options options{
      .type = static_cast<LossType>(loss_type),
      .by_sequence = importance_level == 1,
      .kl_estimator = kl_estimator,
      .kl_bias_correction = kl_bias_correction,
      .behaviour = static_cast<Behaviour>(behaviour_mode),
      .clip_low = number(0),
      .clip_high = number(1),
      .clip_delta = number(2),
      .kl_coef = number(3),
      .entropy_coef = number(4),
      .behaviour_cap = number(5),
      .cispo_cap = number(6),
      .sapo_temperature = {number(7), number(8)},
      .vespo_k = {number(9), number(10)},
      .vespo_lambda = {number(11), number(12)},
      .max_response_tokens = number(13)};
  const int64_t tokens = logprob.numel(), sequences = offsets.size(0) - 1;
  const Inputs in{
      .logprob = logprob.const_data_ptr<float>(),
      .old = floats_or_null(old),
      .advantages = advantages.const_data_ptr<float>(),
      .ref = floats_or_null(ref),
      .entropy = floats_or_null(entropy),
      .behaviour = floats_or_null(behaviour),
      .weights = floats_or_null(weights),
      .mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
      .rollout_mask = rollout_mask.defined() ? rollout_mask.const_data_ptr<bool>() : nullptr,
      .advantage_per_token = advantages.numel() != sequences};
  TORCH_CHECK(advantages.numel() == sequences || advantages.numel() == tokens);

  Tensor gradient = at::empty({tokens}, logprob.options());
  float* out = gradient.mutable_data_ptr<float>();
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  std::vector<Sums> parts(sequences);
  at::parallel_for(0, sequences, std::max<int64_t>(1, 4096 * sequences / std::max<int64_t>(tokens, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = sequence_loss(in, options, i, starts[i], starts[i + 1], out);
    }
  });
  Sums sums;
  for (const Sums& part : parts) { // in order: the same bits every time
    sums.add(part);
  }
  const float count = in.rollout_mask ? static_cast<float>(std::count(in.rollout_mask, in.rollout_mask + sequences, true))
                                      : static_cast<float>(sequences);
  auto count_or_one = [](const std::optional<Tensor>& given, float own) {
    const float value = given ? given->item<float>() : own;
    return value == 0 ? 1.0f : value; // nothing was counted, nothing is divided
  };
  const float own = options.type == LossType::DrGrpo ? count * options.max_response_tokens
      : options.counts_sequences()                   ? count
                                                     : static_cast<float>(sums.tokens);
  const float scales[2] = {
      1 / count_or_one(normalizer, own), options.entropy_coef / count_or_one(entropy_normalizer, static_cast<float>(sums.tokens))};
  const float metrics[8] = {
      static_cast<float>(sums.tokens), count, static_cast<float>(sums.kl), static_cast<float>(sums.entropy),
      static_cast<float>(sums.ratio), sums.ratio_max, static_cast<float>(sums.clip_low), static_cast<float>(sums.clip_high)};
  return {
      at::scalar_tensor(sums.loss * scales[0] - sums.entropy * scales[1], logprob.options()), at::tensor(at::ArrayRef<float>(metrics, 8)), gradient,
      at::tensor(at::ArrayRef<float>(scales, 2))};
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("group_advantages", &group_advantages);
  m.impl("policy_loss", &policy_loss);
}

} // namespace
} // namespace mgrpo
