// The factors of a block product, rearranged. Elements are moved as they are: 2 bytes (element_bytes) for both 16-bit types, or 4.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace mgrpo {

// A part of a matrix: `rows` by `columns` elements from `data` on, with any strides.
struct Part {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
};

} // namespace mgrpo

// Writes the part to `to`, whose rows lie `stride` apart.
MGRPO_KERNEL(copy_part_kernel, void(int64_t element_bytes, const mgrpo::Part&, void* to, int64_t stride))
// Writes the part to `to` (rows, width) with its rows interleaved: 4 bytes of each column lie beside each other.
MGRPO_KERNEL(pack_panel_kernel, void(int64_t element_bytes, const mgrpo::Part&, void* to, int64_t width))
