#include "policy_loss_terms.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t GRAIN = 4; // blocks that are worth a thread
constexpr float VESPO_LOWEST = -18.420680743952367f; // log 1e-8

inline Vec select(Vec where, Vec then, Vec otherwise) {
  return Vec::blendv(otherwise, then, where);
}
// NaN passes through both, as through torch.clamp.
inline Vec at_most(Vec x, Vec high) {
  return at::vec::clamp_max(x, high);
}
inline Vec clamp(Vec x, Vec low, Vec high) {
  return at_most(at::vec::clamp_min(x, low), high);
}
inline float maximum_or_nan(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, v);
}

// Not std::string: its functions, compiled here for one instruction set, would be linked for all.
bool is(const char* name, const char* wanted) {
  return std::strcmp(name, wanted) == 0;
}

double total(const float* x, int64_t n) {
  Vec sums(0.0f);
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    sums = sums + Vec::loadu(x + i);
  }
  return sum(sums + load(x + i, n - i));
}

// Calls function(sequence, begin, end) for each segment of [begin, end).
template <typename Function>
void for_segments(const PolicyLossTokens& in, int64_t begin, int64_t end, Function function) {
  int64_t low = 0, high = in.sequences; // the last sequence that starts at or before `begin`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (in.offsets[middle] <= begin ? low : high) = middle;
  }
  for (int64_t i = low; begin < end; ++i) {
    const int64_t until = std::min(end, in.offsets[i + 1]);
    if (begin < until) {
      function(i, begin, until);
      begin = until;
    }
  }
}

// Which tokens of a block count: all bits of a lane, or none.
struct Keep {
  alignas(64) uint32_t lanes[BLOCK];

  void fill(const PolicyLossTokens& in, int64_t begin, int64_t n) {
    if (in.mask) {
      const auto* mask = reinterpret_cast<const uint8_t*>(in.mask + begin); // as bytes: compilers do not vectorise the test of a bool
      for (int64_t i = 0; i < n; ++i) {
        lanes[i] = mask[i] != 0 ? ~uint32_t(0) : 0;
      }
    } else {
      std::fill(lanes, lanes + n, ~uint32_t(0));
    }
    std::fill(lanes + n, lanes + (n + WIDTH - 1) / WIDTH * WIDTH, 0);
    if (in.rollout_mask) {
      for_segments(in, begin, begin + n, [&](int64_t i, int64_t from, int64_t to) {
        if (!in.rollout_mask[i]) {
          std::fill(lanes + (from - begin), lanes + (to - begin), 0);
        }
      });
    }
  }
  Vec operator()(int64_t i) const {
    return Vec::loadu(lanes + i);
  }
};

Vec bounded(Vec weight, const PolicyLossOptions& o) {
  const Vec floor(o.behaviour_floor), cap(o.behaviour_cap);
  return o.truncates ? clamp(weight, floor, cap) : select((weight < floor) | (weight > cap), Vec(0.0f), weight);
}

Vec log_bounded(Vec log_weight, const PolicyLossOptions& o) {
  const Vec weight = exp(log_weight), floor(o.behaviour_floor), cap(o.behaviour_cap);
  return o.truncates ? clamp(log_weight, Vec(std::log(o.behaviour_floor)), Vec(std::log(o.behaviour_cap)))
                     : select((weight < floor) | (weight > cap), Vec(VESPO_LOWEST), log_weight);
}

// The product, where 0 x inf is 0. NaN stays.
Vec weighted(Vec part, Vec weight) {
  const Vec product = part * weight;
  return select((product != product) & (part == part) & (weight == weight), Vec(0.0f), product);
}

// A block's advantages, one for each token.
void fill_advantages(const PolicyLossTokens& in, int64_t begin, int64_t n, float* advantages) {
  if (in.advantage_per_token) {
    std::copy_n(in.advantages + begin, n, advantages);
    return;
  }
  for_segments(in, begin, begin + n, [&](int64_t sequence, int64_t from, int64_t to) {
    std::fill_n(advantages + (from - begin), to - from, in.advantages[sequence]);
  });
}

// Clips gmpo's log ratios on the side where the advantage gains. NaN stays.
void clip_log_ratios(const PolicyLossOptions& o, const float* advantages, float* log_ratios, int64_t n) {
  const float low = -o.clip_low, high = o.clip_high;
  for (int64_t i = 0; i < n; ++i) {
    const float x = log_ratios[i], from_above = x > high ? high : x, from_below = x < low ? low : x;
    log_ratios[i] = advantages[i] > 0 ? from_above : from_below;
  }
}

