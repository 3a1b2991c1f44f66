// Matrix products with a float32 result, by oneDNN, one block at a time, through at::native::cpublas.
// - Of 16-bit factors, summed in float32 until they are added to the result. aten's own rounds every product to 16 bits, and the sum of many
//   rounded products is not the rounded sum.
// - Of float32 factors on processors with AVX-512 that are not Intel's: aten multiplies those with MKL, which has AVX2 for them.

#include "check.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

// Every block is filled up with zeros to one of these sizes, because oneDNN compiles and keeps a kernel for each size that it meets.
constexpr int64_t ROWS = 64, FEW_ROWS = 16, COLUMNS = 128, INNER = 512, INNER_REST = 64;
constexpr at::ScalarType FACTORS[] = {at::kBFloat16, at::kHalf, at::kFloat};
constexpr int64_t PACKED_BYTES = 8 << 20; // of the second factor, rearranged, at most: or one block of its rows, INNER * columns

// The block product reads the rows of its second factor interleaved: so many elements of a column, 32 bits, lie beside each other.
template <typename T>
constexpr int64_t PAIR = 4 / sizeof(T);

template <typename T>
void multiply_block(int64_t height, int64_t inner, int64_t c_stride, bool add, const T* a, int64_t a_stride, const T* b, float* c) {
  at::native::cpublas::brgemm(height, COLUMNS, inner, a_stride, COLUMNS, c_stride, add, a, b, c);
}

// Whether aten's float32 product leaves this processor's AVX-512 unused.
bool is_left_to_avx2() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  return at::hasMKL() && __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Whether this build of PyTorch, on this CPU, has the block product, and it is worth while. PyTorch raises where it has not.
template <typename T>
bool available() {
  static const bool found = [] {
    if (std::is_same_v<T, float> && !is_left_to_avx2()) {
      return false;
    }
    try {
      const std::vector<T> a(ROWS * INNER_REST, T(1)), b(INNER_REST * COLUMNS, T(1));
      std::vector<float> c(ROWS * COLUMNS);
      multiply_block<T>(ROWS, INNER_REST, COLUMNS, false, a.data(), INNER_REST, b.data(), c.data());
      at::native::cpublas::brgemm_release();
      return std::all_of(c.begin(), c.end(), [](float each) { return each == static_cast<float>(INNER_REST); });
    } catch (const std::exception&) {
      return false;
    }
  }();
  return found;
}

template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  explicit Matrix(const Tensor& x)
      : data(x.const_data_ptr<T>()), rows(x.size(0)), columns(x.size(1)), row_stride(x.stride(0)), column_stride(x.stride(1)) {}
};

// Copies the block at (row, column) to `out` (height, width), with zeros beyond the matrix's end.
template <typename T>
void copy_block(const Matrix<T>& x, int64_t row, int64_t column, int64_t height, int64_t width, T* out) {
  const int64_t rows = std::min(height, x.rows - row), columns = std::min(width, x.columns - column);
  if (rows < height || columns < width) {
    std::fill(out, out + height * width, T(0));
  }
  const T* from = x.data + row * x.row_stride + column * x.column_stride;
  constexpr int64_t STEP = 32; // of a transposed matrix, lines of the cache are used up before they leave it
  for (int64_t r0 = 0; r0 < rows; r0 += STEP) {
    for (int64_t c0 = 0; c0 < columns; c0 += STEP) {
      for (int64_t r = r0; r < std::min(r0 + STEP, rows); ++r) {
        for (int64_t c = c0; c < std::min(c0 + STEP, columns); ++c) {
          out[r * width + c] = from[r * x.row_stride + c * x.column_stride];
        }
      }
    }
  }
}

// How many rows of b are multiplied at once from `row` on: every block is as long as this.
int64_t inner_block(int64_t rows, int64_t row) {
  return rows - row >= INNER ? INNER : INNER_REST;
}

// How many rows of a are multiplied at once, of those from `row` on.
int64_t row_block(int64_t rows, int64_t row) {
  return rows - row <= FEW_ROWS ? FEW_ROWS : rows - row <= 2 * FEW_ROWS ? 2 * FEW_ROWS : ROWS;
}

// Interleaves two rows: the elements of one column lie beside each other.
template <typename T>
void interleave(const T* first, const T* second, int64_t columns, T* to) {
  int64_t c = 0;
#ifdef __SSE2__
  for (; c + 8 <= columns; c += 8) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + c));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second + c));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * c), _mm_unpacklo_epi16(a, b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * c + 8), _mm_unpackhi_epi16(a, b));
  }
