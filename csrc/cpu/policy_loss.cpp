// Group advantages and policy losses. The formulas, with their sources, are in mgrpo_kernels/ops/policy_loss/reference.py.

#include "policy_loss.h"

#include "check.h"

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

enum class Scale { Std, Batch, None, Mean };

constexpr float inf = std::numeric_limits<float>::infinity();

int64_t blocks_of(int64_t tokens) {
  return (tokens + POLICY_LOSS_BLOCK - 1) / POLICY_LOSS_BLOCK;
}

// Calls function(index) for each segment of a sequence, in order.
template <typename Function>
void for_parts(const PolicyLossTokens& in, int64_t sequence, Function function) {
  const int64_t begin = in.offsets[sequence], end = in.offsets[sequence + 1];
  for (int64_t block = begin / POLICY_LOSS_BLOCK; block * POLICY_LOSS_BLOCK < end && begin < end; ++block) {
    function(block + sequence);
  }
}

Tensor group_advantages(
    const Tensor& rewards_, const Tensor& offsets_, const std::optional<Tensor>& mask_, int64_t baseline, int64_t scale_, double eps) {
  check_dtype("rewards", rewards_, FLOAT32);
  TORCH_CHECK_VALUE(rewards_.dim() == 1, "rewards: expected shape (B,), got ", rewards_.sizes());
  check_tensor("mask", mask_, BOOLS, rewards_.sizes());
  TORCH_CHECK_VALUE(baseline >= 0 && baseline <= 1, "baseline: expected 0 or 1, got ", baseline);
  TORCH_CHECK_VALUE(scale_ >= 0 && scale_ <= 3, "scale: expected 0, 1, 2 or 3, got ", scale_);
  const Tensor rewards = rewards_.contiguous(), offsets = checked_offsets("groups", offsets_, rewards_.size(0)),
               mask = mask_ ? mask_->contiguous() : Tensor();
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
    const double mean = std::abs(m.sum / static_cast<double>(m.count));
    const double spread = scale == Scale::Std ? m.std() : scale == Scale::Mean ? mean : of_batch;
    const double divisor = scale == Scale::None ? 1 : eps + spread;
    for (int64_t i = starts[group]; i < starts[group + 1]; ++i) {
      if (kept(i)) {
        const double base = leave_one_out ? (m.sum - reward[i]) / static_cast<double>(m.count - 1) : m.sum / static_cast<double>(m.count);
        advantage[i] = static_cast<float>((reward[i] - base) / divisor);
      }
    }
  }
  return out;
}

bool weighs_sequences(const PolicyLossTokens& in) {
  using Behaviour = PolicyLossOptions::Behaviour;
  return in.behaviour && (in.options.behaviour == Behaviour::Sequence || in.options.behaviour == Behaviour::Geometric);
}

float bounded(const PolicyLossOptions& o, float weight) { // NaN stays
  const float floor = weight < o.behaviour_floor ? o.behaviour_floor : weight;
  const bool outside = weight < o.behaviour_floor || weight > o.behaviour_cap;
  return o.truncates ? (floor > o.behaviour_cap ? o.behaviour_cap : floor) : outside ? 0 : weight;
}

// 0 where masked, else 1, or NaN where what has decided is NaN.
float zero_where(bool masked, float decided_by) {
  return masked ? 0 : std::isnan(decided_by) ? decided_by : 1;
}

