#include <optional>

#include "head_transform.h"
#include "row_gradient.h"
#include "row_state.h"
#include "top_row.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

// The column of the row's label, or -1 if it lies elsewhere.
int64_t label_column(const LinearTile& tile, int64_t row) {
  if (!tile.labels) {
    return -1;
  }
  const uint64_t column = uint64_t(tile.labels[row]) - uint64_t(tile.vocab_start); // a label may be anything: wrap, do not overflow
  return column < uint64_t(tile.columns) ? int64_t(column) : -1;
}

template <typename T, typename Transform>
float final_logit(const LinearTile& tile, const Transform& transform, const T* x, int64_t column) {
  return first_lane(transform(load_pair(x + column, 1, 0.0f), static_cast<const T*>(tile.bias), column, 1).a);
}

template <typename T, typename Transform>
RowState row_state(const LinearTile& tile, Wanted wanted, const Transform& transform, const T* x, double inv, TopRow* top) {
  RowState state;
  auto add = [&](const auto* values, int64_t column, int64_t n, double scale) {
    for_flags(wanted.self_certainty, wanted.entropy, [&](auto sum, auto expt) {
      top ? top->add<sum(), expt()>(state, values, column, n, scale)
          : add_block<sum(), expt()>(state, values, n, scale * LOG2_E);
    });
  };
  if constexpr (std::is_same_v<Transform, Scaled>) {
    if (const double factor = tile.logit_scale * inv; factor > 0) { // z in units of x: no copy is needed
      for (int64_t i = 0; i < tile.columns; i += BLOCK) {
        add(x + i, i, std::min(BLOCK, tile.columns - i), factor);
      }
      state.max = static_cast<float>(state.max * factor);
      state.sum *= factor;
      return state;
    }
  }
  float z[BLOCK];
  for (int64_t begin = 0; begin < tile.columns; begin += BLOCK) {
    const int64_t n = std::min(BLOCK, tile.columns - begin);
    int64_t i = 0;
    for (; i + PAIR <= n; i += PAIR) {
      store_pair(z + i, transform(load_pair(x + begin + i), static_cast<const T*>(tile.bias), begin + i, PAIR));
    }
    if (i < n) {
      store_pair(z + i, transform(load_pair(x + begin + i, n - i, 0.0f), static_cast<const T*>(tile.bias), begin + i, n - i), n - i);
    }
    add(z, begin, n, 1.0);
  }
  return state;
}

template <typename T, typename Transform>
void fold(const LinearTile& tile, Wanted wanted, float* state, int64_t stride, const TopEntries* top) {
  at::parallel_for(0, tile.rows, std::max<int64_t>(1, 2 * BLOCK / tile.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(tile.x) + row * tile.columns;
      const double inv = inv_temperature(tile, row);
      const Transform transform(tile, inv);
      float *max = state + row, *sum_exp = max + stride, *sum_expz = sum_exp + stride, *sum = sum_expz + stride,
            *label = sum + stride, *count = label + stride;
      RowState before;
      before.max = *max;
      before.sum_exp = *sum_exp;
      before.sum_expt = wanted.entropy ? *sum_expz * LOG2_E : 0;
      before.sum = wanted.self_certainty ? *sum : 0;
      std::optional<TopRow> top_row;
      if (top) {
        top_row.emplace(*top, row, before);
      }
      RowState merged = row_state(tile, wanted, transform, x, inv, top ? &*top_row : nullptr);
      if (merged.max == -std::numeric_limits<float>::infinity() && !std::isnan(merged.sum_exp)) {
        merged.sum_exp = merged.sum_expt = 0;
      }
      before.merge(merged, LOG2_E);
      *max = before.max;
      *sum_exp = static_cast<float>(before.sum_exp);
      if (wanted.entropy) {
        *sum_expz = static_cast<float>(before.sum_expt * LOG_2);
      }
      if (wanted.self_certainty) {
        *sum = static_cast<float>(before.sum);
      }
      *count += static_cast<float>(tile.columns);
      if (const int64_t column = label_column(tile, row); column >= 0) {
        const float z = final_logit(tile, transform, x, column);
        *label += z;
        if (top) {
          top_row->set_label(column, z);
        }
      }
      if (top) {
        top_row->store();
      }
    }
  });
}

template <bool BETA, bool GAMMA, typename T, typename Out, typename Transform>
void gradient(const LinearTile& tile, const float* coefficients, int64_t stride, const float* logsumexp, Out* out) {
  at::parallel_for(0, tile.rows, std::max<int64_t>(1, 2 * BLOCK / tile.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(tile.x) + row * tile.columns;
      Out* grad = out + row * tile.columns;
      const T* bias = static_cast<const T*>(tile.bias);
      const Transform transform(tile, inv_temperature(tile, row));
      const float* c = coefficients + row;
      const float delta = c[3 * stride];
      const RowGradient<BETA, GAMMA> grad_z{
          Vec(c[0]), Vec(BETA ? c[stride] : 0.0f), Vec(GAMMA ? c[2 * stride] : 0.0f), Vec(logsumexp[row])};
      auto grad_x = [&](Vec z) { return grad_z(z) * transform.slope(z); };

      const int64_t column = label_column(tile, row);
      float at_label = 0;
      if (column >= 0) {
        const Vec z(final_logit(tile, transform, x, column));
        at_label = first_lane((grad_z(z) + Vec(delta)) * transform.slope(z));
        if (first_lane(z) == -std::numeric_limits<float>::infinity()) {
          at_label = 0;
        }
      }
      int64_t i = 0;
      for (; i + PAIR <= tile.columns; i += PAIR) {
        const Pair z = transform(load_pair(x + i), bias, i, PAIR);
        store_pair(grad + i, {grad_x(z.a), grad_x(z.b)});
      }
      if (const int64_t n = tile.columns - i; n > 0) {
        const Pair z = transform(load_pair(x + i, n, 0.0f), bias, i, n);
        store_pair(grad + i, {grad_x(z.a), grad_x(z.b)}, n);
      }
      if (column >= 0) {
        grad[column] = static_cast<Out>(at_label);
      }
    }
  });
}

} // namespace

void tile_state_kernel(const LinearTile& tile, Wanted wanted, float* state, int64_t stride, const TopEntries* top) {
  for_dtype(tile.dtype, [&](auto zero) {
    using T = decltype(zero);
    is_scaled(tile) ? fold<T, Scaled>(tile, wanted, state, stride, top) : fold<T, Capped>(tile, wanted, state, stride, top);
  });
}

void tile_gradient_kernel(
    const LinearTile& tile, Wanted wanted, const float* coefficients, int64_t stride, const float* logsumexp, c10::ScalarType out_dtype,
    void* out) {
  auto run = [&](auto zero, auto out_zero) {
    using T = decltype(zero);
    using Out = decltype(out_zero);
    Out* to = static_cast<Out*>(out);
    for_flags(wanted.entropy, wanted.self_certainty, [&](auto beta, auto gamma) {
      is_scaled(tile) ? gradient<beta(), gamma(), T, Out, Scaled>(tile, coefficients, stride, logsumexp, to)
                      : gradient<beta(), gamma(), T, Out, Capped>(tile, coefficients, stride, logsumexp, to);
    });
  };
  for_dtype(out_dtype, [&](auto zero) { tile.dtype == c10::ScalarType::Float ? run(0.0f, zero) : run(zero, zero); });
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