#endif
  for (; c < columns; ++c) {
    to[2 * c] = first[c];
    to[2 * c + 1] = second[c];
  }
}

template <typename T>
void pack_rows(const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, T* to) {
  int64_t r = 0;
  if constexpr (PAIR<T> == 1) {
    for (; column_stride == 1 && r < rows; ++r) {
      std::copy_n(from + r * row_stride, columns, to + r * COLUMNS);
    }
  } else {
    for (; column_stride == 1 && r + 2 <= rows; r += 2) {
      interleave(from + r * row_stride, from + (r + 1) * row_stride, columns, to + r * COLUMNS);
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      to[r / PAIR<T> * PAIR<T> * COLUMNS + PAIR<T> * c + r % PAIR<T>] = from[r * row_stride + c * column_stride];
    }
  }
}

// Writes 4 pairs of each of 4 columns, `stride` elements apart, beside each other: a transpose of 4 x 4 pairs.
template <typename T>
void transpose_pairs(const T* from, int64_t stride, T* to) {
#ifdef __SSE2__
  auto load = [&](int64_t column) { return _mm_loadu_ps(reinterpret_cast<const float*>(from + column * stride)); };
  __m128 a = load(0), b = load(1), c = load(2), d = load(3);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  for (const __m128& row : {a, b, c, d}) {
    _mm_storeu_ps(reinterpret_cast<float*>(to), row);
    to += PAIR<T> * COLUMNS;
  }
#else
  for (int64_t pair = 0; pair < 4; ++pair) {
    for (int64_t column = 0; column < 4; ++column) {
      std::memcpy(to + pair * PAIR<T> * COLUMNS + PAIR<T> * column, from + column * stride + PAIR<T> * pair, PAIR<T> * sizeof(T));
    }
  }
#endif
}

// The same where a column is contiguous: the elements of a pair are neighbours already, and move as one.
template <typename T>
void pack_transposed(const T* from, int64_t column_stride, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t STEP = PAIR<T> == 1 ? 64 : 16; // pairs: the cache lines of a step are used up before they leave the cache
  for (int64_t first = 0; first < rows / PAIR<T>; first += STEP) {
    const int64_t last = std::min(first + STEP, rows / PAIR<T>);
    for (int64_t c = 0; c < columns; c += 4) {
      int64_t pair = first;
      for (; c + 4 <= columns && pair + 4 <= last; pair += 4) {
        transpose_pairs(from + c * column_stride + PAIR<T> * pair, column_stride, to + pair * PAIR<T> * COLUMNS + PAIR<T> * c);
      }
      for (; pair < last; ++pair) {
        for (int64_t column = c; column < std::min(c + 4, columns); ++column) {
          std::memcpy(
              to + pair * PAIR<T> * COLUMNS + PAIR<T> * column, from + column * column_stride + PAIR<T> * pair, PAIR<T> * sizeof(T));
        }
      }
    }
  }
  for (int64_t c = 0; rows % PAIR<T> && c < columns; ++c) {
    to[(rows - 1) * COLUMNS + PAIR<T> * c] = from[c * column_stride + rows - 1];
  }
}

// Packs COLUMNS columns of rows [row, row + inner) of b as the block product reads them.
template <typename T>
void pack(const Matrix<T>& b, int64_t row, int64_t inner, int64_t column, T* to) {
  const int64_t columns = std::min(COLUMNS, b.columns - column), rows = std::min(inner, b.rows - row);
  const T* from = b.data + row * b.row_stride + column * b.column_stride;
  if (columns < COLUMNS || rows < inner) {
    std::fill(to, to + inner * COLUMNS, T(0));
  }
  b.row_stride == 1 ? pack_transposed(from, b.column_stride, rows, columns, to)
                    : pack_rows(from, b.row_stride, b.column_stride, rows, columns, to);
}

// Adds c (height, COLUMNS), or what of it lies inside, to `total` at (row, column); or writes it there.
void put_block(const float* c, const Tensor& total, int64_t row, int64_t column, bool add) {
  const int64_t rows = std::min(ROWS, total.size(0) - row), columns = std::min(COLUMNS, total.size(1) - column);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = total.mutable_data_ptr<float>() + (row + r) * total.stride(0) + column;
    for (int64_t i = 0; i < columns; ++i) {
      to[i] = (add ? to[i] : 0.0f) + c[r * COLUMNS + i];
    }
  }
}