// What the tokens of each sequence need of it, from the segments that its blocks have left.
std::vector<PolicyLossSequence> sequence_values(const PolicyLossTokens& in) {
  const PolicyLossOptions& o = in.options;
  const bool mean = o.sequence_mean && !in.weights, behaviour = weighs_sequences(in);
  const bool sums = o.by_sequence || o.per_sequence || behaviour || o.masks_sequences;
  std::vector<PolicyLossSequence> values;
  if (!sums && !mean) {
    return values;
  }
  std::vector<PolicyLossSegment> segments;
  if (sums || in.mask || in.rollout_mask) { // else lengths are known
    segments.resize(blocks_of(in.tokens) + in.sequences);
    MGRPO_CALL(policy_loss_segments_kernel)(in, segments.data());
  }
  values.resize(in.sequences);
  at::parallel_for(0, in.sequences, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      PolicyLossSegment total{.tokens = segments.empty() ? static_cast<double>(in.offsets[i + 1] - in.offsets[i]) : 0};
      if (!segments.empty()) {
        for_parts(in, i, [&](int64_t part) {
          total.tokens += segments[part].tokens;
          total.log_ratio += segments[part].log_ratio;
          total.log_behaviour += segments[part].log_behaviour;
          total.divergence += segments[part].divergence;
          total.of_surrogate += segments[part].of_surrogate;
        });
      }
      PolicyLossSequence& value = values[i];
      value.length = static_cast<float>(std::max(total.tokens, 1.0));
      if (o.by_sequence) {
        value.ratio = std::exp(static_cast<float>(total.log_ratio) / value.length);
      }
      const float log_behaviour = static_cast<float>(total.log_behaviour), mean_behaviour = std::exp(log_behaviour / value.length);
      if (behaviour) {
        const bool geometric = o.behaviour == PolicyLossOptions::Behaviour::Geometric;
        value.behaviour_weight = bounded(o, geometric ? mean_behaviour : std::exp(log_behaviour));
      }
      if (o.masks_sequences) {
        const float divergence = static_cast<float>(total.divergence) / value.length;
        value.keep[0] = zero_where(mean_behaviour < o.geometric_floor || mean_behaviour > o.geometric_cap, mean_behaviour);
        value.keep[1] = value.keep[0] * zero_where(divergence > o.off_policy_delta, divergence);
      }
      value.of_surrogate = static_cast<float>(total.of_surrogate);
    }
  });
  return values;
}

// Whether a token of gmpo is not clipped.
bool moves_ratio(const PolicyLossTokens& in, int64_t sequence, int64_t t) {
  const float log_ratio = in.old ? in.logprob[t] - in.old[t] : 0;
  const bool gains = (in.advantage_per_token ? in.advantages[t] : in.advantages[sequence]) > 0;
  return gains ? !(log_ratio > in.options.clip_high) : !(log_ratio < -in.options.clip_low);
}

// The weight is the exponential of a mean over the sequence: every counted token has its part in what goes through it.
void add_through_ratio(
    const PolicyLossTokens& in, const std::vector<PolicyLossSequence>& values, const std::vector<double>& through_ratio, float* gradient) {
  std::vector<float> each(in.sequences);
  for (int64_t i = 0; i < in.sequences; ++i) {
    double total = 0;
    for_parts(in, i, [&](int64_t part) { total += through_ratio[part]; });
    each[i] = in.rollout_mask && !in.rollout_mask[i] ? 0 : static_cast<float>(total / values[i].length);
  }
  at::parallel_for(0, in.tokens, 1 << 15, [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(in.offsets, in.offsets + in.sequences + 1, begin) - in.offsets - 1;
    for (int64_t t = begin; in.options.geometric_mean && t < end; ++i) {
      for (const int64_t until = std::min(end, in.offsets[i + 1]); t < until; ++t) {
        gradient[t] += (!in.mask || in.mask[t]) && moves_ratio(in, i, t) ? each[i] : 0;
      }
    }
    for (int64_t t = begin; !in.options.geometric_mean && t < end; ++i) {
      const float part[2] = {in.mask ? 0 : each[i], each[i]}; // a table, not a branch: masks are hard to predict
      for (const int64_t until = std::min(end, in.offsets[i + 1]); t < until; ++t) {
        gradient[t] += part[in.mask && in.mask[t]];
      }
    }
  });
}

