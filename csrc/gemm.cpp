// See gemm.h. The blocking is Goto's: a panel of the left operand stays in the first-level cache while those of the
// right one, kColumnsHeld at a time, come from the second.

#include "gemm.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace fastpost {
namespace {

constexpr int64_t kColumnsHeld = 192;
constexpr int64_t kLanes = 16;  // units in a register
constexpr int64_t kColumnRegisters = kPanelColumns / kLanes;

uint32_t pair(uint16_t even, uint16_t odd) { return even | uint32_t(odd) << 16; }

// One panel, entry by entry: what the vectors leave over.
void pack_entries(const Matrix& x, int64_t first, int64_t rows, int64_t panel, int64_t from_unit, uint32_t* out) {
  const auto at = [&](int64_t row, int64_t depth) -> uint16_t {
    return row < rows && depth < x.depth ? x.data[(first + row) * x.row_stride + depth * x.depth_stride] : 0;
  };
  for (int64_t u = from_unit; u < units_of(x.depth); ++u)
    for (int64_t i = 0; i < panel; ++i) out[u * panel + i] = pair(at(i, 2 * u), at(i, 2 * u + 1));
}

#if defined(__x86_64__)

// 16 x 16 units, transposed: blocks of 8, 4, 2 and 1 change places across the diagonal.
WITH_BF16 inline void transpose(__m512i (&x)[kLanes]) {
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

// A panel of rows that lie along the depth.
template <int kPanel>
WITH_BF16 void pack_rows(const Matrix& x, int64_t first, uint32_t* out) {
  const int64_t rows = std::min<int64_t>(kPanel, x.rows - first), whole = x.depth / (2 * kLanes) * kLanes;
  for (int64_t u = 0; u < whole; u += kLanes) {
    for (int64_t top = 0; top < kPanel; top += kLanes) {
      __m512i units[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        units[i] = top + i < rows ? _mm512_loadu_si512(x.data + (first + top + i) * x.row_stride + 2 * u)
                                  : _mm512_setzero_si512();
      transpose(units);
      const __mmask16 wanted = kPanel - top < kLanes ? (1 << (kPanel - top)) - 1 : 0xffff;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) _mm512_mask_storeu_epi32(out + (u + i) * kPanel + top, wanted, units[i]);
    }
  }
  pack_entries(x, first, rows, kPanel, whole, out);
}

// A panel of rows that lie across: neighbours along the depth are `depth_stride` apart.
template <int kPanel>
WITH_BF16 void pack_columns(const Matrix& x, int64_t first, uint32_t* out) {
  const int64_t rows = std::min<int64_t>(kPanel, x.rows - first), whole = x.depth / 2;
  for (int64_t u = 0; u < whole; ++u) {
    const uint16_t* even = x.data + first + 2 * u * x.depth_stride;
    for (int64_t i = 0; i < kPanel; i += kLanes) {
      const int64_t here = std::clamp<int64_t>(rows - i, 0, kLanes), wanted = std::min<int64_t>(kPanel - i, kLanes);
      const __mmask16 mask = (1 << here) - 1;
      const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + i));
      const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + x.depth_stride + i));
      _mm512_mask_storeu_epi32(out + u * kPanel + i, (1 << wanted) - 1, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
  }
  pack_entries(x, first, rows, kPanel, whole, out);
}

