#include "vec.h"
// after the inline namespace has been opened
#include "kept.h"

#include <vector>

namespace mgrpo {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t AT_ONCE = 4; // rows: independent chains of products, and each element of the other operand is loaded once for all of them
constexpr int64_t SUMMED = 256; // rows whose float32 sum is formed by itself before it is added to others, so that errors do not grow with all

// The rows of the weight that a token has, a few at a time; the next ones are fetched from memory meanwhile.
struct Ids {
  const KeptRows& of;
  const int32_t* ids;
  int64_t next = 0;

  Ids(const KeptRows& of_, int64_t row) : of(of_), ids(of_.ids + row * of_.kept) {}

  // Writes up to AT_ONCE places among the row's ids and returns their number.
  int64_t take(int64_t* places) {
    int64_t n = 0;
    for (; next < of.kept && n < AT_ONCE; ++next) {
      if (ids[next] >= 0 && ids[next] < of.vocab) {
        places[n++] = next;
      }
    }
    return n;
  }
};

template <typename T>
void fetch(const T* row, int64_t i, int64_t width) {
  for (int64_t at = i; at < std::min(i + PAIR, width); at += 64 / int64_t(sizeof(T))) {
    __builtin_prefetch(row + at);
  }
}

// out[r] = h . w[r] for AT_ONCE rows; `ahead` are rows to fetch, or the same ones again.
template <typename T>
void dots(const float* h, const T* const* w, const T* const* ahead, int64_t width, float* out) {
  Pair sums[AT_ONCE];
  for (auto& sum : sums) {
    sum = {Vec(0.0f), Vec(0.0f)};
  }
  int64_t i = 0;
  for (; i + PAIR <= width; i += PAIR) {
    const Pair a = load_pair(h + i);
    for (int64_t r = 0; r < AT_ONCE; ++r) {
      const Pair b = load_pair(w[r] + i);
      fetch(ahead[r], i, width);
      sums[r].a = at::vec::fmadd(a.a, b.a, sums[r].a);
      sums[r].b = at::vec::fmadd(a.b, b.b, sums[r].b);
    }
  }
  if (i < width) {
    const Pair a = load_pair(h + i, width - i, 0.0f);
    for (int64_t r = 0; r < AT_ONCE; ++r) {
      const Pair b = load_pair(w[r] + i, width - i, 0.0f);
      sums[r].a = at::vec::fmadd(a.a, b.a, sums[r].a);
      sums[r].b = at::vec::fmadd(a.b, b.b, sums[r].b);
    }
  }
  for (int64_t r = 0; r < AT_ONCE; ++r) {
    out[r] = sum(sums[r].a + sums[r].b);
  }
}

// sum + the elements [i, i + part) of n <= AT_ONCE rows, each times its by[r]; the rows of `ahead` are fetched.
template <typename T>
Pair plus_rows(Pair sum, const float* by, const T* const* rows, const T* const* ahead, int64_t n, int64_t i, int64_t part) {
  for (int64_t r = 0; r < n; ++r) {
    const Pair x = part == PAIR ? load_pair(rows[r] + i) : load_pair(rows[r] + i, part, 0.0f);
    fetch(ahead[r], i, i + part);
    sum.a = at::vec::fmadd(Vec(by[r]), x.a, sum.a);
    sum.b = at::vec::fmadd(Vec(by[r]), x.b, sum.b);
  }
  return sum;
}

// total += sum over n <= AT_ONCE rows of by[r] rows[r].
template <typename T>
void add_rows(float* total, const float* by, const T* const* rows, const T* const* ahead, int64_t n, int64_t width) {
  int64_t i = 0;
  for (; i + PAIR <= width; i += PAIR) {
    store_pair(total + i, plus_rows(load_pair(total + i), by, rows, ahead, n, i, PAIR));
  }
  if (const int64_t part = width - i; part > 0) {
    store_pair(total + i, plus_rows(load_pair(total + i, part, 0.0f), by, rows, ahead, n, i, part), part);
  }
}

// out = the same sum, or with `add` out += the same sum, in float32 until it is written.
template <typename T, typename Row>
void write_rows(T* out, bool add, const float* by, const Row* const* rows, int64_t n, int64_t width) {
  const float one = 1.0f;
  const T* before = out;
  auto sum = [&](int64_t i, int64_t part) {
    const Pair of_rows = plus_rows({Vec(0.0f), Vec(0.0f)}, by, rows, rows, n, i, part);
    return add ? plus_rows(of_rows, &one, &before, &before, 1, i, part) : of_rows;
  };
  int64_t i = 0;
  for (; i + PAIR <= width; i += PAIR) {
    store_pair(out + i, sum(i, PAIR));
  }
  if (const int64_t part = width - i; part > 0) {
    store_pair(out + i, sum(i, part), part);
  }
}

template <typename T>
const float* widened(const T* x, int64_t width, float* buffer) {
  int64_t i = 0;
  for (; i + PAIR <= width; i += PAIR) {
    store_pair(buffer + i, load_pair(x + i));
  }
  if (i < width) {
    store_pair(buffer + i, load_pair(x + i, width - i, 0.0f), width - i);
  }
  return buffer;
}

template <typename T>
void logits(const KeptRows& of, float* x) {
  const T *hidden = static_cast<const T*>(of.hidden), *weight = static_cast<const T*>(of.weight);
  at::parallel_for(0, of.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(of.width);
    for (int64_t row = begin; row < end; ++row) {
      const float* h = widened(hidden + row * of.hidden_stride, of.width, buffer.data());
      float* out = x + row * of.kept;
      std::fill(out, out + of.kept, 0.0f);
      Ids ids(of, row);
      int64_t places[AT_ONCE], following[AT_ONCE];
      for (int64_t n = ids.take(places); n > 0;) {
        const int64_t m = ids.take(following);
        const T *w[AT_ONCE], *ahead[AT_ONCE];
        for (int64_t r = 0; r < AT_ONCE; ++r) {
          w[r] = weight + ids.ids[places[std::min(r, n - 1)]] * of.weight_stride;
          ahead[r] = r < m ? weight + ids.ids[following[r]] * of.weight_stride : w[r];
        }
        float products[AT_ONCE];
        dots(h, w, ahead, of.width, products);
        for (int64_t r = 0; r < n; ++r) {
          out[places[r]] = products[r];
        }
        n = m;
        std::copy(following, following + m, places);
      }
    }
  });
}