Tensor as_float(const std::optional<Tensor>& x) {
  return x ? x->to(at::kFloat).contiguous() : Tensor();
}
const float* floats_or_null(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

using Names = c10::Dict<std::string, std::string>;
using Numbers = c10::Dict<std::string, double>;
using Flags = c10::Dict<std::string, bool>;

template <typename Value>
Value entry(const c10::Dict<std::string, Value>& given, const char* name) {
  const auto found = given.find(name);
  TORCH_CHECK_VALUE(found != given.end(), "policy_loss: expected an entry ", name, ", got none");
  return found->value();
}

bool is(const Names& names, const char* name, const char* wanted, const char* other) {
  const std::string value = entry(names, name);
  TORCH_CHECK_VALUE(value == wanted || value == other, name, ": expected ", wanted, " or ", other, ", got ", value);
  return value == wanted;
}

// The surrogate and the estimator stay those of the strings that are passed.
PolicyLossOptions options_of(
    const std::string& surrogate, const std::string& kl_estimator, const Names& names, const Numbers& numbers, const Flags& flags) {
  auto number = [&](const char* name) { return static_cast<float>(entry(numbers, name)); };
  const std::string mode = entry(names, "behaviour_mode"), level = mode.substr(0, mode.find('_'));
  const bool truncates = mode == level + "_truncate", none = mode == "none";
  TORCH_CHECK_VALUE(
      none || ((level == "token" || level == "sequence" || level == "geometric") && (truncates || mode == level + "_mask")),
      "behaviour_mode: expected none, or token, sequence or geometric followed by _truncate or _mask, got ", mode);
  using Behaviour = PolicyLossOptions::Behaviour;
  const bool geometric_mean = entry(flags, "geometric_mean");
  const bool by_sequence = is(names, "importance_level", "sequence", "token") || geometric_mean;
  return {
      .surrogate = surrogate.c_str(),
      .per_sequence = entry(flags, "per_sequence"),
      .sequence_mean = is(names, "share", "1 / length of its sequence", "1"),
      .by_sequence = by_sequence,
      .kl_estimator = kl_estimator.c_str(),
      .kl_bias_correction = entry(flags, "kl_bias_correction"),
      .geometric_mean = geometric_mean,
      .masks_sequences = entry(flags, "masks_sequences"),
      .behaviour = none ? Behaviour::None
          : level == "token" ? Behaviour::Token
          : level == "sequence" ? Behaviour::Sequence
                                : Behaviour::Geometric,
      .truncates = truncates,
      .clip_low = number("clip_low"),
      .clip_high = number("clip_high"),
      .clip_delta = number("clip_delta"),
      .kl_coef = number("kl_coef"),
      .entropy_coef = number("entropy_coef"),
      .behaviour_cap = number("behaviour_cap"),
      .behaviour_floor = number("behaviour_floor"),
      .geometric_cap = number("geometric_cap"),
      .geometric_floor = number("geometric_floor"),
      .off_policy_delta = number("off_policy_delta"),
      .cispo_cap = number("cispo_cap"),
      .dppo_cap = number("dppo_cap"),
      .sapo_temperature = {number("sapo_temperature_high"), number("sapo_temperature_low")},
      .vespo_k = {number("vespo_k_high"), number("vespo_k_low")},
      .vespo_lambda = {number("vespo_lambda_high"), number("vespo_lambda_low")},
      .dppo_tv_bounds = {number("dppo_tv_bounds_high"), number("dppo_tv_bounds_low")},
      .dppo_kl_bounds = {number("dppo_kl_bounds_high"), number("dppo_kl_bounds_low")}};
}

// What the sum over these tokens and sequences is divided by.
float own_normalizer(const std::string& counts, float tokens, float sequences, float max_response_tokens) {
  if (counts == "tokens") {
    return tokens;
  }
  if (counts == "sequences x max_response_tokens") {
    return sequences * max_response_tokens;
  }
  TORCH_CHECK_VALUE(
      counts == "sequences", "counts: expected tokens, sequences or sequences x max_response_tokens, got ", counts);
  return sequences;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprob_, const std::optional<Tensor>& old_, const Tensor& advantages_, const std::optional<Tensor>& mask_,
    const Tensor& offsets_, const std::optional<Tensor>& ref_, const std::optional<Tensor>& entropy_,
    const std::optional<Tensor>& behaviour_, const std::optional<Tensor>& normalizer, const std::optional<Tensor>& entropy_normalizer,
    const std::optional<Tensor>& weights_, const std::optional<Tensor>& rollout_mask_, const Names& names, const Numbers& numbers,
    const Flags& flags) {
  check_dtype("logprob", logprob_, FLOATS);
  TORCH_CHECK_VALUE(logprob_.dim() == 1, "logprob: expected shape (T,), got ", logprob_.sizes());
  const Tensor offsets = checked_offsets("cu_seqlens", offsets_, logprob_.size(0));
  const int64_t tokens = logprob_.size(0), sequences = offsets.size(0) - 1;
  check_tensor("advantages", advantages_, FLOATS, {advantages_.numel() == sequences ? sequences : tokens});
  check_tensor("old", old_, FLOATS, {tokens});
  check_tensor("mask", mask_, BOOLS, {tokens});
  check_tensor("ref", ref_, FLOATS, {tokens});
  check_tensor("entropy", entropy_, FLOATS, {tokens});
  check_tensor("behaviour", behaviour_, FLOATS, {tokens});
  check_tensor("weights", weights_, FLOATS, {tokens});
  check_tensor("rollout_mask", rollout_mask_, BOOLS, {sequences});
  check_tensor("normalizer", normalizer, FLOATS, {});
  check_tensor("entropy_normalizer", entropy_normalizer, FLOATS, {});
  const Tensor logprob = as_float(logprob_), old = as_float(old_), advantages = as_float(advantages_), ref = as_float(ref_),
               entropy = as_float(entropy_), behaviour = as_float(behaviour_), weights = as_float(weights_),
               mask = mask_ ? mask_->contiguous() : Tensor(), rollout_mask = rollout_mask_ ? rollout_mask_->contiguous() : Tensor();
  const std::string surrogate = entry(names, "surrogate"), kl_estimator = entry(names, "kl_estimator");
  const PolicyLossOptions options = options_of(surrogate, kl_estimator, names, numbers, flags);
  TORCH_CHECK_VALUE(options.per_sequence || surrogate != "vespo", "per_sequence: expected true with surrogate vespo, got false");
  TORCH_CHECK_VALUE(options.geometric_mean == (surrogate == "gmpo"), "geometric_mean: expected true with surrogate gmpo alone");
  const PolicyLossTokens in{
      .options = options,
      .tokens = tokens,
      .sequences = sequences,
      .offsets = offsets.const_data_ptr<int64_t>(),
      .logprob = logprob.const_data_ptr<float>(),
      .old = floats_or_null(old),
      .ref = floats_or_null(ref),
      .entropy = floats_or_null(entropy),
      .behaviour = floats_or_null(behaviour),
      .weights = floats_or_null(weights),
      .advantages = advantages.const_data_ptr<float>(),
      .advantage_per_token = advantages.numel() != sequences,
      .mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
      .rollout_mask = rollout_mask.defined() ? rollout_mask.const_data_ptr<bool>() : nullptr};

  Tensor gradient = at::empty({tokens}, logprob.options());
  const std::vector<PolicyLossSequence> values = sequence_values(in);
  std::vector<PolicyLossSums> parts(blocks_of(tokens));
  std::vector<double> through_ratio(options.by_sequence ? parts.size() + sequences : 0);
  const bool known = MGRPO_CALL(policy_loss_kernel)(
      in, values.empty() ? nullptr : values.data(), parts.data(), gradient.mutable_data_ptr<float>(), through_ratio.data());
  TORCH_CHECK_VALUE(known, "policy_loss: expected a known surrogate and KL estimator, got ", surrogate, " and ", kl_estimator);
  if (options.by_sequence) {
    add_through_ratio(in, values, through_ratio, gradient.mutable_data_ptr<float>());
  }
  PolicyLossSums sums{};
  for (const PolicyLossSums& part : parts) { // in order: the same bits every time
    sums.tokens += part.tokens;
    sums.loss += part.loss;
    sums.kl += part.kl;
    sums.entropy += part.entropy;
    sums.ratio += part.ratio;
    sums.clip_low += part.clip_low;
    sums.clip_high += part.clip_high;
    sums.masked += part.masked;
    sums.ratio_max = std::isnan(sums.ratio_max) || sums.ratio_max > part.ratio_max ? sums.ratio_max : part.ratio_max;
  }
  const float count = in.rollout_mask ? static_cast<float>(std::count(in.rollout_mask, in.rollout_mask + sequences, true))
                                      : static_cast<float>(sequences);
  auto count_or_one = [](const std::optional<Tensor>& given, float own) {
    const float value = given ? given->item<float>() : own;
    return value == 0 ? 1.0f : value; // nothing was counted, nothing is divided
  };
  const float own = own_normalizer(
      entry(names, "counts"), static_cast<float>(sums.tokens), count, static_cast<float>(entry(numbers, "max_response_tokens")));
  const float scales[2] = {
      1 / count_or_one(normalizer, own), options.entropy_coef / count_or_one(entropy_normalizer, static_cast<float>(sums.tokens))};
  const float metrics[9] = {
      static_cast<float>(sums.tokens), count, static_cast<float>(sums.kl), static_cast<float>(sums.entropy),
      static_cast<float>(sums.ratio), sums.ratio_max, static_cast<float>(sums.clip_low), static_cast<float>(sums.clip_high),
      static_cast<float>(sums.masked)};
  return {
      at::scalar_tensor(sums.loss * scales[0] - sums.entropy * scales[1], logprob.options()), at::tensor(at::ArrayRef<float>(metrics, 9)), gradient,
      at::tensor(at::ArrayRef<float>(scales, 2))};
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("group_advantages", &group_advantages);
  m.impl("policy_loss", &policy_loss);
}

} // namespace
} // namespace mgrpo
