// What generation runs between the products of a decoder: PyTorch takes a dozen operations for them, each of a few microseconds.
#include "vec.h"
// after the inline namespace has been opened
#include "decoder.h"

#include <vector>

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t CHAINS = 4; // independent sums: an addition takes the time of as many
constexpr int64_t WORK = 1 << 15; // products that are worth a thread

// Calls block(first, count, vectors) for columns [begin, end), `vectors` (a constant) at a time; only the last vector may be cut.
template <typename Block>
inline void in_blocks(int64_t begin, int64_t end, Block block) {
  for (; end - begin >= CHAINS * WIDTH; begin += CHAINS * WIDTH) {
    block(begin, WIDTH, std::integral_constant<int64_t, CHAINS>());
  }
  for (; begin < end; begin += WIDTH) {
    block(begin, std::min(WIDTH, end - begin), std::integral_constant<int64_t, 1>());
  }
}

// out[0, end - begin) = scale * x (inner) times columns [begin, end) of matrix (inner, stride)
void scores_of(const float* x, const float* matrix, int64_t stride, int64_t inner, float scale, int64_t begin, int64_t end, float* out) {
  for (int64_t first = begin; first < end; first += WIDTH) {
    const int64_t count = std::min(WIDTH, end - first);
    const auto product = [&](int64_t i, Vec to) {
      const float* from = matrix + i * stride + first;
      return at::vec::fmadd(Vec(x[i]), count == WIDTH ? Vec::loadu(from) : Vec::loadu(from, count), to);
    };
    Vec sums[CHAINS] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    int64_t i = 0;
    for (; i + CHAINS <= inner; i += CHAINS) {
      for (int64_t chain = 0; chain < CHAINS; ++chain) {
        sums[chain] = product(i + chain, sums[chain]);
      }
    }
    for (; i < inner; ++i) {
      sums[0] = product(i, sums[0]);
    }
    (((sums[0] + sums[1]) + (sums[2] + sums[3])) * Vec(scale)).store(out + first - begin, count);
  }
}

// out (columns) = factor * (out + the rows of matrix (rows, columns), each times its weight)
void add_rows(const float* weights, const float* matrix, int64_t rows, int64_t columns, float factor, float* out) {
  in_blocks(0, columns, [&](int64_t first, int64_t count, auto vectors) {
    Vec sums[vectors];
    for (int64_t m = 0; m < vectors; ++m) {
      sums[m] = Vec::loadu(out + first + m * WIDTH, count);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* values = matrix + row * columns + first;
      for (int64_t m = 0; m < vectors; ++m) {
        sums[m] = at::vec::fmadd(Vec(weights[row]), count == WIDTH ? Vec::loadu(values + m * WIDTH) : Vec::loadu(values, count), sums[m]);
      }
    }
    for (int64_t m = 0; m < vectors; ++m) {
      (sums[m] * Vec(factor)).store(out + first + m * WIDTH, count);
    }
  });
}

// Replaces x[0, n) by e^(x - max x); returns the sum. x has room for one more vector. A NaN makes the sum NaN.
float exponentials(float* x, int64_t n) {
  Vec(-std::numeric_limits<float>::infinity()).store(x + n); // the last vector is whole: e^-inf adds next to nothing
  Vec most = Vec::loadu(x), total(0.0f);
  for (int64_t i = WIDTH; i < n; i += WIDTH) {
    most = at::vec::clamp_min(Vec::loadu(x + i), most);
  }
  const Vec shift(maximum(most));
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Vec power = exp_nonpositive(Vec::loadu(x + i) - shift);
    power.store(x + i);
    total = total + power;
  }
  return sum(total);
}

} // namespace

