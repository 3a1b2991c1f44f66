// How a head turns raw logits x into final ones z, and the slope dz/dx. For <op>_kernel.cpp files only.
#pragma once

#include "vec.h"
// after the inline namespace has been opened
#include "linear_tile.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {

// Heads without bias and softcap: z = factor x.
struct Scaled {
  Vec factor;

  Scaled(const LinearTile& tile, double inv_temperature) : factor(static_cast<float>(tile.logit_scale * inv_temperature)) {}

  template <typename T>
  Pair operator()(Pair x, const T*, int64_t, int64_t) const {
    return {x.a * factor, x.b * factor};
  }
  Vec slope(Vec) const {
    return factor;
  }
};

// All others. The chain's slope dz/dx is recovered from z: 1 - tanh^2.
struct Capped {
  Vec scale, cap, inv_cap, inv_temperature, temperature, slope_scale;
  bool capped;

  Capped(const LinearTile& tile, double inv_temperature_)
      : scale(static_cast<float>(tile.logit_scale)),
        cap(static_cast<float>(tile.softcap)),
        inv_cap(static_cast<float>(tile.softcap > 0 ? 1.0 / tile.softcap : 0.0)),
        inv_temperature(static_cast<float>(inv_temperature_)),
        temperature(static_cast<float>(1.0 / inv_temperature_)),
        slope_scale(static_cast<float>(tile.logit_scale * inv_temperature_)),
        capped(tile.softcap > 0) {}

  Vec z(Vec x) const {
    Vec y = x * scale;
    if (capped) {
      y = cap * (y * inv_cap).tanh();
    }
    return y * inv_temperature;
  }

  template <typename T>
  Pair operator()(Pair x, const T* bias, int64_t i, int64_t n) const {
    if (bias) {
      const Pair b = n >= PAIR ? load_pair(bias + i) : load_pair(bias + i, n, 0.0f);
      x = {x.a + b.a, x.b + b.b};
    }
    return {z(x.a), z(x.b)};
  }
  Vec slope(Vec z) const {
    if (!capped) {
      return slope_scale;
    }
    const Vec tanh = z * temperature * inv_cap;
    return slope_scale * (Vec(1.0f) - tanh * tanh);
  }
};

inline bool is_scaled(const LinearTile& tile) {
  return !tile.bias && !(tile.softcap > 0);
}

inline double inv_temperature(const LinearTile& tile, int64_t row) {
  return 1.0 / (tile.temperature_per_row ? tile.temperature_per_row[row] : tile.temperature);
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
