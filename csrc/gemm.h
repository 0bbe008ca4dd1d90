// Products of bf16 or fp32 operands with fp32 results.
//
// Both operands are packed into panels first: kPanelRows rows of the left one, kPanelColumns columns of the right one,
// in units of 32 bits:
//   panel p, unit u, row i  ->  panels[(p * units + u) * rows + i]
// A unit is what an instruction takes: two bf16 neighbours along the depth, {x[row][2u], x[row][2u + 1]}, where the CPU
// multiplies pairs of them, else one number in fp32, x[row][u]. A tile of kPanelRows x kPanelColumns sums stays in
// registers, or on a CPU with fewer of them a part of it. Every sum runs along the depth in one order, whatever the
// number of threads and rows beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastpost {

constexpr int64_t kPanelRows = 12, kPanelColumns = 32;  // 24 accumulators of 16, of AVX-512's 32 registers

// Instruction sets that have a way of their own through a tile, best first.
enum class Isa { kAvx512Bf16, kAvx512, kAvx2, kNeon };

// Those of this CPU. None: it must leave products to others.
std::vector<Isa> available();

inline int64_t units_of(int64_t depth, Isa isa) { return isa == Isa::kAvx512Bf16 ? (depth + 1) / 2 : depth; }
inline int64_t panels_of(int64_t rows, int64_t panel) { return (rows + panel - 1) / panel; }

// A matrix (rows, depth) of bf16 or fp32 in which one of the two strides is 1.
struct Matrix {
  std::byte* data;
  bool narrow;  // bf16
  int64_t rows, depth, row_stride, depth_stride;

  std::byte* at(int64_t i, int64_t k) const {
    return data + (i * row_stride + k * depth_stride) * (narrow ? sizeof(uint16_t) : sizeof(float));
  }
  template <typename T>
  T* row(int64_t i) const {
    return reinterpret_cast<T*>(at(i, 0));
  }

  Matrix part(int64_t first, int64_t count) const {
    return {at(first, 0), narrow, count, depth, row_stride, depth_stride};
  }
  Matrix transposed() const { return {data, narrow, depth, rows, depth_stride, row_stride}; }
};

// Panels of the rows of x, as the left operand, or as the transposed right operand. Rows and depths past the end are 0.
// Pairs are made of bf16 alone.
void pack_left(const Matrix& x, Isa isa, uint32_t* panels);
void pack_right(const Matrix& x, Isa isa, uint32_t* panels);

// An fp32 (rows, columns) block of memory.
struct Block {
  float* data;
  int64_t stride, rows, columns;
};

// How far a sum runs before it joins those before it: long ones err more, and short ones cost 1 or 2 %. At a depth of
// 1024, with logits of standard deviation 32, short sums of pairs are off by 3.7e-5 at worst (fp32 torch: 2.6e-5) and
// long ones by 1.1e-4.
enum class Sums { kShort, kLong };  // of logits; of gradients, whose operands are rounded already

// out = left @ right^T, or out += it, on the calling thread. It begins with the columns at `from`, a share of them.
void multiply(const uint32_t* left, const uint32_t* right, int64_t units, Isa isa, Block out, bool accumulate,
              Sums sums, double from = 0);

}  // namespace fastpost
