// What Python sees: fastpost/_native.pyi has the types, fastpost/native.py the use.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <functional>

#include "blocks.h"
#include "gemm.h"
#include "rows.h"

namespace fastpost {
namespace {

constexpr int kLayout = 6;  // of the state, of the coefficients and of the arguments; LAYOUT in rows.py
constexpr int64_t kRowsPerTask = 8;

using PythonOperands = std::tuple<at::Tensor, at::Tensor, MaybeTensor>;
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

// tile (R, B) bf16 times factor (R,); and in the target's column own (R,).
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
      scale_row(x.row(r), x.depth, factor.const_data_ptr<float>()[r]);
      if (y[r] >= start && y[r] < start + x.depth)
        round_row(own.const_data_ptr<float>() + r, 1, x.row(r) + (y[r] - start));
    }
  });
}

// out (M, N) fp32 = left (M, K) @ right (K, N), bf16, or out += it.
void product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& out, bool accumulate, bool logits) {
  const Matrix a = matrix(left), b = matrix(right).transposed();
  check(out, "out", {a.rows, b.rows});
  TORCH_CHECK(a.depth == b.depth, "left ", left.sizes(), " and right ", right.sizes(), " do not fit");
  const at::Tensor packed = packed_left(a), others = packed_right(b);
  const auto units = [](const at::Tensor& x) { return reinterpret_cast<const uint32_t*>(x.const_data_ptr<int32_t>()); };
  at::parallel_for(0, panels_of(a.rows, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    const int64_t row = begin * kPanelRows, rows = std::min(end * kPanelRows, a.rows) - row;
    const Block part{out.data_ptr<float>() + row * out.stride(0), out.stride(0), rows, b.rows};
    multiply(units(packed) + row * units_of(a.depth), units(others), a.depth, part, accumulate,
             logits ? Sums::kShort : Sums::kLong);
  });
}

void fold_products(const at::Tensor& state, const at::Tensor& target, int64_t start, const Shape& shape,
                   const MaybeTensor& inverse_temperature, bool at_1, const PythonOperands& p, const MaybeOperands& q,
                   const std::optional<Shape>& shape_q, const MaybeTensor& total, const MaybeTensor& kept) {
  const int64_t B = std::get<1>(p).size(0);
  const Fold kernel(state, Columns(target, start, B, inverse_temperature, shape, shape_q), at_1);
  fold_block(kernel, operands(p), operands(q), total, kept);
}

void grads_products(const at::Tensor& target, int64_t start, const Shape& shape, const MaybeTensor& inverse_temperature,
                    const at::Tensor& c, bool at_1, const PythonOperands& p, const MaybeOperands& q,
                    const std::optional<Shape>& shape_q, std::optional<double> beta, bool made,
                    const at::Tensor& dlogits, const MaybeTensor& dhidden) {
  const int64_t B = std::get<1>(p).size(0);
  const Grads kernel(c, Columns(target, start, B, inverse_temperature, shape, shape_q), at_1, beta);
  grads_block(kernel, operands(p), operands(q), made, dlogits, dhidden);
}

}  // namespace
}  // namespace fastpost

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastpost;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.attr("LAYOUT") = kLayout;
  m.def("multiplies_bf16", &multiplies_bf16);
  m.def("fold", &fold, unlocked);
  m.def("mixture", &mixture, unlocked);
  m.def("grads", &grads, unlocked);
  m.def("rescale", &rescale, unlocked);
  m.def("product", &product, unlocked);
  m.def("pack", [](const at::Tensor& x) { return packed_left(matrix(x)); }, unlocked);
  m.def("pack_across", [](const at::Tensor& x) { return packed_right(matrix(x).transposed()); }, unlocked);
  m.def("fold_block", &fold_products, unlocked);
  m.def("grads_block", &grads_products, unlocked);
  m.def("weight_block", &weight_block, unlocked);
}