// Adds rows [m, m + ROWS) of a[:, row : row + inner] @ b[row : row + inner] to columns [begin, end) of `total`; `packed` is that part of b.
template <typename T>
void multiply_rows(
    const Tensor& total, const Matrix<T>& a, const T* packed, int64_t m, int64_t begin, int64_t end, int64_t row, int64_t inner, bool add,
    T* copy, float* c) {
  const int64_t columns = total.size(1);
  const int64_t height = row_block(a.rows, m);
  const T* block = a.data + m * a.row_stride + row;
  int64_t stride = a.row_stride;
  if (a.column_stride != 1 || m + height > a.rows || row + inner > a.columns) {
    copy_block(a, m, row, height, inner, copy);
    block = copy;
    stride = inner;
  }
  for (int64_t n = begin; n < end; n += COLUMNS) {
    const T* right = packed + n * inner;
    if (m + height <= a.rows && n + COLUMNS <= columns) {
      multiply_block<T>(height, inner, total.stride(0), add, block, stride, right, total.mutable_data_ptr<float>() + m * total.stride(0) + n);
    } else {
      multiply_block<T>(height, inner, COLUMNS, false, block, stride, right, c);
      put_block(c, total, m, n, add);
    }
  }
}

template <typename T>
bool multiply(const Tensor& total, const Tensor& a_, const Tensor& b_, bool add) {
  if (!available<T>()) {
    return false;
  }
  const Matrix<T> a(a_), b(b_);
  const int64_t blocks = (b.columns + COLUMNS - 1) / COLUMNS, width = blocks * COLUMNS;
  // Where there are fewer blocks of rows than threads, each block's columns are multiplied in parts.
  const int64_t lines = (a.rows + ROWS - 1) / ROWS, threads = at::get_num_threads();
  const int64_t parts = lines >= threads ? 1 : std::min(blocks, (threads + lines - 1) / std::max<int64_t>(1, lines));
  std::vector<int64_t> starts; // of blocks of the inner dimension
  for (int64_t row = 0; row < b.rows; row += inner_block(b.rows, row)) {
    starts.push_back(row);
  }
  const int64_t count = static_cast<int64_t>(starts.size());
  const int64_t at_once = std::max<int64_t>(1, PACKED_BYTES / (INNER * width * static_cast<int64_t>(sizeof(T))));
  const Tensor packed = at::empty({std::min(at_once * INNER, (b.rows + INNER_REST - 1) / INNER_REST * INNER_REST) * width}, b_.options());
  for (int64_t first = 0; first < count; first += at_once) {
    const int64_t last = std::min(first + at_once, count), origin = starts[first];
    T* out = packed.mutable_data_ptr<T>();
    at::parallel_for(0, (last - first) * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t each = begin; each < end; ++each) {
        const int64_t row = starts[first + each / blocks], inner = inner_block(b.rows, row), column = each % blocks * COLUMNS;
        pack(b, row, inner, column, out + (row - origin) * width + column * inner);
      }
    });
    at::parallel_for(0, lines * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> copy(ROWS * INNER);
      std::vector<float> c(ROWS * COLUMNS);
      for (int64_t each = begin; each < end; ++each) {
        const int64_t m = each / parts * ROWS, part = each % parts;
        const int64_t from = blocks * part / parts * COLUMNS, to = blocks * (part + 1) / parts * COLUMNS;
        for (int64_t i = first; i < last; ++i) {
          const T* right = out + (starts[i] - origin) * width;
          const int64_t inner = inner_block(b.rows, starts[i]);
          multiply_rows(total, a, right, m, from, std::min(to, b.columns), starts[i], inner, add || i > 0, copy.data(), c.data());
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }
  return true;
}

bool mm_float32(const Tensor& total, const Tensor& a, const Tensor& b, bool add) {
  TORCH_CHECK_VALUE(
      a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "mm_float32_: expected a (m, k) and b (k, n), got ", a.sizes(), " and ",
      b.sizes());
  check_dtype("a", a, FACTORS);
  check_dtype("b", b, {a.scalar_type()});
  check_tensor("total", total, FLOAT32, {a.size(0), b.size(1)});
  TORCH_CHECK_VALUE(
      total.stride(1) == 1 || total.size(1) <= 1, "total: expected an inner stride of 1, got strides ", total.strides());
  if (a.size(1) == 0 && !add) {
    total.zero_();
  }
  if (a.scalar_type() == at::kFloat) {
    return multiply<float>(total, a, b, add);
  }
  return a.scalar_type() == at::kBFloat16 ? multiply<at::BFloat16>(total, a, b, add) : multiply<at::Half>(total, a, b, add);
}

TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) {
  m.impl("mm_float32_", &mm_float32);
}

} // namespace
} // namespace mgrpo
