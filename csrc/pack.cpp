// The panels of gemm.h.

#include <algorithm>

#include "gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: its bug 105593
#define WITH_AVX512 __attribute__((target("arch=x86-64-v4")))
#endif

namespace fastpost {
namespace {

constexpr int64_t kLanes = 16;  // units in a register
constexpr int64_t kAhead = 8 * 64;  // bytes: more rows are read side by side than a CPU foresees

// What a unit holds: the numbers along the depth, and the unit u of a row.

struct Pairs {
  static constexpr int64_t kDepth = 2;
  static uint32_t unit(const Matrix& x, int64_t row, int64_t u) {
    const auto at = [&](int64_t k) -> uint32_t {
      return k < x.depth ? *reinterpret_cast<const uint16_t*>(x.at(row, k)) : 0;
    };
    return at(2 * u) | at(2 * u + 1) << 16;
  }
#if defined(__x86_64__)
  // 16 units of a row, or of 16 rows the unit u.
  WITH_AVX512 static __m512i along(const Matrix& x, int64_t row, int64_t u) {
    return _mm512_loadu_si512(x.at(row, 2 * u));
  }
  WITH_AVX512 static __m512i across(const Matrix& x, int64_t row, int64_t u, __mmask16 rows) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows, x.at(row, 2 * u)));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows, x.at(row, 2 * u + 1)));
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  }
#endif
};

struct Widened {
  static constexpr int64_t kDepth = 1;
  static uint32_t unit(const Matrix& x, int64_t row, int64_t u) {
    return uint32_t(*reinterpret_cast<const uint16_t*>(x.at(row, u))) << 16;
  }
#if defined(__x86_64__)
  WITH_AVX512 static __m512i along(const Matrix& x, int64_t row, int64_t u) { return across(x, row, u, 0xffff); }
  WITH_AVX512 static __m512i across(const Matrix& x, int64_t row, int64_t u, __mmask16 rows) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows, x.at(row, u))), 16);
  }
#endif
};

struct Floats {
  static constexpr int64_t kDepth = 1;
  static uint32_t unit(const Matrix& x, int64_t row, int64_t u) {
    return *reinterpret_cast<const uint32_t*>(x.at(row, u));
  }
#if defined(__x86_64__)
  WITH_AVX512 static __m512i along(const Matrix& x, int64_t row, int64_t u) {
    return _mm512_loadu_si512(x.at(row, u));
  }
  WITH_AVX512 static __m512i across(const Matrix& x, int64_t row, int64_t u, __mmask16 rows) {
    return _mm512_maskz_loadu_epi32(rows, x.at(row, u));
  }
#endif
};

// Units [from, to) of the panel that begins with row `first`, one by one in the order in which they lie.
template <typename Unit, int kPanel>
void pack_units(const Matrix& x, int64_t first, int64_t from, int64_t to, uint32_t* panel) {
  const int64_t rows = std::min<int64_t>(kPanel, x.rows - first);
  const auto put = [&](int64_t u, int64_t i) { panel[u * kPanel + i] = i < rows ? Unit::unit(x, first + i, u) : 0; };
  if (x.depth_stride == 1)
    for (int64_t i = 0; i < kPanel; ++i)
      for (int64_t u = from; u < to; ++u) put(u, i);
  else
    for (int64_t u = from; u < to; ++u)
      for (int64_t i = 0; i < kPanel; ++i) put(u, i);
}

#if defined(__x86_64__)

// 16 x 16 units, transposed: blocks of 8, 4, 2 and 1 change places across the diagonal.
WITH_AVX512 inline void transpose(__m512i (&x)[kLanes]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int step = 8; step; step /= 2) {
    // Of two registers a and b (numbered on from 16): a's lanes without the bit `step`, and b's moved into the gaps.
    const __m512i bit = _mm512_set1_epi32(step), from_b = _mm512_set1_epi32(16);
    const __mmask16 high = _mm512_test_epi32_mask(lane, bit);
    const __m512i low_half = _mm512_mask_add_epi32(lane, high, _mm512_sub_epi32(lane, bit), from_b);
    const __m512i high_half = _mm512_mask_add_epi32(_mm512_add_epi32(lane, bit), high, lane, from_b);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const __m512i a = x[i], b = x[i + step];
      x[i] = _mm512_permutex2var_epi32(a, low_half, b);
      x[i + step] = _mm512_permutex2var_epi32(a, high_half, b);
    }
  }
}

