// What Python sees: fastpost/_native.pyi has the types, fastpost/core/native.py the use.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <functional>

#include "best_fit.h"
#include "blocks.h"
#include "panels.h"
#include "rows.h"

namespace fastpost {
namespace {

constexpr int kLayout = 7;  // of the state, of the coefficients and of the arguments; LAYOUT in rows.py
constexpr int64_t kRowsPerTask = 8;

using PythonOperands = std::tuple<Panels, at::Tensor, MaybeTensor>;
using MaybeOperands = std::optional<PythonOperands>;

Operands operands(const PythonOperands& x) { return {std::get<0>(x), std::get<1>(x), std::get<2>(x)}; }
std::optional<Operands> operands(const MaybeOperands& x) {
  return x ? std::make_optional(operands(*x)) : std::nullopt;
}

// The rows of an fp32 matrix.
struct Rows {
  explicit Rows(const at::Tensor& x) : data(x.data_ptr<float>()), stride(x.stride(0)) {}
  float* operator[](int64_t r) const { return data + r * stride; }
  float* data;
  int64_t stride;
};

// work(r, raw, raw_q, written, scratch) for the rows of tiles in memory, and what it wrote into `out`, fp32 or bf16, if
// any.
template <typename Work>
void each_row(const Forms& forms, const at::Tensor& tile, const MaybeTensor& tile_q, int64_t scratch,
              const MaybeTensor& out, const Work& work) {
  const int64_t R = forms.rows, B = forms.columns;
  check(tile, "tile", {R, B});
  if (tile_q) check(*tile_q, "tile_q", {R, B});
  const bool rounds = out && out->scalar_type() == at::kBFloat16;
  if (out && !rounds) check(*out, "out", {R, B});
  TORCH_CHECK(!rounds || (out->sizes() == at::IntArrayRef{R, B} && out->stride(1) == 1),
              "out must have the tile's shape [", R, ", ", B, "] and contiguous rows, got ", out->sizes());
  const Rows t(tile), q(tile_q.value_or(tile));
  at::parallel_for(0, R, kRowsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(scratch + B);
    float* aside = memory.data() + scratch;
    for (int64_t r = begin; r < end; ++r) {
      float* written = out && !rounds ? out->data_ptr<float>() + r * out->stride(0) : aside;
      work(r, t[r], tile_q ? q[r] : nullptr, written, memory.data());
      if (rounds) round_row(aside, B, static_cast<uint16_t*>(out->data_ptr()) + r * out->stride(0));
    }
  });
}

void fold(const at::Tensor& state, const at::Tensor& tile, const at::Tensor& target, int64_t start, const Shape& shape,
          const MaybeTensor& inverse_temperature, bool at_1, const MaybeTensor& tile_q,
          const std::optional<Shape>& shape_q, const MaybeTensor& out) {
  const Fold kernel(state, Columns(target, start, tile.size(1), inverse_temperature, shape, shape_q), at_1);
  each_row(kernel.columns.forms, tile, tile_q, kernel.columns.scratch(), out, std::bind_front(&Fold::row, &kernel));
}

void mixture(const at::Tensor& state, const at::Tensor& tile, const Shape& shape,
             const MaybeTensor& inverse_temperature, const at::Tensor& tile_q, const Shape& shape_q, double beta) {
  const int64_t R = tile.size(0), B = tile.size(1);
  const Mixture kernel(state, Forms(R, B, inverse_temperature, shape, shape_q), beta);
  each_row(kernel.forms, tile, tile_q, 3 * B, std::nullopt,
           [&](int64_t r, const float* raw, const float* raw_q, float*, float* scratch) {
             kernel.row(r, raw, raw_q, scratch);
           });
}

void grads(const at::Tensor& tile, const at::Tensor& target, int64_t start, const Shape& shape,
           const MaybeTensor& inverse_temperature, const at::Tensor& c, bool at_1, const at::Tensor& out,
           const MaybeTensor& tile_q, const std::optional<Shape>& shape_q, std::optional<double> beta) {
  const Grads kernel(c, Columns(target, start, tile.size(1), inverse_temperature, shape, shape_q), at_1, beta);
  each_row(kernel.columns.forms, tile, tile_q, kernel.columns.scratch(), out, std::bind_front(&Grads::row, &kernel));
}

// tile (R, B) times factor (R,); and in the target's column own (R,).
void rescale(const at::Tensor& tile, const at::Tensor& factor, const at::Tensor& target, int64_t start,
             const at::Tensor& own) {
  const Matrix x = matrix(tile);
  TORCH_CHECK(x.depth_stride == 1 && target.scalar_type() == at::kLong && target.is_contiguous() &&
                  target.numel() == x.rows,
              "tile must have contiguous rows, and target one for each of them");
  check(factor, "factor", {x.rows});
  check(own, "own", {x.rows});
  const int64_t* y = target.const_data_ptr<int64_t>();
  at::parallel_for(0, x.rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float by = factor.const_data_ptr<float>()[r], at_target = own.const_data_ptr<float>()[r];
      const bool here = y[r] >= start && y[r] < start + x.depth;
      if (x.narrow) {
        scale_row(x.row<uint16_t>(r), x.depth, by);
        if (here) round_row(&at_target, 1, x.row<uint16_t>(r) + (y[r] - start));
      } else {
        scale_row(x.row<float>(r), x.depth, by);
        if (here) x.row<float>(r)[y[r] - start] = at_target;
      }
    }
  });
}

