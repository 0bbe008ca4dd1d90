// See gemm.h. The blocking is Goto's (doi:10.1145/1356052.1356053): a panel of the left operand stays in the
// first-level cache while those of the right one, kColumnsHeld at a time, come from the second.

#include "gemm.h"

#include <algorithm>
#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace fastpost {
namespace {

constexpr int64_t kColumnsHeld = 192, kUnitsHeld = 512;

// Sums along `units`, then out = them, or out += them. `length`: what a sum runs over before it joins the others.
using Tile = void (*)(const uint32_t* left, const uint32_t* right, int64_t units, int64_t length, float* out,
                      int64_t stride, bool accumulate);

// kRows x kColumns of a tile of fp32 units. As always_inline it is compiled for whatever calls it; the sums stay in
// that CPU's registers if it has kRows * kColumns / lanes of them, and some for the operands.
template <int kRows, int kColumns>
INLINE void sum_floats(const float* left, const float* right, int64_t units, float* out, int64_t stride, bool add) {
  float sums[kRows][kColumns] = {};
  for (int64_t u = 0; u < units; ++u)
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
#pragma omp simd
      for (int j = 0; j < kColumns; ++j)
        sums[i][j] = std::fma(left[u * kPanelRows + i], right[u * kPanelColumns + j], sums[i][j]);
  for (int i = 0; i < kRows; ++i)
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) out[i * stride + j] = (add ? out[i * stride + j] : 0.0f) + sums[i][j];
}

// A whole tile, in parts of kRows x kColumns.
template <int kRows, int kColumns>
INLINE void multiply_floats(const uint32_t* left, const uint32_t* right, int64_t units, int64_t length, float* out,
                            int64_t stride, bool accumulate) {
  static_assert(kPanelRows % kRows == 0 && kPanelColumns % kColumns == 0);
  const float *l = reinterpret_cast<const float*>(left), *r = reinterpret_cast<const float*>(right);
  for (int64_t begin = 0; begin < units; begin += length)
    for (int64_t i = 0; i < kPanelRows; i += kRows)
      for (int64_t j = 0; j < kPanelColumns; j += kColumns)
        sum_floats<kRows, kColumns>(l + begin * kPanelRows + i, r + begin * kPanelColumns + j,
                                    std::min(length, units - begin), out + i * stride + j, stride,
                                    accumulate || begin > 0);
}

#if defined(__x86_64__)

__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void floats_avx512(
    const uint32_t* left, const uint32_t* right, int64_t units, int64_t length, float* out, int64_t stride, bool add) {
  multiply_floats<12, 32>(left, right, units, length, out, stride, add);  // 24 of 32 registers of 16
}

__attribute__((target("arch=x86-64-v3"))) void floats_avx2(const uint32_t* left, const uint32_t* right, int64_t units,
                                                           int64_t length, float* out, int64_t stride, bool add) {
  multiply_floats<6, 16>(left, right, units, length, out, stride, add);  // 12 of 16 registers of 8
}

__attribute__((target("arch=x86-64-v4,avx512bf16"))) void pairs_avx512(const uint32_t* left, const uint32_t* right,
                                                                        int64_t units, int64_t length, float* out,
                                                                        int64_t stride, bool accumulate) {
  constexpr int kLanes = 16, kRegisters = kPanelColumns / kLanes;
  for (int64_t begin = 0; begin < units; begin += length) {
    __m512 sums[kPanelRows][kRegisters] = {};
    for (int64_t u = begin; u < std::min(begin + length, units); ++u) {
      __m512bh r[kRegisters];
#pragma GCC unroll 2
      for (int j = 0; j < kRegisters; ++j)
        r[j] = (__m512bh)_mm512_loadu_si512(right + u * kPanelColumns + j * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kPanelRows; ++i) {
        const __m512bh l = (__m512bh)_mm512_set1_epi32(left[u * kPanelRows + i]);
#pragma GCC unroll 2
        for (int j = 0; j < kRegisters; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], l, r[j]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kPanelRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kRegisters; ++j) {
        float* at = out + i * stride + j * kLanes;
        _mm512_storeu_ps(at, accumulate ? _mm512_add_ps(_mm512_loadu_ps(at), sums[i][j]) : sums[i][j]);
      }
    accumulate = true;
  }
}

Tile tile_of(Isa isa) {
  return isa == Isa::kAvx512Bf16 ? pairs_avx512 : isa == Isa::kAvx512 ? floats_avx512 : floats_avx2;
}

#else

Tile tile_of(Isa) { return multiply_floats<6, 16>; }  // 24 of NEON's 32 registers of 4

#endif

// A tile at the rim: made whole elsewhere, and what is inside copied.
void multiply_rim(Tile tile, const uint32_t* left, const uint32_t* right, int64_t units, int64_t length, Block out,
                  bool accumulate) {
  float whole[kPanelRows * kPanelColumns];
  tile(left, right, units, length, whole, kPanelColumns, false);
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.columns; ++j) {
      float& at = out.data[i * out.stride + j];
      at = (accumulate ? at : 0.0f) + whole[i * kPanelColumns + j];
    }
}

}  // namespace

std::vector<Isa> available() {
#if defined(__x86_64__)
  std::vector<Isa> found;
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16")) found.push_back(Isa::kAvx512Bf16);
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back(Isa::kAvx512);
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back(Isa::kAvx2);
  return found;
#elif defined(__aarch64__)
  return {Isa::kNeon};
#else
  return {};
#endif
}

void multiply(const uint32_t* left, const uint32_t* right, int64_t units, Isa isa, Block out, bool accumulate,
              Sums sums, double from) {
  constexpr int64_t kLine = 64 / sizeof(float);
  const Tile tile = tile_of(isa);
  const int64_t length = sums == Sums::kLong ? kUnitsHeld : isa == Isa::kAvx512Bf16 ? 128 : 256;
  const int64_t slabs = (out.columns + kColumnsHeld - 1) / kColumnsHeld, first = int64_t(from * slabs);
  for (int64_t begin = 0; begin < units; begin += kUnitsHeld, accumulate = true) {
    const int64_t depth = std::min(kUnitsHeld, units - begin);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t held = (slab + first) % slabs * kColumnsHeld;
      for (int64_t i = 0; i < out.rows; i += kPanelRows)
        for (int64_t j = held; j < std::min(held + kColumnsHeld, out.columns); j += kPanelColumns) {
          const uint32_t* l = left + i * units + begin * kPanelRows;
          const uint32_t* r = right + j * units + begin * kPanelColumns;
          const Block at{out.data + i * out.stride + j, out.stride, std::min(kPanelRows, out.rows - i),
                         std::min(kPanelColumns, out.columns - j)};
          // Wide results lie beyond the second-level cache: they come while the sums are made.
          for (int64_t row = 0; row < at.rows; ++row)
            for (int64_t column = 0; column < at.columns; column += kLine)
              __builtin_prefetch(at.data + row * at.stride + column, 1);
          if (at.rows == kPanelRows && at.columns == kPanelColumns)
            tile(l, r, depth, length, at.data, at.stride, accumulate);
          else
            multiply_rim(tile, l, r, depth, length, at, accumulate);
        }
    }
  }
}

}  // namespace fastpost