template <typename T>
void hidden_gradient(const KeptRows& of, const float* grad, float* out) {
  const T* weight = static_cast<const T*>(of.weight);
  at::parallel_for(0, of.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* total = out + row * of.width;
      std::fill(total, total + of.width, 0.0f);
      Ids ids(of, row);
      int64_t places[AT_ONCE], following[AT_ONCE];
      for (int64_t n = ids.take(places); n > 0;) {
        const int64_t m = ids.take(following);
        const T *w[AT_ONCE], *ahead[AT_ONCE];
        float by[AT_ONCE];
        for (int64_t r = 0; r < n; ++r) {
          w[r] = weight + ids.ids[places[r]] * of.weight_stride;
          ahead[r] = r < m ? weight + ids.ids[following[r]] * of.weight_stride : w[r];
          by[r] = grad[row * of.kept + places[r]];
        }
        add_rows(total, by, w, ahead, n, of.width);
        n = m;
        std::copy(following, following + m, places);
      }
    }
  });
}

// At most AT_ONCE entries of `order`: their hidden states and gradients.
template <typename T>
struct Entries {
  const T* rows[AT_ONCE];
  float by[AT_ONCE];
  int64_t number;
  double bias = 0; // the sum of the gradients

  Entries(const KeptRows& of, const float* grad, const int64_t* order, int64_t begin, int64_t end) : number(std::min(AT_ONCE, end - begin)) {
    for (int64_t r = 0; r < number; ++r) {
      const int64_t place = order[begin + r];
      rows[r] = static_cast<const T*>(of.hidden) + place / of.kept * of.hidden_stride;
      by[r] = grad[place];
      bias += by[r];
    }
  }
};