void block_segments(const PolicyLossTokens& in, int64_t block, PolicyLossSegment* segments) {
  const PolicyLossOptions& o = in.options;
  const int64_t begin = block * BLOCK, n = std::min(BLOCK, in.tokens - begin);
  using Behaviour = PolicyLossOptions::Behaviour;
  const bool vespo = is(o.surrogate, "vespo"), of_tokens = in.behaviour && o.behaviour == Behaviour::Token;
  const bool of_sequences = in.behaviour && (o.behaviour == Behaviour::Sequence || o.behaviour == Behaviour::Geometric);
  const bool behaviour = (in.behaviour && o.masks_sequences) || of_sequences || (vespo && of_tokens);
  const bool log_ratios = o.by_sequence || vespo || o.masks_sequences;
  const Vec zero(0.0f), lowest(VESPO_LOWEST);
  Keep keep;
  keep.fill(in, begin, n);
  float counts[BLOCK], log_ratio[BLOCK], log_behaviour[BLOCK], divergence[BLOCK], log_weight[BLOCK];
  for (int64_t i = 0; i < n; i += WIDTH) {
    const int64_t some = std::min(WIDTH, n - i), t = begin + i;
    const Vec kept = keep(i);
    (kept & Vec(1.0f)).store(counts + i);
    if (!log_ratios && !behaviour) {
      continue;
    }
    const Vec x = load(in.logprob + t, some) & kept, old = in.old ? load(in.old + t, some) & kept : x, ratio = x - old;
    ratio.store(log_ratio + i);
    const Vec sampled = behaviour ? load(in.behaviour + t, some) & kept : old, weight = old - sampled;
    weight.store(log_behaviour + i);
    (sampled - x).store(divergence + i);
    if (vespo) { // there weights are per token, and enter by their logarithm
      const Vec of_behaviour = of_tokens ? clamp(log_bounded(weight, o), lowest, Vec(20.0f)) & kept : zero;
      (clamp(ratio, Vec(-20.0f), Vec(20.0f)) + of_behaviour).store(log_weight + i);
    }
  }
  if (o.geometric_mean) {
    float advantages[BLOCK];
    fill_advantages(in, begin, n, advantages);
    clip_log_ratios(o, advantages, log_ratio, n);
  }
  for_segments(in, begin, begin + n, [&](int64_t sequence, int64_t from, int64_t to) {
    const int64_t i = from - begin, size = to - from;
    segments[block + sequence] = {
        total(counts + i, size), log_ratios ? total(log_ratio + i, size) : 0, behaviour ? total(log_behaviour + i, size) : 0,
        o.masks_sequences ? total(divergence + i, size) : 0, vespo ? total(log_weight + i, size) : 0};
  });
}

enum class Estimator { None, K1, K2, K3 };

Estimator estimator_of(const char* name) {
  return is(name, "k1") ? Estimator::K1 : is(name, "k2") ? Estimator::K2 : is(name, "k3") ? Estimator::K3 : Estimator::None;
}

// Value and slope in the log-prob, from ref - logprob.
std::pair<Vec, Vec> kl_term(Estimator estimator, Vec difference) {
  const Vec zero(0.0f), one(1.0f);
  if (estimator == Estimator::K1) {
    return {zero - difference, one};
  }
  if (estimator == Estimator::K2) {
    return {difference * difference * Vec(0.5f), zero - difference};
  }
  const Vec power = exp(difference);
  return {power - difference - one, one - power};
}

// A block's values that its tokens share with their sequence, one for each token: sequences may be shorter than a vector.
struct Shared {
  float advantage[BLOCK], share[BLOCK], ratio[BLOCK], behaviour_weight[BLOCK], keep[2][BLOCK], vespo_weight[2][BLOCK];
};

// gamma of a sequence, from the sum of its tokens' log weights.
float vespo_weight(const PolicyLossOptions& o, float log_weight, int negative) {
  const float w = log_weight < VESPO_LOWEST ? VESPO_LOWEST : log_weight > 20 ? 20 : log_weight; // NaN stays
  const float scale = std::max(o.vespo_lambda[negative], 1e-4f);
  return std::exp(scale + o.vespo_k[negative] * w - scale * std::exp(w));
}

