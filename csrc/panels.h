// Tensors as the operands of gemm.h's products.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "gemm.h"

namespace fastpost {

// A packed operand.
struct Panels {
  const uint32_t* panel(int64_t p) const {
    return reinterpret_cast<const uint32_t*>(memory.const_data_ptr<int32_t>()) + p * memory.size(1);
  }
  int64_t units() const { return units_of(depth, isa); }

  at::Tensor memory;  // (panels, units of a panel) int32
  int64_t rows, depth;
  Isa isa;
};

// x: bf16 or fp32, on the CPU.
Matrix matrix(const at::Tensor& x);

// Throws unless the units of an instruction set can be made of x.
void check_units(const Matrix& x, Isa isa);

// In parallel, into new memory, or into `room`, which grows where it is too small.
Panels packed_left(const Matrix& x, Isa isa);
Panels packed_right(const Matrix& x, Isa isa, at::Tensor* room = nullptr);

// Where a thread of a parallel loop begins with the columns: those it has packed itself, which are in its own cache.
double own_share();

const char* name(Isa isa);
Isa isa_named(const std::string& name);  // throws if this CPU has none such

}  // namespace fastpost
