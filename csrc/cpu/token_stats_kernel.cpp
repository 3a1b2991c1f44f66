#include "row_gradient.h"
#include "row_state.h"
#include "token_stats.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

// A row is always summed as these parts, merged in order: the same bits whether threads share rows or one row.
constexpr int64_t PART = 4 * BLOCK;

template <typename T>
RowState part_state(const T* x, int64_t n, double factor, bool want_sum, bool want_expt) {
  RowState state;
  for_flags(want_sum, want_expt, [&](auto sum, auto expt) {
    for (int64_t i = 0; i < n; i += BLOCK) {
      add_block<sum(), expt()>(state, x + i, std::min(BLOCK, n - i), factor);
    }
  });
  return state;
}

// A sum that is NaN may come of +inf alone, where logsumexp is +inf.
template <typename T>
bool has_nan(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(static_cast<float>(x[i]))) {
      return true;
    }
  }
  return false;
}

template <typename T>
void write_row(const TokenStatsForward& args, int64_t row, const T* x, const RowState& state, double inv_temperature) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  double max = static_cast<double>(state.max), log_sum = std::log(state.sum_exp), entropy;
  if (std::isnan(state.sum_exp)) {
    log_sum = 0;
    max = has_nan(x, args.vocab) ? nan : inf;
    entropy = nan;
  } else if (state.max == -inf) {
    log_sum = 0;
    entropy = nan;
  } else {
    entropy = log_sum - LOG_2 * state.sum_expt / state.sum_exp;
  }
  args.logsumexp[row] = static_cast<float>(max * inv_temperature + log_sum);
  if (args.entropy) {
    args.entropy[row] = static_cast<float>(entropy);
  }
  if (args.self_certainty) {
    args.self_certainty[row] = static_cast<float>((max - state.sum / static_cast<double>(args.vocab)) * inv_temperature + log_sum);
  }
  if (args.logprob) {
    for (int64_t k = row * args.labels_per_row; k < (row + 1) * args.labels_per_row; ++k) {
      const int64_t label = args.labels[k];
      args.logprob[k] = label < 0 || label >= args.vocab
          ? nan
          : static_cast<float>((static_cast<double>(static_cast<float>(x[label])) - max) * inv_temperature - log_sum);
    }
  }
}

void write_masked_row(const TokenStatsForward& args, int64_t row) {
  args.logsumexp[row] = 0;
  if (args.entropy) {
    args.entropy[row] = 0;
  }
  if (args.self_certainty) {
    args.self_certainty[row] = 0;
  }
  if (args.logprob) {
    std::fill_n(args.logprob + row * args.labels_per_row, args.labels_per_row, 0.0f);
  }
}

template <typename T>
void forward(const TokenStatsForward& args) {
  const int64_t parts = (args.vocab + PART - 1) / PART;
  auto row_start = [&](int64_t row) { return static_cast<const T*>(args.logits) + args.offsets[row]; };
  auto inv_temperature = [&](int64_t row) {
    return 1.0 / (args.temperature_per_row ? args.temperature_per_row[row] : args.temperature);
  };
  auto factor = [&](int64_t row) { return inv_temperature(row) * LOG2_E; };
  auto state_of = [&](int64_t row, int64_t part) {
    return part_state(
        row_start(row) + part * PART, std::min(PART, args.vocab - part * PART), factor(row), args.self_certainty != nullptr,
        args.entropy != nullptr);
  };
  auto masked = [&](int64_t row) { return args.mask && !args.mask[row]; };

  if (args.rows >= 4 * at::get_num_threads() || parts == 1) {
    at::parallel_for(0, args.rows, std::max<int64_t>(1, BLOCK / args.vocab), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (masked(row)) {
          write_masked_row(args, row);
          continue;
        }
        RowState state;
        for (int64_t part = 0; part < parts; ++part) {
          state.merge(state_of(row, part), factor(row));
        }
        write_row(args, row, row_start(row), state, inv_temperature(row));
      }
    });
    return;
  }
  auto states = std::make_unique<RowState[]>(args.rows * parts);
  at::parallel_for(0, args.rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!masked(i / parts)) {
        states[i] = state_of(i / parts, i % parts);
      }
    }
  });
  for (int64_t row = 0; row < args.rows; ++row) {
    if (masked(row)) {
      write_masked_row(args, row);
      continue;
    }
    RowState state;
    for (int64_t part = 0; part < parts; ++part) {
      state.merge(states[row * parts + part], factor(row));
    }
    write_row(args, row, row_start(row), state, inv_temperature(row));
  }
}

