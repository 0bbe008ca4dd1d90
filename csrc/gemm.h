// Products of bf16 operands with fp32 results, for a CPU that multiplies pairs of bf16 (AVX512-BF16).
//
// Both operands are packed into panels first: kPanelRows rows of the left one, kPanelColumns columns of the right one,
// and along the depth a 32-bit unit holds two neighbours, which is what an instruction takes:
//   panel p, unit u, row i  ->  panels[(p * units + u) * rows + i] = {x[p * rows + i][2u], x[p * rows + i][2u + 1]}
// A tile of kPanelRows x kPanelColumns sums stays in registers. Every sum runs along the depth in one order, whatever
// the number of threads and rows beside it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastpost {

constexpr int64_t kPanelRows = 12, kPanelColumns = 32;  // 24 accumulators of 16, of the 32 registers

inline int64_t units_of(int64_t depth) { return (depth + 1) / 2; }
inline int64_t panels_of(int64_t rows, int64_t panel) { return (rows + panel - 1) / panel; }

// Whether this CPU has the instructions.
bool multiplies_bf16();

// A bf16 matrix (rows, depth) in which one of the two strides is 1.
struct Matrix {
  uint16_t* data;
  int64_t rows, depth, row_stride, depth_stride;

  uint16_t* row(int64_t i) const { return data + i * row_stride; }

  Matrix part(int64_t first, int64_t count) const { return {row(first), count, depth, row_stride, depth_stride}; }
  Matrix transposed() const { return {data, depth, rows, depth_stride, row_stride}; }
};

Matrix matrix(const at::Tensor& x);

// Panels of the rows of x, as the left operand, or as the transposed right operand. Rows and depths past the end are 0.
void pack_left(const Matrix& x, uint32_t* panels);
void pack_right(const Matrix& x, uint32_t* panels);
at::Tensor packed_left(const Matrix& x);  // in parallel, into new memory
at::Tensor packed_right(const Matrix& x);

// An fp32 (rows, columns) block of memory.
struct Block {
  float* data;
  int64_t stride, rows, columns;
};

// How far a sum runs before it joins those before it: long ones err more, and short ones cost 1 or 2 %. At a depth of
// 1024, with logits of standard deviation 32, short sums are off by 3.7e-5 at worst (fp32 torch: 2.6e-5) and long ones
// by 1.1e-4.
enum class Sums { kShort, kLong };  // of logits; of gradients, whose operands are rounded already

// out = left @ right^T, or out += it, on the calling thread.
void multiply(const uint32_t* left, const uint32_t* right, int64_t depth, Block out, bool accumulate, Sums sums);

}  // namespace fastpost
