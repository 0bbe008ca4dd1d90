// See panels.h.

#include "panels.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace fastpost {
namespace {

using Pack = void (*)(const Matrix&, Isa, uint32_t*);

at::Tensor memory(int64_t rows, int64_t columns, at::Tensor* room) {
  if (!room) return at::empty({rows, columns}, at::kInt);
  if (!room->defined() || room->numel() < rows * columns) *room = at::empty({rows * columns}, at::kInt);
  return room->narrow(0, 0, rows * columns).view({rows, columns});
}

Panels packed(const Matrix& x, Isa isa, int64_t panel, Pack pack, at::Tensor* room) {
  check_units(x, isa);
  const int64_t count = panels_of(x.rows, panel), size = units_of(x.depth, isa) * panel;
  const Panels panels{memory(count, size, room), x.rows, x.depth, isa};
  uint32_t* out = reinterpret_cast<uint32_t*>(panels.memory.data_ptr<int32_t>());
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    pack(x.part(begin * panel, std::min(end * panel, x.rows) - begin * panel), isa, out + begin * size);
  });
  return panels;
}

}  // namespace

Matrix matrix(const at::Tensor& x) {
  const bool narrow = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(x.device().is_cpu() && (narrow || x.scalar_type() == at::kFloat) && x.dim() == 2 &&
                  (x.stride(0) == 1 || x.stride(1) == 1),
              "an operand must be a bf16 or fp32 matrix on the CPU with one stride of 1, got ", x.scalar_type(), " ",
              x.sizes(), " with strides ", x.strides());
  return {static_cast<std::byte*>(x.data_ptr()), narrow, x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

void check_units(const Matrix& x, Isa isa) {
  TORCH_CHECK(isa != Isa::kAvx512Bf16 || x.narrow, "an operand of ", name(isa), " must be bf16, got fp32");
}

Panels packed_left(const Matrix& x, Isa isa) { return packed(x, isa, kPanelRows, pack_left, nullptr); }
Panels packed_right(const Matrix& x, Isa isa, at::Tensor* room) {
  return packed(x, isa, kPanelColumns, pack_right, room);
}

double own_share() { return double(at::get_thread_num()) / at::get_num_threads(); }

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "neon";
  }
}

Isa isa_named(const std::string& named) {
  for (const Isa isa : available())
    if (named == name(isa)) return isa;
  TORCH_CHECK(false, "this CPU does not multiply with ", named);
}

}  // namespace fastpost
