// The gradient of a row of logits, given what the row's statistics ask for (mgrpo_kernels/ops/_statistics.py has the formula).
// For <op>_kernel.cpp files only.
#pragma once

#include "vec.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {

// d z_j = p_j (alpha + beta log p_j) + gamma, 0 where z_j = -inf. The label's own delta comes on top. Without BETA or GAMMA that coefficient is 0.
template <bool BETA, bool GAMMA>
struct RowGradient {
  Vec alpha, beta, gamma, logsumexp;

  Vec operator()(Vec z) const {
    // Below EXP_LOWEST both p and p log p are nothing; at -inf their product must not be NaN.
    const Vec logp = at::vec::clamp_min(z - logsumexp, Vec(EXP_LOWEST)); // NaN passes
    const Vec p = exp_nonpositive(logp);
    Vec of_p = alpha;
    if constexpr (BETA) {
      of_p = at::vec::fmadd(beta, logp, alpha);
    }
    Vec grad = p * of_p;
    if constexpr (GAMMA) {
      grad = at::vec::fmadd(p, of_p, gamma);
    }
    return Vec::blendv(grad, Vec(0.0f), z == Vec(-std::numeric_limits<float>::infinity()));
  }
};

inline float first_lane(Vec v) {
  float lanes[WIDTH];
  v.store(lanes);
  return lanes[0];
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