// ALL: every token counts, and there is no part of a vector.
template <Kind KIND, bool ALL>
void block_loss(
    const PolicyLossTokens& in, const PolicyLossSequence* values, int64_t block, PolicyLossSums* sums, float* gradient,
    double* through_ratio) {
  const PolicyLossOptions& o = in.options;
  const int64_t begin = block * BLOCK, n = std::min(BLOCK, in.tokens - begin);
  using Behaviour = PolicyLossOptions::Behaviour;
  const bool mean = !in.weights && o.sequence_mean;
  const bool behaviour = in.behaviour && o.behaviour != Behaviour::None && KIND != Kind::Vespo;
  const bool behaviour_by_sequence = behaviour && o.behaviour != Behaviour::Token;
  const bool masks = o.masks_sequences || (behaviour && !o.truncates); // truncated weights mask nothing
  Shared shared;
  if (!in.advantage_per_token || values) {
    for_segments(in, begin, begin + n, [&](int64_t sequence, int64_t from, int64_t to) {
      const int64_t i = from - begin, size = to - from;
      if (!in.advantage_per_token) {
        std::fill_n(shared.advantage + i, size, in.advantages[sequence]);
      }
      if (mean) {
        std::fill_n(shared.share + i, size, 1 / values[sequence].length);
      }
      if (o.by_sequence) {
        std::fill_n(shared.ratio + i, size, values[sequence].ratio);
      }
      if (behaviour_by_sequence) {
        std::fill_n(shared.behaviour_weight + i, size, values[sequence].behaviour_weight);
      }
      for (int negative = 0; o.masks_sequences && negative < 2; ++negative) {
        std::fill_n(shared.keep[negative] + i, size, values[sequence].keep[negative]);
      }
      if (KIND == Kind::Vespo) {
        for (int negative = 0; negative < 2; ++negative) {
          std::fill_n(shared.vespo_weight[negative] + i, size, vespo_weight(o, values[sequence].of_surrogate, negative));
        }
      }
    });
  }
  Keep keep;
  keep.fill(in, begin, n);
  const float* advantages = in.advantage_per_token ? in.advantages + begin : shared.advantage;
  const float* shares = in.weights ? in.weights + begin : mean ? shared.share : nullptr;
  float through[BLOCK];

  if (!o.by_sequence) {
    for (int64_t i = 0; i < n; i += WIDTH) {
      const int64_t some = std::min(WIDTH, n - i), t = begin + i;
      const Vec difference = load(in.logprob + t, some) - load((in.old ? in.old : in.logprob) + t, some);
      exp(ALL ? difference : difference & keep(i)).store(shared.ratio + i);
    }
  }
  Terms terms;
  const float *logprobs = in.logprob + begin, *olds = in.old ? in.old + begin : logprobs;
  switch (KIND) {
    case Kind::Clip:
      terms.clipped(o, shared.ratio, advantages, keep.lanes, n);
      break;
    case Kind::Cispo:
      terms.cispo(o, logprobs, shared.ratio, advantages, keep.lanes, n);
      break;
    case Kind::Sapo:
      terms.sapo(o, shared.ratio, advantages, n);
      break;
    case Kind::Vespo:
      terms.vespo(logprobs, shared.vespo_weight, advantages, n);
      break;
    case Kind::DppoTv:
      terms.dppo<false>(o, logprobs, olds, shared.ratio, advantages, keep.lanes, n);
      break;
    case Kind::DppoKl:
      terms.dppo<true>(o, logprobs, olds, shared.ratio, advantages, keep.lanes, n);
      break;
    case Kind::Gmpo:
      terms.gmpo(o, logprobs, olds, shared.ratio, advantages, keep.lanes, n);
  }

  const Vec zero(0.0f), one(1.0f);
  const Estimator estimator = estimator_of(o.kl_estimator);
  Vec tokens = zero, losses = zero, kls = zero, entropies = zero, ratios = zero, ratio_max = zero, masked = zero;
  for (int64_t i = 0; i < n; i += WIDTH) {
    const int64_t some = ALL ? WIDTH : std::min(WIDTH, n - i), t = begin + i;
    const Vec kept = ALL ? zero : keep(i);
    auto clean = [&](Vec v) { return ALL ? v : v & kept; }; // 0 where masked: what stands there goes nowhere
    auto at = [&](const float* x) { return clean(load(x, some)); };
    const Vec logprob = at(in.logprob + t), ratio = at(shared.ratio + i);
    Vec value = at(terms.value + i), slope = at(terms.slope + i), nothing = zero;
    if (behaviour || o.masks_sequences) {
      Vec weight = one;
      if (behaviour) {
        weight = behaviour_by_sequence ? at(shared.behaviour_weight + i)
                                       : bounded(exp((in.old ? at(in.old + t) : logprob) - at(in.behaviour + t)), o);
      }
      if (o.masks_sequences) {
        weight = weight * select(at(advantages + i) < zero, at(shared.keep[1] + i), at(shared.keep[0] + i));
      }
      value = weighted(value, weight);
      slope = weighted(slope, weight);
      nothing = zero * weight; // or NaN
      masked = masks ? masked + clean(select(weight == zero, one, zero)) : masked;
    }
    Vec by_logprob = holds_weight(KIND) ? slope : nothing, by_log_weight = holds_weight(KIND) ? nothing : slope;
    if (in.ref) {
      const Vec coef(o.kl_coef);
      auto [kl, kl_slope] = kl_term(estimator, at(in.ref + t) - logprob);
      if (o.kl_bias_correction) {
        kl = weighted(kl, ratio);
        kl_slope = weighted(kl_slope, ratio);
        by_log_weight = by_log_weight + coef * kl;
      }
      value = value + coef * kl;
      by_logprob = by_logprob + coef * kl_slope;
      kls = kls + clean(kl);
    }
    const Vec share = shares ? at(shares + i) : one;
    if (o.by_sequence) {
      clean(share * by_log_weight).store(through + i);
    } else {
      by_logprob = by_logprob + by_log_weight;
    }
    store(gradient + t, clean(share * by_logprob), some);
    losses = losses + clean(share * value);
    entropies = in.entropy ? entropies + at(in.entropy + t) : entropies;
    ratios = ratios + ratio;
    ratio_max = at::vec::maximum(ratio_max, ratio);
    tokens = ALL ? tokens : tokens + (kept & one);
  }
  sums[block] = {
      ALL ? static_cast<double>(n) : sum(tokens), sum(losses), sum(kls), sum(entropies), sum(ratios),
      static_cast<double>(terms.clip_low), static_cast<double>(terms.clip_high), sum(masked), maximum_or_nan(ratio_max)};
  if (o.by_sequence) {
    for_segments(in, begin, begin + n, [&](int64_t sequence, int64_t from, int64_t to) {
      through_ratio[block + sequence] = total(through + (from - begin), to - from);
    });
  }
}