// out (M, N) fp32 = left (M, K) @ right (K, N), or out += it.
void product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& out, bool accumulate, bool logits,
             const std::string& named) {
  const Isa isa = isa_named(named);
  const Panels a = packed_left(matrix(left), isa), b = packed_right(matrix(right).transposed(), isa);
  check(out, "out", {a.rows, b.rows});
  TORCH_CHECK(a.depth == b.depth, "left ", left.sizes(), " and right ", right.sizes(), " do not fit");
  at::parallel_for(0, panels_of(a.rows, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    const int64_t row = begin * kPanelRows, rows = std::min(end * kPanelRows, a.rows) - row;
    const Block part{out.data_ptr<float>() + row * out.stride(0), out.stride(0), rows, b.rows};
    multiply(a.panel(begin), b.panel(0), a.units(), isa, part, accumulate, logits ? Sums::kShort : Sums::kLong,
             own_share());
  });
}

Panels pack(const at::Tensor& hidden, const std::string& isa) { return packed_left(matrix(hidden), isa_named(isa)); }

Panels pack_across(const at::Tensor& hidden, const std::string& isa) {
  return packed_right(matrix(hidden).transposed(), isa_named(isa));
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa isa : available()) names.emplace_back(name(isa));
  return names;
}

void fold_products(Room& room, const at::Tensor& state, const at::Tensor& target, int64_t start, const Shape& shape,
                   const MaybeTensor& inverse_temperature, bool at_1, const PythonOperands& p, const MaybeOperands& q,
                   const std::optional<Shape>& shape_q, const MaybeTensor& total, const MaybeTensor& kept) {
  const int64_t B = std::get<1>(p).size(0);
  const Fold kernel(state, Columns(target, start, B, inverse_temperature, shape, shape_q), at_1);
  fold_block(kernel, operands(p), operands(q), room, total, kept);
}

void grads_products(Room& room, const at::Tensor& target, int64_t start, const Shape& shape,
                    const MaybeTensor& inverse_temperature, const at::Tensor& c, bool at_1, const PythonOperands& p,
                    const MaybeOperands& q, const std::optional<Shape>& shape_q, std::optional<double> beta, bool made,
                    const at::Tensor& dlogits, const MaybeTensor& dhidden) {
  const int64_t B = std::get<1>(p).size(0);
  const Grads kernel(c, Columns(target, start, B, inverse_temperature, shape, shape_q), at_1, beta);
  grads_block(kernel, operands(p), operands(q), room, made, dlogits, dhidden);
}

}  // namespace
}  // namespace fastpost

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastpost;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.attr("LAYOUT") = kLayout;
  m.attr("ISAS") = py::cast(isas());
  py::class_<Panels>(m, "Panels");
  py::class_<Room>(m, "Room").def(py::init<>());
  m.def("fold", &fold, unlocked);
  m.def("mixture", &mixture, unlocked);
  m.def("grads", &grads, unlocked);
  m.def("rescale", &rescale, unlocked);
  m.def("product", &product, unlocked);
  m.def("pack", &pack, unlocked);
  m.def("pack_across", &pack_across, unlocked);
  m.def("fold_block", &fold_products, unlocked);
  m.def("grads_block", &grads_products, unlocked);
  m.def("weight_block", &weight_block, unlocked);
  m.def("best_fit", &best_fit, unlocked);
}
