// A linear layer for few rows. The weight is the operand that is broadcast, one element at a time, so it is read once and where it lies; a
// library that multiplies vectors of the weight rearranges it first, which takes as long as the product where there are few rows.
#include "vec.h"
// after the inline namespace has been opened
#include "few_rows.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

// Sums that are formed at once: LINES rows of the weight times two vectors of rows of x. They fill the registers: 24 of 32 or 12 of 16.
constexpr int64_t LINES = WIDTH == 16 ? 12 : 6;
constexpr int64_t CACHE_LINE = 64 / sizeof(float);

// Writes the sums of N lines of the weight, which begin `stride` elements apart, with a panel of x (inner, PAIR), of which M vectors hold rows;
// fetches the lines that follow those.
template <int64_t N, int64_t M>
void multiply(const float* weight, int64_t stride, const float* bias, const float* x, int64_t inner, float* out) {
  Vec sums[N][M];
#pragma GCC unroll 16
  for (int64_t line = 0; line < N; ++line) {
    for (int64_t m = 0; m < M; ++m) {
      sums[line][m] = Vec(bias ? bias[line] : 0.0f);
    }
  }
  for (int64_t first = 0; first < inner; first += CACHE_LINE) {
#pragma GCC unroll 16
    for (int64_t line = 0; line < N; ++line) {
      __builtin_prefetch(weight + (N + line) * stride + first);
    }
    for (int64_t i = first; i < std::min(first + CACHE_LINE, inner); ++i) {
      Vec right[M];
      for (int64_t m = 0; m < M; ++m) {
        right[m] = Vec::loadu(x + i * PAIR + m * WIDTH);
      }
#pragma GCC unroll 16
      for (int64_t line = 0; line < N; ++line) {
        const Vec left(weight[line * stride + i]);
        for (int64_t m = 0; m < M; ++m) {
          sums[line][m] = at::vec::fmadd(left, right[m], sums[line][m]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t line = 0; line < N; ++line) {
    for (int64_t m = 0; m < M; ++m) {
      sums[line][m].store(out + line * PAIR + m * WIDTH);
    }
  }
}

template <int64_t N>
void multiply_all(const FewRows& of, const float* packed, float* out) {
  at::parallel_for(0, (of.columns + N - 1) / N, 1, [&](int64_t begin, int64_t end) {
    float sums[16 * PAIR]; // of N lines; the transpose is compiled for up to 16
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = std::min(block * N, of.columns - N), known = block * N - first; // the last block overlaps the one before
      const float* weight = of.weight + first * of.weight_stride;
      const float* bias = of.bias ? of.bias + first : nullptr;
      for (int64_t row = 0; row < of.rows; row += PAIR) {
        const bool two = of.rows - row > WIDTH;
        (two ? multiply<N, 2> : multiply<N, 1>)(weight, of.weight_stride, bias, packed + row * of.inner, of.inner, sums);
        at::vec::transpose_mxn<float>(
            sums + known * PAIR, PAIR, out + row * of.columns + first + known, of.columns, static_cast<int>(N - known),
            static_cast<int>(std::min(PAIR, of.rows - row)));
      }
    }
  });
}

} // namespace

void few_rows_kernel(const FewRows& of, float* packed, float* out) {
  at::parallel_for(0, (of.inner + CACHE_LINE - 1) / CACHE_LINE, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < of.rows; row += PAIR) {
      for (int64_t i = begin * CACHE_LINE; i < std::min(end * CACHE_LINE, of.inner); i += CACHE_LINE) {
        at::vec::transpose_mxn<float>(
            of.x + row * of.x_stride + i, of.x_stride, packed + row * of.inner + i * PAIR, PAIR,
            static_cast<int>(std::min(PAIR, of.rows - row)), static_cast<int>(std::min(CACHE_LINE, of.inner - i)));
      }
    }
  });
  of.columns < LINES ? multiply_all<1>(of, packed, out) : multiply_all<LINES>(of, packed, out);
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
