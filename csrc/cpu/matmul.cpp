// Matrix products with a float32 result, by oneDNN, one block at a time, through at::native::cpublas.
// - Of 16-bit factors, summed in float32 until they are added to the result. aten's own rounds every product to 16 bits, and the sum of many
//   rounded products is not the rounded sum.
// - Of float32 factors on processors with AVX-512 that are not Intel's: aten multiplies those with MKL, which has AVX2 for them.

#include "check.h"
#include "pack.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

namespace mgrpo {
namespace {

using at::Tensor;

// Every block is filled up with zeros to one of these sizes, because oneDNN compiles and keeps a kernel for each size that it meets.
constexpr int64_t ROWS = 64, FEW_ROWS = 16, COLUMNS = 128, INNER = 512, INNER_STEP = 64;
constexpr at::ScalarType FACTORS[] = {at::kBFloat16, at::kHalf, at::kFloat};
constexpr int64_t PACKED_BYTES = 8 << 20; // of the second factor, rearranged, at most: or one block of its rows, INNER * columns

template <typename T>
void multiply_block(
    int64_t height, int64_t inner, int64_t c_stride, bool add, const T* a, int64_t a_stride, const T* b, float* c, int64_t width = COLUMNS) {
  at::native::cpublas::brgemm(height, width, inner, a_stride, width, c_stride, add, a, b, c);
}

// Whether this build of PyTorch, on this CPU, has the block product, and it is worth while. PyTorch raises where it has not.
template <typename T>
bool available() {
  static const bool found = [] {
    if (std::is_same_v<T, float> && !(mkl_is_held_back() && has_avx512())) {
      return false;
    }
    try {
      const std::vector<T> a(ROWS * INNER_STEP, T(1)), b(INNER_STEP * COLUMNS, T(1));
      std::vector<float> c(ROWS * COLUMNS);
      multiply_block<T>(ROWS, INNER_STEP, COLUMNS, false, a.data(), INNER_STEP, b.data(), c.data());
      at::native::cpublas::brgemm_release();
      return std::all_of(c.begin(), c.end(), [](float each) { return each == static_cast<float>(INNER_STEP); });
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

  Matrix(const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : data(data), rows(rows), columns(columns), row_stride(row_stride), column_stride(column_stride) {}
  explicit Matrix(const Tensor& x) : Matrix(x.const_data_ptr<T>(), x.size(0), x.size(1), x.stride(0), x.stride(1)) {}

  Matrix transposed() const {
    return {data, columns, rows, column_stride, row_stride};
  }
};

// What lies inside the matrix of the block at (row, column).
template <typename T>
Part inside(const Matrix<T>& x, int64_t row, int64_t column, int64_t height, int64_t width) {
  return {
      x.data + row * x.row_stride + column * x.column_stride, std::min(height, x.rows - row), std::min(width, x.columns - column),
      x.row_stride, x.column_stride};
}

// Copies the block at (row, column) to `out` (height, width), with zeros beyond the matrix's end.
template <typename T>
void copy_block(const Matrix<T>& x, int64_t row, int64_t column, int64_t height, int64_t width, T* out) {
  const Part part = inside(x, row, column, height, width);
  if (part.rows < height || part.columns < width) {
    std::fill(out, out + height * width, T(0));
  }
  MGRPO_CALL(copy_part_kernel)(sizeof(T), part, out, width);
}

int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}
int64_t round_up(int64_t n, int64_t step) {
  return divide_up(n, step) * step;
}

// The inner dimension in blocks of at most INNER, as even as multiples of INNER_STEP go.
struct InnerBlocks {
  int64_t rows, step, count;

  explicit InnerBlocks(int64_t rows)
      : rows(rows),
        step(round_up(divide_up(rows, std::max<int64_t>(1, divide_up(rows, INNER))), INNER_STEP)),
        count(rows ? divide_up(rows, step) : 0) {}

  // Rows of block i, those of zeros included.
  int64_t size(int64_t i) const {
    return std::min(step, round_up(rows - i * step, INNER_STEP));
  }
};

// How many rows of a are multiplied at once, of those from `row` on.
int64_t row_block(int64_t rows, int64_t row) {
  return rows - row <= FEW_ROWS ? FEW_ROWS : rows - row <= 2 * FEW_ROWS ? 2 * FEW_ROWS : ROWS;
}

// Packs `width` columns of rows [row, row + inner) of b as the block product reads them.
template <typename T>
void pack(const Matrix<T>& b, int64_t row, int64_t inner, int64_t column, T* to, int64_t width = COLUMNS) {
  const Part part = inside(b, row, column, inner, width);
  if (part.columns < width || part.rows < inner) {
    std::fill(to, to + inner * width, T(0));
  }
  MGRPO_CALL(pack_panel_kernel)(sizeof(T), part, to, width);
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

// Few rows of a with a b whose columns are contiguous, such as a weight transposed. To rearrange b would take as long as to multiply it: the block
// product takes its columns as rows of the first factor, where they lie, and gives the result transposed.
template <typename T>
void multiply_few_rows(const Tensor& total, const Matrix<T>& a, const Matrix<T>& b, bool add) {
  const Matrix<T> columns = b.transposed(), right = a.transposed();
  const int64_t width = row_block(a.rows, 0), padded = round_up(b.rows, INNER_STEP);
  const InnerBlocks inner(b.rows);
  std::vector<T> packed(padded * width);
  for (int64_t i = 0; i < inner.count; ++i) {
    pack(right, i * inner.step, inner.size(i), 0, packed.data() + i * inner.step * width, width);
  }
  float* out = total.mutable_data_ptr<float>();
  at::parallel_for(0, divide_up(columns.rows, ROWS), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> copy(ROWS * INNER);
    std::vector<float> c(ROWS * width), lines(width * ROWS);
    for (int64_t n = begin * ROWS; n < std::min(end * ROWS, columns.rows); n += ROWS) {
      for (int64_t i = 0; i < inner.count; ++i) {
        const int64_t row = i * inner.step, size = inner.size(i);
        const T* block = columns.data + n * columns.row_stride + row;
        int64_t stride = columns.row_stride;
        if (n + ROWS > columns.rows || row + size > columns.columns) {
          copy_block(columns, n, row, ROWS, size, copy.data());
          block = copy.data();
          stride = size;
        }
        multiply_block<T>(ROWS, size, width, i > 0, block, stride, packed.data() + row * width, c.data(), width);
      }
      MGRPO_CALL(copy_part_kernel)(sizeof(float), {c.data(), width, ROWS, 1, width}, lines.data(), ROWS);
      const int64_t inside = std::min(ROWS, columns.rows - n);
      for (int64_t r = 0; r < a.rows; ++r) {
        float* to = out + r * total.stride(0) + n;
        for (int64_t j = 0; j < inside; ++j) {
          to[j] = (add ? to[j] : 0.0f) + lines[r * ROWS + j];
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

template <typename T>
bool multiply(const Tensor& total, const Tensor& a_, const Tensor& b_, bool add) {
  if (!available<T>()) {
    return false;
  }
  const Matrix<T> a(a_), b(b_);
  if (a.rows <= 2 * FEW_ROWS && b.row_stride == 1 && b.rows > 0) {
    multiply_few_rows(total, a, b, add);
    return true;
  }
  const int64_t blocks = divide_up(b.columns, COLUMNS), width = blocks * COLUMNS;
  // Where there are fewer blocks of rows than threads, each block's columns are multiplied in parts.
  const int64_t lines = divide_up(a.rows, ROWS), threads = at::get_num_threads();
  const int64_t parts = lines >= threads ? 1 : std::min(blocks, divide_up(threads, std::max<int64_t>(1, lines)));
  const InnerBlocks inner(b.rows);
  const int64_t at_once = std::max<int64_t>(1, PACKED_BYTES / (INNER * width * static_cast<int64_t>(sizeof(T))));
  const Tensor packed = at::empty({std::min(at_once * inner.step, round_up(b.rows, INNER_STEP)) * width}, b_.options());
  for (int64_t first = 0; first < inner.count; first += at_once) {
    const int64_t last = std::min(first + at_once, inner.count), origin = first * inner.step;
    T* out = packed.mutable_data_ptr<T>();
    at::parallel_for(0, (last - first) * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t each = begin; each < end; ++each) {
        const int64_t i = first + each / blocks, row = i * inner.step, column = each % blocks * COLUMNS;
        pack(b, row, inner.size(i), column, out + (row - origin) * width + column * inner.size(i));
      }
    });
    at::parallel_for(0, lines * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> copy(ROWS * INNER);
      std::vector<float> c(ROWS * COLUMNS);
      for (int64_t each = begin; each < end; ++each) {
        const int64_t m = each / parts * ROWS, part = each % parts;
        const int64_t from = blocks * part / parts * COLUMNS, to = blocks * (part + 1) / parts * COLUMNS;
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = i * inner.step;
          const T* right = out + (row - origin) * width;
          multiply_rows(total, a, right, m, from, std::min(to, b.columns), row, inner.size(i), add || i > 0, copy.data(), c.data());
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
  if (total.numel() == 0) {
    return true;
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