void attend_kernel(const Attention& of, float* keys, float* values, float* out) {
  const int64_t from = std::max<int64_t>(0, of.before + 1 - of.window), own = of.before + 1 - from;
  const int64_t products = std::max<int64_t>(1, of.queries * (of.longest + own) * (of.inner + of.outer));
  at::parallel_for(0, of.prompts * of.heads * of.rollouts, std::max<int64_t>(1, WORK / products), [&](int64_t begin, int64_t end) {
    std::vector<float> scores(of.longest + own + 2 * WIDTH);
    for (int64_t unit = begin; unit < end; ++unit) { // a rollout's head of keys
      const int64_t shared = unit / of.rollouts, head = shared % of.heads, prompt = shared / of.heads;
      const int64_t row = prompt * of.rollouts + unit % of.rollouts;
      const int64_t last = of.lengths[prompt], first = std::max<int64_t>(0, last + of.before + 1 - of.window);
      const int64_t seen = std::max<int64_t>(0, last - first); // of the prompt
      float *own_keys = keys + unit * of.inner * of.room, *own_values = values + unit * of.room * of.outer;
      for (int64_t i = 0; i < of.inner; ++i) {
        own_keys[i * of.room + of.before] = of.k[row * of.k_row + head * of.k_head + i];
      }
      std::copy_n(of.v + row * of.v_row + head * of.v_head, of.outer, own_values + of.before * of.outer);
      for (int64_t query = head * of.queries; query < (head + 1) * of.queries; ++query) {
        const float* q = of.q + row * of.q_row + query * of.q_head;
        float* to = out + (row * of.heads * of.queries + query) * of.outer;
        scores_of(q, of.prompt_keys + shared * of.inner * of.longest, of.longest, of.inner, of.scale, first, first + seen, scores.data());
        scores_of(q, own_keys, of.room, of.inner, of.scale, from, from + own, scores.data() + seen);
        const float total = exponentials(scores.data(), seen + own);
        std::fill_n(to, of.outer, 0.0f);
        add_rows(scores.data(), of.prompt_values + (shared * of.longest + first) * of.outer, seen, of.outer, 1.0f, to);
        add_rows(scores.data() + seen, own_values + from * of.outer, own, of.outer, 1.0f / total, to);
      }
    }
  });
}

void rms_norm_kernel(const float* x, const float* weight, float eps, int64_t rows, int64_t columns, float* out) {
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = x + row * columns;
      float* to = out + row * columns;
      Vec squares[CHAINS] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
      in_blocks(0, columns, [&](int64_t first, int64_t count, auto vectors) {
        for (int64_t m = 0; m < vectors; ++m) {
          const Vec each = Vec::loadu(from + first + m * WIDTH, count); // 0 beyond the row
          squares[m] = at::vec::fmadd(each, each, squares[m]);
        }
      });
      const Vec factor(1.0f / std::sqrt(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(columns) + eps));
      in_blocks(0, columns, [&](int64_t first, int64_t count, auto vectors) {
        for (int64_t m = 0; m < vectors; ++m) {
          const int64_t at = first + m * WIDTH;
          (Vec::loadu(from + at, count) * factor * Vec::loadu(weight + at, count)).store(to + at, count);
        }
      });
    }
  });
}

void rotate_kernel(
    const float* x, int64_t x_row, int64_t x_head, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t half, float* out) {
  at::parallel_for(0, rows * heads, std::max<int64_t>(1, WORK / (4 * half)), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / heads;
      const float* from = x + row * x_row + unit % heads * x_head;
      float* to = out + unit * 2 * half;
      for (int64_t i = 0; i < half; i += WIDTH) {
        const int64_t count = std::min(WIDTH, half - i), first = row * 2 * half + i, second = first + half;
        const Vec a = Vec::loadu(from + i, count), b = Vec::loadu(from + half + i, count);
        (a * Vec::loadu(cos + first, count) + b * Vec::loadu(sin + first, count)).store(to + i, count);
        (b * Vec::loadu(cos + second, count) + a * Vec::loadu(sin + second, count)).store(to + half + i, count);
      }
    }
  });
}

void swiglu_kernel(const float* gate, const float* up, int64_t count, float* out) {
  at::parallel_for(0, count, WORK / 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += WIDTH) {
      const int64_t n = std::min(WIDTH, end - i);
      const Vec x = Vec::loadu(gate + i, n);
      (x / (Vec(1.0f) + exp(x.neg())) * Vec::loadu(up + i, n)).store(out + i, n);
    }
  });
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
