#include "vec.h"
// after the inline namespace has been opened
#include "policy_loss.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t BLOCK = POLICY_LOSS_BLOCK;
constexpr int64_t GRAIN = 4; // blocks that are worth a thread
constexpr float VESPO_LOWEST = -18.420680743952367f; // log 1e-8

// The first n <= WIDTH elements; the other lanes are 0.
inline Vec load(const float* p, int64_t n) {
  return n == WIDTH ? Vec::loadu(p) : Vec::loadu(p, n);
}
inline void store(float* p, Vec v, int64_t n) {
  n == WIDTH ? v.store(p) : v.store(p, n);
}
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
    std::fill(lanes, lanes + n, ~uint32_t(0));
    if (in.mask) {
      const bool* mask = in.mask + begin;
      for (int64_t i = 0; i < n; ++i) {
        lanes[i] = mask[i] ? ~uint32_t(0) : 0;
      }
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

Vec capped(Vec weight, const PolicyLossOptions& o) {
  const Vec cap(o.behaviour_cap);
  return o.truncates ? at_most(weight, cap) : select(weight > cap, Vec(0.0f), weight);
}

void block_segments(const PolicyLossTokens& in, int64_t block, PolicyLossSegment* segments) {
  const PolicyLossOptions& o = in.options;
  const int64_t begin = block * BLOCK, n = std::min(BLOCK, in.tokens - begin);
  const bool vespo = is(o.surrogate, "vespo"), behaviour = in.behaviour && (vespo || o.behaviour_by_sequence);
  const bool log_ratios = o.by_sequence || vespo;
  const Vec zero(0.0f), lowest(VESPO_LOWEST), log_cap(std::log(o.behaviour_cap));
  Keep keep;
  keep.fill(in, begin, n);
  float counts[BLOCK], log_ratio[BLOCK], log_behaviour[BLOCK], log_weight[BLOCK];
  for (int64_t i = 0; i < n; i += WIDTH) {
    const int64_t some = std::min(WIDTH, n - i), t = begin + i;
    const Vec kept = keep(i);
    (kept & Vec(1.0f)).store(counts + i);
    if (!log_ratios && !behaviour) {
      continue;
    }
    const Vec x = load(in.logprob + t, some) & kept, old = in.old ? load(in.old + t, some) & kept : x, ratio = x - old;
    ratio.store(log_ratio + i);
    const Vec weight = behaviour ? old - (load(in.behaviour + t, some) & kept) : zero;
    weight.store(log_behaviour + i);
    if (vespo) { // there weights are per token, and enter by their logarithm
      Vec of_behaviour = zero;
      if (behaviour) {
        of_behaviour = o.truncates ? at_most(weight, log_cap) : select(exp(weight) > Vec(o.behaviour_cap), lowest, weight);
        of_behaviour = clamp(of_behaviour, lowest, Vec(20.0f)) & kept;
      }
      (clamp(ratio, Vec(-20.0f), Vec(20.0f)) + of_behaviour).store(log_weight + i);
    }
  }
  for_segments(in, begin, begin + n, [&](int64_t sequence, int64_t from, int64_t to) {
    const int64_t i = from - begin, size = to - from;
    segments[block + sequence] = {
        total(counts + i, size), log_ratios ? total(log_ratio + i, size) : 0, behaviour ? total(log_behaviour + i, size) : 0,
        vespo ? total(log_weight + i, size) : 0};
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

void exponentiate(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += WIDTH) {
    const int64_t some = std::min(WIDTH, n - i);
    store(x + i, exp(load(x + i, some)), some);
  }
}

// A block's values that its tokens share with their sequence, one for each token: sequences may be shorter than a vector.
struct Shared {
  float advantage[BLOCK], share[BLOCK], ratio[BLOCK], behaviour_weight[BLOCK], vespo_weight[2][BLOCK];
};

// gamma of a sequence, from the sum of its tokens' log weights.
float vespo_weight(const PolicyLossOptions& o, float log_weight, int negative) {
  const float w = log_weight < VESPO_LOWEST ? VESPO_LOWEST : log_weight > 20 ? 20 : log_weight; // NaN stays
  const float scale = std::max(o.vespo_lambda[negative], 1e-4f);
  return std::exp(scale + o.vespo_k[negative] * w - scale * std::exp(w));
}

enum class Kind { Clip, Cispo, Sapo, Vespo };

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
};

// ALL: every token counts, and there is no part of a vector.
template <Kind KIND, bool ALL>
void block_loss(
    const PolicyLossTokens& in, const PolicyLossSequence* values, int64_t block, PolicyLossSums* sums, float* gradient,
    double* through_ratio) {
  const PolicyLossOptions& o = in.options;
  const int64_t begin = block * BLOCK, n = std::min(BLOCK, in.tokens - begin);
  const bool mean = !in.weights && o.sequence_mean, behaviour = in.behaviour && KIND != Kind::Vespo;
  const bool behaviour_by_sequence = behaviour && o.behaviour_by_sequence;
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
  switch (KIND) {
    case Kind::Clip:
      terms.clipped(o, shared.ratio, advantages, keep.lanes, n);
      break;
    case Kind::Cispo:
      terms.cispo(o, in.logprob + begin, shared.ratio, advantages, keep.lanes, n);
      break;
    case Kind::Sapo:
      terms.sapo(o, shared.ratio, advantages, n);
      break;
    case Kind::Vespo:
      terms.vespo(in.logprob + begin, shared.vespo_weight, advantages, n);
  }

  const Vec zero(0.0f), one(1.0f);
  const Estimator estimator = estimator_of(o.kl_estimator);
  Vec tokens = zero, losses = zero, kls = zero, entropies = zero, ratios = zero, ratio_max = zero;
  for (int64_t i = 0; i < n; i += WIDTH) {
    const int64_t some = ALL ? WIDTH : std::min(WIDTH, n - i), t = begin + i;
    const Vec kept = ALL ? zero : keep(i);
    auto clean = [&](Vec v) { return ALL ? v : v & kept; }; // 0 where masked: what stands there goes nowhere
    auto at = [&](const float* x) { return clean(load(x, some)); };
    const Vec logprob = at(in.logprob + t), ratio = at(shared.ratio + i);
    Vec value = at(terms.value + i), by_logprob = at(terms.by_logprob + i), by_log_weight = at(terms.by_log_weight + i);
    if (behaviour) {
      const Vec weight = behaviour_by_sequence ? at(shared.behaviour_weight + i)
                                               : capped(exp((in.old ? at(in.old + t) : logprob) - at(in.behaviour + t)), o);
      value = value * weight;
      by_logprob = by_logprob * weight;
      by_log_weight = by_log_weight * weight;
    }
    if (in.ref) {
      const Vec coef(o.kl_coef);
      auto [kl, slope] = kl_term(estimator, at(in.ref + t) - logprob);
      if (o.kl_bias_correction) {
        kl = kl * ratio;
        slope = slope * ratio;
        by_log_weight = by_log_weight + coef * kl;
      }
      value = value + coef * kl;
      by_logprob = by_logprob + coef * slope;
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
      static_cast<double>(terms.clip_low), static_cast<double>(terms.clip_high), maximum_or_nan(ratio_max)};
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
  }
  if (!run || estimator_of(in.options.kl_estimator) == Estimator::None) {
    return false;
  }
  run(in, values, sums, gradient, through_ratio);
  return true;
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