// A tile of kPanelRows x kPanelColumns.
WITH_BF16 void multiply_tile(const uint32_t* left, const uint32_t* right, int64_t units, float* out, int64_t stride,
                             bool accumulate, Sums length) {
  const int64_t summed = length == Sums::kShort ? 128 : 512;  // units
  for (int64_t begin = 0; begin < units; begin += summed) {
    __m512 sums[kPanelRows][kColumnRegisters] = {};
    for (int64_t u = begin; u < std::min(begin + summed, units); ++u) {
      __m512bh r[kColumnRegisters];
#pragma GCC unroll 2
      for (int j = 0; j < kColumnRegisters; ++j)
        r[j] = (__m512bh)_mm512_loadu_si512(right + u * kPanelColumns + j * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kPanelRows; ++i) {
        const __m512bh l = (__m512bh)_mm512_set1_epi32(left[u * kPanelRows + i]);
#pragma GCC unroll 2
        for (int j = 0; j < kColumnRegisters; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], l, r[j]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kPanelRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kColumnRegisters; ++j) {
        float* at = out + i * stride + j * kLanes;
        _mm512_storeu_ps(at, accumulate ? _mm512_add_ps(_mm512_loadu_ps(at), sums[i][j]) : sums[i][j]);
      }
    accumulate = true;
  }
}

#else

template <int kPanel>
void pack_rows(const Matrix& x, int64_t first, uint32_t* out) {
  pack_entries(x, first, std::min<int64_t>(kPanel, x.rows - first), kPanel, 0, out);
}

template <int kPanel>
void pack_columns(const Matrix& x, int64_t first, uint32_t* out) {
  pack_rows<kPanel>(x, first, out);
}

void multiply_tile(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, bool, Sums) {
  TORCH_CHECK(false, "this CPU does not multiply bf16");
}

#endif

// A tile at the rim: made whole elsewhere, and what is inside copied.
void multiply_rim(const uint32_t* left, const uint32_t* right, int64_t units, Block out, bool accumulate, Sums sums) {
  float whole[kPanelRows * kPanelColumns];
  multiply_tile(left, right, units, whole, kPanelColumns, false, sums);
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.columns; ++j) {
      float& at = out.data[i * out.stride + j];
      at = (accumulate ? at : 0.0f) + whole[i * kPanelColumns + j];
    }
}

template <int kPanel>
void pack(const Matrix& x, uint32_t* panels) {
  for (int64_t p = 0; p < panels_of(x.rows, kPanel); ++p) {
    uint32_t* out = panels + p * units_of(x.depth) * kPanel;
    x.depth_stride == 1 ? pack_rows<kPanel>(x, p * kPanel, out) : pack_columns<kPanel>(x, p * kPanel, out);
  }
}

template <int kPanel>
at::Tensor packed(const Matrix& x) {
  const int64_t count = panels_of(x.rows, kPanel), size = units_of(x.depth) * kPanel;
  at::Tensor panels = at::empty({count, size}, at::kInt);
  uint32_t* out = reinterpret_cast<uint32_t*>(panels.data_ptr<int32_t>());
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    pack<kPanel>(x.part(begin * kPanel, std::min(end * kPanel, x.rows) - begin * kPanel), out + begin * size);
  });
  return panels;
}

}  // namespace

bool multiplies_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

Matrix matrix(const at::Tensor& x) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kBFloat16 && (x.stride(0) == 1 || x.stride(1) == 1),
              "an operand must be a bf16 matrix on the CPU with one stride of 1, got ", x.scalar_type(), " ", x.sizes(),
              " with strides ", x.strides());
  return {static_cast<uint16_t*>(x.data_ptr()), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

void pack_left(const Matrix& x, uint32_t* panels) { pack<kPanelRows>(x, panels); }
void pack_right(const Matrix& x, uint32_t* panels) { pack<kPanelColumns>(x, panels); }
at::Tensor packed_left(const Matrix& x) { return packed<kPanelRows>(x); }
at::Tensor packed_right(const Matrix& x) { return packed<kPanelColumns>(x); }

void multiply(const uint32_t* left, const uint32_t* right, int64_t depth, Block out, bool accumulate, Sums sums) {
  const int64_t units = units_of(depth);
  const int64_t slabs = (out.columns + kColumnsHeld - 1) / kColumnsHeld;
  // Threads begin with what each has packed itself, which is in its own cache, and not all with the same.
  const int64_t first = at::get_thread_num() * slabs / at::get_num_threads();
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t held = (slab + first) % slabs * kColumnsHeld;
    for (int64_t i = 0; i < out.rows; i += kPanelRows)
      for (int64_t j = held; j < std::min(held + kColumnsHeld, out.columns); j += kPanelColumns) {
        const uint32_t *l = left + i * units, *r = right + j * units;
        const Block tile{out.data + i * out.stride + j, out.stride, std::min(kPanelRows, out.rows - i),
                         std::min(kPanelColumns, out.columns - j)};
        if (tile.rows == kPanelRows && tile.columns == kPanelColumns)
          multiply_tile(l, r, units, tile.data, tile.stride, accumulate, sums);
        else
          multiply_rim(l, r, units, tile, accumulate, sums);
      }
  }
}

}  // namespace fastpost
