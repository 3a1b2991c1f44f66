// What the kernels share: loads and stores that convert, and an exp for softmax. For <op>_kernel.cpp files only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

namespace mgrpo {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;

// Two vectors of float: what one vector of a 16-bit type converts to, and two independent chains of instructions.
struct Pair {
  Vec a, b;
};
constexpr int64_t WIDTH = Vec::size();
constexpr int64_t PAIR = 2 * WIDTH;

inline Pair load_pair(const float* p) {
  return {Vec::loadu(p), Vec::loadu(p + WIDTH)};
}
inline void store_pair(float* p, Pair v) {
  v.a.store(p);
  v.b.store(p + WIDTH);
}

template <typename T>
inline Pair load_pair(const T* p) {
  auto [a, b] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p));
  return {a, b};
}
template <typename T>
inline void store_pair(T* p, Pair v) {
  at::vec::convert_from_float<T>(v.a, v.b).store(p);
}

// The first n < PAIR elements; the other lanes are `rest`.
template <typename T>
inline Pair load_pair(const T* p, int64_t n, float rest) {
  float padded[PAIR];
  for (int64_t i = 0; i < PAIR; ++i) {
    padded[i] = i < n ? static_cast<float>(p[i]) : rest;
  }
  return load_pair(padded);
}
template <typename T>
inline void store_pair(T* p, Pair v, int64_t n) {
  float values[PAIR];
  store_pair(values, v);
  for (int64_t i = 0; i < n; ++i) {
    p[i] = static_cast<T>(values[i]);
  }
}

inline float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, v);
}
inline float maximum(Vec v) { // of numbers: a NaN may be lost
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::clamp_min(y, x); }, v);
}

// exp(x) for x <= 0 (in fact x < 88). NaN stays NaN; below EXP_LOWEST, -inf too, the result is exp(EXP_LOWEST), about 1e-38: next to
// a sum that holds an exp(0) it is nothing. Error below 1.5 ulp near 0, growing by 1 ulp each 40 below it, where softmax has no weight.
constexpr float EXP_LOWEST = -87.0f;

// x = n log 2 + r, |r| <= log(2) / 2; n + 127 is read off the mantissa of x / log 2 + 1.5 2^23 + 127, and is the exponent of 2^n.
inline Vec exp_nonpositive(Vec x) {
  using at::vec::fmadd;
  using Int = at::vec::Vectorized<int32_t>;
  const Vec magic(12582912.0f + 127.0f);
  x = at::vec::clamp_min(x, Vec(EXP_LOWEST)); // NaN passes
  const Vec shifted = fmadd(x, Vec(1.44269504088896341f), magic);
  const Vec r = fmadd(shifted - magic, Vec(-0.693147180559945309f), x);
  Vec p(0.00828929059f);
  p = fmadd(p, r, Vec(0.0418978221f));
  p = fmadd(p, r, Vec(0.166676521f));
  p = fmadd(p, r, Vec(0.499991506f));
  p = fmadd(p, r, Vec(0.999999701f));
  p = fmadd(p, r, Vec(1.0f));
  return p * at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Int(23)); // a product, so that a NaN in p wins
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