// The same, of rows that lie along the depth.
template <typename Unit, int kPanel>
WITH_AVX512 void pack_along(const Matrix& x, int64_t first, int64_t from, int64_t to, uint32_t* panel) {
  const int64_t rows = std::min<int64_t>(kPanel, x.rows - first);
  if (to - from < kLanes || to * Unit::kDepth > x.depth) return pack_units<Unit, kPanel>(x, first, from, to, panel);
  for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(x.at(first + i, from * Unit::kDepth) + kAhead);
  for (int64_t top = 0; top < kPanel; top += kLanes) {
    __m512i block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      block[i] = top + i < rows ? Unit::along(x, first + top + i, from) : _mm512_setzero_si512();
    transpose(block);
    const __mmask16 wanted = kPanel - top < kLanes ? (1 << (kPanel - top)) - 1 : 0xffff;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) _mm512_mask_storeu_epi32(panel + (from + i) * kPanel + top, wanted, block[i]);
  }
}

// The same, of rows that lie across.
template <typename Unit, int kPanel>
WITH_AVX512 void pack_across(const Matrix& x, int64_t first, int64_t from, int64_t to, uint32_t* panel) {
  const int64_t rows = std::min<int64_t>(kPanel, x.rows - first), whole = std::min(to, x.depth / Unit::kDepth);
  for (int64_t k = from * Unit::kDepth; k < whole * Unit::kDepth; ++k) __builtin_prefetch(x.at(first, k) + kAhead);
  for (int64_t u = from; u < whole; ++u)
    for (int64_t i = 0; i < kPanel; i += kLanes) {
      const int64_t here = std::clamp<int64_t>(rows - i, 0, kLanes), wanted = std::min<int64_t>(kPanel - i, kLanes);
      const __m512i block = Unit::across(x, first + i, u, (1 << here) - 1);
      _mm512_mask_storeu_epi32(panel + u * kPanel + i, (1 << wanted) - 1, block);
    }
  pack_units<Unit, kPanel>(x, first, whole, to, panel);
}

#endif

template <typename Unit, int kPanel>
void pack_panels(const Matrix& x, Isa isa, uint32_t* panels) {
  const int64_t units = units_of(x.depth, isa), count = panels_of(x.rows, kPanel);
  const bool along = x.depth_stride == 1;
  auto* pack = pack_units<Unit, kPanel>;
#if defined(__x86_64__)
  if (isa != Isa::kAvx2) pack = along ? pack_along<Unit, kPanel> : pack_across<Unit, kPanel>;
#endif
  const auto some = [&](int64_t p, int64_t u) {
    pack(x, p * kPanel, u, std::min(u + kLanes, units), panels + p * units * kPanel);
  };
  // What is read, a large matrix, is read in the order in which it lies.
  if (along)
    for (int64_t p = 0; p < count; ++p)
      for (int64_t u = 0; u < units; u += kLanes) some(p, u);
  else
    for (int64_t u = 0; u < units; u += kLanes)
      for (int64_t p = 0; p < count; ++p) some(p, u);
}

template <int kPanel>
void pack(const Matrix& x, Isa isa, uint32_t* panels) {
  if (isa == Isa::kAvx512Bf16)
    pack_panels<Pairs, kPanel>(x, isa, panels);
  else if (x.narrow)
    pack_panels<Widened, kPanel>(x, isa, panels);
  else
    pack_panels<Floats, kPanel>(x, isa, panels);
}

}  // namespace

void pack_left(const Matrix& x, Isa isa, uint32_t* panels) { pack<kPanelRows>(x, isa, panels); }
void pack_right(const Matrix& x, Isa isa, uint32_t* panels) { pack<kPanelColumns>(x, isa, panels); }

}  // namespace fastpost
