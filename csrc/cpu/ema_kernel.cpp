#include "vec.h"
// after the inline namespace has been opened
#include "ema.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

// Elements pass through float32 (or double) buffers of this size, which stay in the L1 cache: one kernel for any mix of dtypes.
constexpr int64_t PIECE = 1024;

template <typename Function>
void for_any_dtype(c10::ScalarType dtype, Function function) {
  dtype == c10::kDouble ? function(double()) : for_dtype(dtype, function);
}

template <typename T, typename C>
void load(const T* from, C* to, int64_t n) {
  int64_t i = 0;
  if constexpr (std::is_same_v<C, float> && !std::is_same_v<T, double>) {
    for (; i + PAIR <= n; i += PAIR) {
      store_pair(to + i, load_pair(from + i));
    }
  }
  for (; i < n; ++i) {
    to[i] = static_cast<C>(from[i]);
  }
}

template <typename T, typename C>
void save(const C* from, T* to, int64_t n) {
  int64_t i = 0;
  if constexpr (std::is_same_v<C, float> && !std::is_same_v<T, double>) {
    for (; i + PAIR <= n; i += PAIR) {
      store_pair(to + i, load_pair(from + i));
    }
  }
  for (; i < n; ++i) {
    if constexpr (std::is_same_v<C, double> && !std::is_same_v<T, double>) {
      to[i] = static_cast<T>(static_cast<float>(from[i]));
    } else {
      to[i] = static_cast<T>(from[i]);
    }
  }
}

template <typename C>
void average(C* ema, const C* param, int64_t n, double decay) {
  const C keep = static_cast<C>(decay), weight = static_cast<C>(1.0 - decay);
  const bool near = weight < C(0.5);
  for (int64_t i = 0; i < n; ++i) {
    const C step = param[i] - ema[i];
    const C updated = near ? ema[i] + weight * step : param[i] - keep * step;
    ema[i] = ema[i] == param[i] ? ema[i] : updated;
  }
}

inline uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  return h ^ (h >> 16);
}

// Rounds float32 values to what bfloat16 (or float16) can hold. See round_stochastically in mgrpo_kernels/ops/ema/specs.py.
template <bool HALF>
void round_run(float* values, int64_t n, uint64_t first, const uint32_t (&key)[2]) {
  constexpr uint32_t low = HALF ? 0x1FFF : 0xFFFF;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t index = first + i;
    const uint32_t bits = mix(mix(static_cast<uint32_t>(index) ^ key[0]) ^ key[1] ^ static_cast<uint32_t>(index >> 32)) & low;
    const float value = values[i];
    uint32_t raw;
    std::memcpy(&raw, &value, 4);
    const bool finite = (raw & 0x7F800000u) != 0x7F800000u;
    raw = (raw + bits) & ~low;
    float rounded;
    std::memcpy(&rounded, &raw, 4);
    if constexpr (HALF) {
      const float magnitude = std::fabs(value);
      const float units = std::floor(magnitude * 0x1p24f + static_cast<float>(bits) * 0x1p-13f);
      rounded = magnitude < 0x1p-14f ? std::copysign(units * 0x1p-24f, value) : rounded;
    }
    values[i] = finite ? rounded : value;
  }
}

void round_piece(float* values, int64_t begin, int64_t n, const EmaTensor& tensor) {
  for (int64_t i = 0; i < n;) { // run by run of elements that are neighbours in the whole tensor
    const int64_t outer = (begin + i) / tensor.inner, at = (begin + i) % tensor.inner;
    const int64_t run = std::min(n - i, tensor.inner - at);
    const uint64_t first = uint64_t(tensor.base) + uint64_t(outer) * uint64_t(tensor.stride) + uint64_t(at);
    tensor.ema_dtype == c10::kHalf ? round_run<true>(values + i, run, first, tensor.key)
                                   : round_run<false>(values + i, run, first, tensor.key);
    i += run;
  }
}

template <typename C>
void update(const EmaChunk& chunk, double decay) {
  const EmaTensor& tensor = *chunk.tensor;
  const bool sixteen_bit = tensor.ema_dtype == c10::kBFloat16 || tensor.ema_dtype == c10::kHalf;
  C ema[PIECE], param[PIECE];
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += PIECE) {
    const int64_t n = std::min(PIECE, chunk.end - begin);
    for_any_dtype(tensor.ema_dtype, [&](auto zero) { load(static_cast<const decltype(zero)*>(tensor.ema) + begin, ema, n); });
    for_any_dtype(tensor.param_dtype, [&](auto zero) { load(static_cast<const decltype(zero)*>(tensor.param) + begin, param, n); });
    average(ema, param, n, decay);
    if constexpr (std::is_same_v<C, float>) {
      if (tensor.stochastic && sixteen_bit) {
        round_piece(ema, begin, n, tensor);
      }
    }
    for_any_dtype(tensor.ema_dtype, [&](auto zero) {
      auto* to = static_cast<decltype(zero)*>(tensor.ema) + begin;
      save(ema, to, n);
      if (tensor.emit && sixteen_bit) {
        load(to, ema, n); // what was kept, not what was computed
      }
    });
    if (tensor.emit) {
      for_any_dtype(tensor.emit_dtype, [&](auto zero) { save(ema, static_cast<decltype(zero)*>(tensor.emit) + begin, n); });
    }
  }
}

} // namespace

void ema_kernel(const EmaChunk* chunks, int64_t count, double decay) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      chunks[i].tensor->ema_dtype == c10::kDouble ? update<double>(chunks[i], decay) : update<float>(chunks[i], decay);
    }
  });
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