template <typename T, bool BETA, bool GAMMA>
void backward_row(const TokenStatsBackward& args, int64_t row) {
  const T* x = static_cast<const T*>(args.logits) + args.offsets[row];
  T* out = static_cast<T*>(args.out) + args.out_offsets[row];
  if (args.mask && !args.mask[row]) {
    std::fill_n(out, args.vocab, T(0.0f));
    return;
  }
  const float inv = static_cast<float>(1.0 / (args.temperature_per_row ? args.temperature_per_row[row] : args.temperature));
  const int64_t labels = args.grad_logprob ? args.labels_per_row : 0, first = row * args.labels_per_row;
  double of_labels = 0;
  for (int64_t k = first; k < first + labels; ++k) {
    of_labels += args.grad_logprob[k];
  }
  const float of_entropy = args.grad_entropy ? args.grad_entropy[row] : 0.0f;
  const float of_certainty = args.grad_self_certainty ? args.grad_self_certainty[row] : 0.0f;
  const double alpha = of_certainty - of_labels - (args.grad_entropy ? static_cast<double>(of_entropy) * args.entropy[row] : 0.0);
  const RowGradient<BETA, GAMMA> grad_z{
      Vec(static_cast<float>(alpha)), Vec(-of_entropy), Vec(static_cast<float>(-of_certainty / static_cast<double>(args.vocab))),
      Vec(args.logsumexp[row])};
  const Vec scale(inv);
  auto grad_x = [&](Vec v) { return grad_z(v * scale) * scale; };

  // Where labels stand, their own gradient comes on top: computed before `out` overwrites the logits, in float32, written last.
  float few[16];
  std::unique_ptr<float[]> many;
  float* at_label = labels <= 16 ? few : (many = std::make_unique<float[]>(labels)).get();
  // A label outside of the vocabulary makes the gradient of the nearest entry NaN.
  auto column = [&](int64_t k) { return std::clamp<int64_t>(args.labels[k], 0, args.vocab - 1); };
  for (int64_t k = 0; k < labels; ++k) {
    double delta = 0;
    for (int64_t other = first; other < first + labels; ++other) {
      if (column(other) == column(first + k)) {
        delta += column(other) == args.labels[other] ? args.grad_logprob[other] : std::numeric_limits<float>::quiet_NaN();
      }
    }
    const float z = static_cast<float>(x[column(first + k)]) * inv;
    at_label[k] = z == -std::numeric_limits<float>::infinity()
        ? 0.0f
        : (first_lane(grad_z(Vec(z))) + static_cast<float>(delta)) * inv;
  }
  int64_t i = 0;
  for (; i + PAIR <= args.vocab; i += PAIR) {
    const Pair v = load_pair(x + i);
    store_pair(out + i, {grad_x(v.a), grad_x(v.b)});
  }
  if (const int64_t n = args.vocab - i; n > 0) {
    const Pair v = load_pair(x + i, n, 0.0f);
    store_pair(out + i, {grad_x(v.a), grad_x(v.b)}, n);
  }
  for (int64_t k = 0; k < labels; ++k) {
    out[column(first + k)] = static_cast<T>(at_label[k]);
  }
}

template <typename T>
void backward(const TokenStatsBackward& args) {
  for_flags(args.grad_entropy != nullptr, args.grad_self_certainty != nullptr, [&](auto beta, auto gamma) {
    at::parallel_for(0, args.rows, std::max<int64_t>(1, BLOCK / args.vocab), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        backward_row<T, beta(), gamma()>(args, row);
      }
    });
  });
}

} // namespace

void token_stats_backward_kernel(const TokenStatsBackward& args) {
  for_dtype(args.dtype, [&](auto zero) { backward<decltype(zero)>(args); });
}

void token_stats_forward_kernel(const TokenStatsForward& args) {
  for_dtype(args.dtype, [&](auto zero) { forward<decltype(zero)>(args); });
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