// Writes the sum of the entries [begin, end) of `order` to `out`, or adds it, and returns the sum of their gradients. `total` and `part` have
// room for a row each.
template <typename T>
double write_sum(
    const KeptRows& of, const float* grad, const int64_t* order, int64_t begin, int64_t end, float* total, float* part, bool add, T* out) {
  if (begin == end && !add) { // most ids where there are few tokens
    std::fill(out, out + of.width, T(0));
    return 0;
  }
  if (end - begin <= AT_ONCE) { // most ids: few tokens keep them
    const Entries<T> few(of, grad, order, begin, end);
    write_rows(out, add, few.by, few.rows, few.number, of.width);
    return few.bias;
  }
  const float one = 1.0f;
  double bias = 0;
  for (int64_t block = begin; block < end; block += SUMMED) {
    float* into = block == begin ? total : part;
    std::fill(into, into + of.width, 0.0f);
    for (int64_t e = block; e < std::min(end, block + SUMMED); e += AT_ONCE) {
      const Entries<T> some(of, grad, order, e, std::min(end, block + SUMMED));
      add_rows(into, some.by, some.rows, some.rows, some.number, of.width);
      bias += some.bias;
    }
    if (into != total) {
      const float* more = part;
      add_rows(total, &one, &more, &more, 1, of.width);
    }
  }
  const float* sum = total;
  write_rows(out, add, &one, &sum, 1, of.width);
  return bias;
}

template <typename T>
void weight_gradient(
    const KeptRows& of, const float* grad, const int64_t* order, const int64_t* bounds, bool add, T* out, float* bias) {
  // An id costs about as much as an entry, for its row is written to memory: threads share the sum of both evenly.
  constexpr int64_t PARTS = 64;
  const int64_t cost = of.vocab + bounds[of.vocab] - bounds[0];
  auto first_of = [&](int64_t part) { // the first id of a part
    const int64_t wanted = cost * part / PARTS;
    int64_t low = 0, high = of.vocab;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (middle + bounds[middle] - bounds[0] < wanted ? low : high) = middle + (middle + bounds[middle] - bounds[0] < wanted);
    }
    return low;
  };
  at::parallel_for(0, PARTS, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(2 * of.width);
    float *total = buffers.data(), *part = total + of.width;
    const int64_t last = end == PARTS ? of.vocab : first_of(end);
    for (int64_t id = begin == 0 ? 0 : first_of(begin); id < last; ++id) {
      bias[id] = 0;
      if (!add || bounds[id] < bounds[id + 1]) {
        T* row = out + id * of.width;
        bias[id] = static_cast<float>(write_sum(of, grad, order, bounds[id], bounds[id + 1], total, part, add, row));
      }
    }
  });
}

} // namespace

void kept_logits_kernel(const KeptRows& of, float* x) {
  for_dtype(of.dtype, [&](auto zero) { logits<decltype(zero)>(of, x); });
}

void kept_hidden_gradient_kernel(const KeptRows& of, const float* grad, float* out) {
  for_dtype(of.dtype, [&](auto zero) { hidden_gradient<decltype(zero)>(of, grad, out); });
}

void kept_weight_gradient_kernel(
    const KeptRows& of, const float* grad, const int64_t* order, const int64_t* bounds, bool add, void* out, float* bias) {
  for_dtype(of.dtype, [&](auto zero) {
    using T = decltype(zero);
    weight_gradient<T>(of, grad, order, bounds, add, static_cast<T*>(out), bias);
  });
}

} // namespace CPU_CAPABILITY
} // namespace mgrpo
