// What the kernels share: loads and stores that convert, and an exp for softmax. For <op>_kernel.cpp files only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

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

// Calls function(T()) with the element type that a dtype stands for.
template <typename Function>
inline void for_dtype(c10::ScalarType dtype, Function function) {
  switch (dtype) {
    case c10::kFloat:
      return function(float());
    case c10::kBFloat16:
      return function(c10::BFloat16());
    case c10::kHalf:
      return function(c10::Half());
    default:
      TORCH_INTERNAL_ASSERT(false, "dtype ", dtype);
  }
}

// Calls function with two flags as types, for what is decided when a kernel is compiled: function(std::true_type(), std::false_type()).
template <typename Function>
inline void for_flags(bool a, bool b, Function function) {
  if (a) {
    b ? function(std::true_type(), std::true_type()) : function(std::true_type(), std::false_type());
  } else {
    b ? function(std::false_type(), std::true_type()) : function(std::false_type(), std::false_type());
  }
}

inline float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, v);
}
inline float maximum(Vec v) { // of numbers: a NaN may be lost
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::clamp_min(y, x); }, v);
}

// 2^t for EXP2_LOWEST <= t < 127. NaN stays NaN. Error below 1.5 ulp.
// t = n + f, |f| <= 1/2; n + 127 is read off the mantissa of t + 1.5 2^23 + 127, and is the exponent of 2^n.
constexpr float EXP2_LOWEST = -126.0f;

inline Vec exp2(Vec t) {
  using at::vec::fmadd;
  using Int = at::vec::Vectorized<int32_t>;
  const Vec magic(12582912.0f + 127.0f);
  const Vec shifted = t + magic;
  const Vec f = t - (shifted - magic);
  Vec p(0.00132633746f); // the minimax polynomial of exp, in units of log 2
  p = fmadd(p, f, Vec(0.00967150703f));
  p = fmadd(p, f, Vec(0.0555074491f));
  p = fmadd(p, f, Vec(0.240222427f));
  p = fmadd(p, f, Vec(0.693146974f));
  p = fmadd(p, f, Vec(1.0f));
  return p * at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Int(23)); // a product, so that a NaN in p wins
}

constexpr double LOG2_E = 1.44269504088896340736, LOG_2 = 0.69314718055994530942;

// e^x for x <= 0 (in fact x < 88); below EXP_LOWEST, -inf too, the result is about 1e-38: next to a sum that holds an e^0 it is nothing.
constexpr float EXP_LOWEST = -87.0f;

inline Vec exp_nonpositive(Vec x) {
  return exp2(at::vec::clamp_min(x, Vec(EXP_LOWEST)) * Vec(static_cast<float>(LOG2_E))); // NaN passes
}

// e^x for any x: inf above the largest float, subnormal numbers, 0 below the smallest; NaN stays NaN. Error below 1.1 ulp.
// x = n log 2 + r, |r| <= log 2 / 2. n times the first part of log 2 is exact, with and without an FMA.
inline Vec exp(Vec x) {
  using at::vec::fmadd;
  using Int = at::vec::Vectorized<int32_t>;
  x = at::vec::clamp_max(at::vec::clamp_min(x, Vec(-104.0f)), Vec(89.0f)); // 0 and inf beyond
  const Vec magic(12582912.0f);
  const Vec shifted = fmadd(x, Vec(static_cast<float>(LOG2_E)), magic);
  const Vec n = shifted - magic;
  const Vec r = fmadd(n, Vec(2.12194440e-4f), fmadd(n, Vec(-0.693359375f), x));
  Vec p(0.00138210424f); // e^r = 1 + r + r^2 p, minimax
  p = fmadd(p, r, Vec(0.00836867094f));
  p = fmadd(p, r, Vec(0.0416682623f));
  p = fmadd(p, r, Vec(0.166665211f));
  p = fmadd(p, r, Vec(0.499999940f));
  p = fmadd(p * r, r, r) + Vec(1.0f);
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(p, n);
#else // n is in the mantissa of `shifted`. From -150 to 128, it takes two factors.
  const Int exponent = at::vec::cast<int32_t>(shifted) - at::vec::cast<int32_t>(magic), half = exponent >> Int(1);
  auto power = [](Int e) { return at::vec::cast<float>((e + Int(127)) << Int(23)); };
  return p * power(half) * power(exponent - half);
#endif
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
