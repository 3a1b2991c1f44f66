#include "vec.h"
// after the inline namespace has been opened
#include "pack.h"

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

// Elements are moved as these types, because at::vec transposes them.
using Two = c10::BFloat16;
using Four = float;

// The side of a square that at::vec transposes in registers.
template <typename T>
constexpr int SQUARE = sizeof(T) == 2 ? 32 : 16;

// Writes x (rows, columns) to `to` (columns, rows).
template <typename T>
void transpose(const T* x, int64_t x_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int64_t S = SQUARE<T>;
  const int64_t whole_rows = rows / S * S, whole_columns = columns / S * S;
  for (int64_t r = 0; r < whole_rows; r += S) {
    for (int64_t c = 0; c < whole_columns; c += S) {
      at::vec::transpose_mxn<T, S, S>(x + r * x_stride + c, x_stride, to + c * to_stride + r, to_stride);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      std::memcpy(to + c * to_stride + r, x + r * x_stride + c, sizeof(T)); // pairs may begin where no float does
    }
  }
}

template <typename T>
void copy(const Part& part, T* to, int64_t stride) {
  const T* from = static_cast<const T*>(part.data);
  if (part.row_stride == 1 && part.column_stride != 1) {
    return transpose(from, part.column_stride, part.columns, part.rows, to, stride);
  }
  for (int64_t r = 0; r < part.rows; ++r) {
    const T* row = from + r * part.row_stride;
    if (part.column_stride == 1) {
      std::copy_n(row, part.columns, to + r * stride);
    } else {
      for (int64_t c = 0; c < part.columns; ++c) {
        to[r * stride + c] = row[c * part.column_stride];
      }
    }
  }
}

// Writes the elements of two rows beside each other.
void interleave(const uint16_t* __restrict first, const uint16_t* __restrict second, int64_t columns, uint16_t* __restrict to) {
  for (int64_t c = 0; c < columns; ++c) {
    to[2 * c] = first[c];
    to[2 * c + 1] = second[c];
  }
}

void pack_pairs(const Part& part, Two* to, int64_t width) {
  const Two* from = static_cast<const Two*>(part.data);
  int64_t r = 0;
  if (part.row_stride == 1 && part.column_stride % 2 == 0) { // the elements of a pair are neighbours already, and move as one
    r = part.rows / 2 * 2;
    transpose(
        reinterpret_cast<const Four*>(from), part.column_stride / 2, part.columns, part.rows / 2, reinterpret_cast<Four*>(to), width);
  }
  for (; part.column_stride == 1 && r + 2 <= part.rows; r += 2) {
    auto bits = [](const Two* x) { return reinterpret_cast<const uint16_t*>(x); };
    interleave(bits(from + r * part.row_stride), bits(from + (r + 1) * part.row_stride), part.columns, reinterpret_cast<uint16_t*>(to + r * width));
  }
  for (; r < part.rows; ++r) {
    for (int64_t c = 0; c < part.columns; ++c) {
      to[r / 2 * 2 * width + 2 * c + r % 2] = from[r * part.row_stride + c * part.column_stride];
    }
  }
}

} // namespace

void copy_part_kernel(int64_t element_bytes, const Part& part, void* to, int64_t stride) {
  element_bytes == 2 ? copy(part, static_cast<Two*>(to), stride) : copy(part, static_cast<Four*>(to), stride);
}

void pack_panel_kernel(int64_t element_bytes, const Part& part, void* to, int64_t width) {
  element_bytes == 2 ? pack_pairs(part, static_cast<Two*>(to), width) : copy(part, static_cast<Four*>(to), width);
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
