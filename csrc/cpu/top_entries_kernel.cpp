#include <bit>

#include "head_transform.h"
#include "row_gradient.h"
// after the inline namespace has been opened
#include "top_entries.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

// The magnitudes of a row's gradient, added up in classes of nearly equal ones: eight to a factor of 2.
class Magnitudes {
 public:
  void add(float magnitude) {
    sums_[class_of(magnitude)] += magnitude;
  }

  // The first class that cannot be left out beside all lower ones, if what is left out is to stay within `budget`.
  int32_t first_kept(double budget) const {
    int32_t at = 0;
    for (double out = sums_[0]; at + 1 < CLASSES && out <= budget; out += sums_[at]) {
      ++at;
    }
    return at;
  }

  static int32_t class_of(float magnitude) {
    return std::bit_cast<int32_t>(magnitude) >> SHIFT;
  }

 private:
  static constexpr int32_t SHIFT = 20, CLASSES = 1 << (31 - SHIFT);
  float sums_[CLASSES] = {};
};

template <typename Transform>
struct Row {
  const EntryGradient& of;
  const TopEntries& top;
  const int32_t* ids;
  const float* logits;
  int32_t* kept;
  float* gradient;
  int64_t count;
  float alpha, beta, delta, logsumexp;
  Transform transform;
  RowGradient<true, false> grad_z;

  Row(const EntryGradient& of_, int64_t row, int32_t* kept_, float* gradient_, const LinearTile& head)
      : of(of_), top(of_.entries), ids(top.ids + row * top.room), logits(top.logits + row * top.room), kept(kept_ + row * top.room),
        gradient(gradient_ + row * top.room),
        count(top.counts[row]), alpha(coefficient(row, 0)), beta(coefficient(row, 1)), delta(coefficient(row, 3)),
        logsumexp(of_.logsumexp[row]), transform(head, inv_temperature(head, row)),
        grad_z{Vec(alpha), Vec(beta), Vec(0.0f), Vec(logsumexp)} {}

  float coefficient(int64_t row, int64_t which) const {
    return of.coefficients[which * of.rows + row];
  }

  // Bound of the absolute gradient of all logits that are not kept: sum p (|alpha| + |beta log p|) times the steepest slope.
  double rest(int64_t row) const {
    const float* rest = top.rest + row;
    const double sum_exp = rest[top.stride], sum_expz = rest[2 * top.stride];
    if (sum_exp == 0) {
      return 0;
    }
    const double shift = double(rest[0]) - logsumexp, scale = std::exp(shift);
    const double probability = scale * sum_exp, log_part = -scale * (sum_expz + shift * sum_exp);
    const double steepest = std::abs(of.logit_scale * inv_temperature_of(row));
    const double of_log = beta == 0 ? 0 : std::abs(beta) * log_part; // sum_expz is NaN where entropy, whose beta is, was not wanted
    return steepest * (std::abs(alpha) * probability + of_log);
  }

  double inv_temperature_of(int64_t row) const {
    return 1.0 / (of.temperature_per_row ? of.temperature_per_row[row] : of.temperature);
  }

  // Returns whether the tolerance can be kept to.
  bool select(int64_t row) {
    const bool has_label = ids[0] >= 0;
    for (int64_t i = 0; i < count; i += WIDTH) { // `room` is a multiple of WIDTH: what lies beyond count is computed and not used
      const Vec z = Vec::loadu(logits + i);
      (grad_z(z) * transform.slope(z)).store(gradient + i);
    }
    double total = 0;
    if (has_label) {
      const Vec z(logits[0]);
      const bool possible = logits[0] != -std::numeric_limits<float>::infinity();
      gradient[0] = possible ? first_lane((grad_z(z) + Vec(delta)) * transform.slope(z)) : 0.0f;
      total = std::abs(gradient[0]);
    }
    Magnitudes magnitudes;
    for (int64_t i = 1; i < count; ++i) {
      if (ids[i] != ids[0]) {
        const float magnitude = std::abs(gradient[i]);
        magnitudes.add(magnitude);
        total += magnitude;
      }
    }
    const double budget = of.tolerance * total - rest(row);
    if (!(budget >= 0) || std::isinf(budget)) { // a NaN too
      return false;
    }
    const int32_t first_kept = magnitudes.first_kept(budget);
    int64_t number = 0;
    if (has_label) {
      kept[number++] = ids[0];
    }
    for (int64_t i = 1; i < count; ++i) {
      if (ids[i] != ids[0] && Magnitudes::class_of(std::abs(gradient[i])) >= first_kept) {
        kept[number] = ids[i];
        gradient[number++] = gradient[i]; // number <= i
      }
    }
    std::fill(kept + number, kept + top.room, -1);
    return true;
  }
};

template <typename Transform>
void run(const EntryGradient& of, const LinearTile& head, int32_t* kept, float* gradient, bool* outside) {
  at::parallel_for(0, of.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Row<Transform> entries(of, row, kept, gradient, head);
      const bool nothing = entries.alpha == 0 && entries.beta == 0 && entries.delta == 0;
      outside[row] = entries.coefficient(row, 2) != 0 || !(nothing || entries.select(row));
      if (outside[row] || nothing) {
        std::fill(entries.kept, entries.kept + of.entries.room, -1);
      }
    }
  });
}

} // namespace

void entry_gradient_kernel(const EntryGradient& of, int32_t* kept, float* gradient, bool* outside) {
  LinearTile head{};
  head.temperature_per_row = of.temperature_per_row;
  head.temperature = of.temperature;
  head.logit_scale = of.logit_scale;
  head.softcap = of.softcap;
  is_scaled(head) ? run<Scaled>(of, head, kept, gradient, outside) : run<Capped>(of, head, kept, gradient, outside);
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