template <Kind KIND>
void all_blocks(
    const PolicyLossTokens& in, const PolicyLossSequence* values, PolicyLossSums* sums, float* gradient, double* through_ratio) {
  at::parallel_for(0, (in.tokens + BLOCK - 1) / BLOCK, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const bool all = !in.mask && !in.rollout_mask && (block + 1) * BLOCK <= in.tokens;
      all ? block_loss<KIND, true>(in, values, block, sums, gradient, through_ratio)
          : block_loss<KIND, false>(in, values, block, sums, gradient, through_ratio);
    }
  });
}

} // namespace

void policy_loss_segments_kernel(const PolicyLossTokens& in, PolicyLossSegment* segments) {
  at::parallel_for(0, (in.tokens + BLOCK - 1) / BLOCK, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      block_segments(in, block, segments);
    }
  });
}

bool policy_loss_kernel(
    const PolicyLossTokens& in, const PolicyLossSequence* values, PolicyLossSums* sums, float* gradient, double* through_ratio) {
  const char* surrogate = in.options.surrogate;
  decltype(&all_blocks<Kind::Clip>) run = nullptr;
  if (is(surrogate, "clip")) {
    run = all_blocks<Kind::Clip>;
  } else if (is(surrogate, "cispo")) {
    run = all_blocks<Kind::Cispo>;
  } else if (is(surrogate, "sapo")) {
    run = all_blocks<Kind::Sapo>;
  } else if (is(surrogate, "vespo")) {
    run = all_blocks<Kind::Vespo>;
  } else if (is(surrogate, "dppo_tv")) {
    run = all_blocks<Kind::DppoTv>;
  } else if (is(surrogate, "dppo_kl")) {
    run = all_blocks<Kind::DppoKl>;
  } else if (is(surrogate, "gmpo")) {
    run = all_blocks<Kind::Gmpo>;
  }
  if (!run || estimator_of(in.options.kl_estimator) == Estimator::None) {
    return false;
  }
  run(in, values, sums, gradient, through_ratio);
  return true;
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
