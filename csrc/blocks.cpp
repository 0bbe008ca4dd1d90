// See blocks.h.

#include "blocks.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "gemm.h"
#include "vectors.h"

namespace fastpost {
namespace {

constexpr int64_t kPanelsTogether = 8;  // of rows, whose tile stays in the second-level cache

const uint32_t* panels(const at::Tensor& packed) {
  return reinterpret_cast<const uint32_t*>(packed.const_data_ptr<int32_t>());
}

at::Tensor floats(int64_t n) { return at::empty({n}, at::kFloat); }
at::Tensor units(int64_t n) { return at::empty({n}, at::kInt); }
uint32_t* data(at::Tensor& units) { return reinterpret_cast<uint32_t*>(units.data_ptr<int32_t>()); }

Block block(const at::Tensor& x, int64_t row, int64_t rows) {
  return {x.data_ptr<float>() + row * x.stride(0), x.stride(0), rows, x.size(1)};
}

void check_bf16(const at::Tensor& x, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns &&
                  x.stride(1) == 1,
              name, " must be a bf16 tensor of shape [", rows, ", ", columns, "] with contiguous rows, got ",
              x.scalar_type(), " ", x.sizes(), " with strides ", x.strides());
}

EACH_CPU void shrink(float* row, int64_t n, float by) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] *= by;
}

// The raw products of one distribution, some rows at a time.
class Products {
 public:
  Products(const Operands& x, int64_t rows, const at::Tensor* packed_weight, bool made)
      : x_(x), depth_(x.weight.size(1)), columns_(x.weight.size(0)), made_(made) {
    if (x.held) check(*x.held, "held", {rows, columns_});
    if (!made) right_ = packed_weight ? *packed_weight : packed_right(matrix(x.weight));
  }

  const at::Tensor& packed_weight() const { return right_; }
  int64_t scratch() const { return x_.held ? 0 : kPanelsTogether * kPanelRows * columns_; }

  // Rows [row, row + rows), which begin a panel.
  Block tile(int64_t row, int64_t rows, float* scratch) const {
    const Block out = x_.held ? block(*x_.held, row, rows) : Block{scratch, columns_, rows, columns_};
    if (!made_) multiply(panels(x_.left) + row * units_of(depth_), panels(right_), depth_, out, false, Sums::kShort);
    return out;
  }

 private:
  const Operands& x_;
  int64_t depth_, columns_;
  bool made_;
  at::Tensor right_;
};

std::optional<Products> products_of(const std::optional<Operands>& q, const Operands& p, const Products& of_p,
                                    int64_t rows, bool made) {
  if (!q) return std::nullopt;
  const bool same = q->weight.data_ptr() == p.weight.data_ptr() && q->weight.sizes() == p.weight.sizes();
  return std::make_optional<Products>(*q, rows, same ? &of_p.packed_weight() : nullptr, made);
}

// body(first row, rows) for groups of whole panels, in parallel.
template <typename Body>
void each_group(int64_t rows, const Body& groups) {
  at::parallel_for(0, panels_of(rows, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    // Alike, since the right operand is brought in for each.
    const int64_t count = (end - begin + kPanelsTogether - 1) / kPanelsTogether;
    const int64_t each = (end - begin + count - 1) / count;
    groups([&](const auto& body) {
      for (int64_t p = begin; p < end; p += each) {
        const int64_t row = p * kPanelRows;
        body(row, std::min({each * kPanelRows, (end - p) * kPanelRows, rows - row}));
      }
    });
  });
}

}  // namespace

void fold_block(const Fold& fold, const Operands& p, const std::optional<Operands>& q, const MaybeTensor& total,
                const MaybeTensor& kept) {
  const int64_t R = fold.columns.forms.rows, B = fold.columns.forms.columns, D = p.weight.size(1);
  const Products products(p, R, nullptr, false);
  const std::optional<Products> products_q = products_of(q, p, products, R, false);
  const at::Tensor right = total ? packed_right(matrix(p.weight).transposed()) : at::Tensor();
  if (total) check(*total, "total", {R, D});
  if (kept) check_bf16(*kept, "kept", R, B);

  each_group(R, [&](const auto& each) {
    constexpr int64_t kRows = kPanelsTogether * kPanelRows;
    at::Tensor tiles = floats(products.scratch() + (products_q ? products_q->scratch() : 0));
    at::Tensor scratch = floats(fold.columns.scratch() + B);
    at::Tensor aside = kept ? *kept : at::empty({kRows, B}, at::kBFloat16), left = units(kRows * units_of(B));
    float* e = scratch.data_ptr<float>() + fold.columns.scratch();
    each([&](int64_t row, int64_t rows) {
      const Matrix rounded = matrix(aside).part(kept ? row : 0, rows);
      const Block tile = products.tile(row, rows, tiles.data_ptr<float>());
      float* beside = tiles.data_ptr<float>() + products.scratch();
      const Block tile_q = products_q ? products_q->tile(row, rows, beside) : Block{};
      for (int64_t i = 0; i < rows; ++i) {
        const float* raw_q = products_q ? tile_q.data + i * tile_q.stride : nullptr;
        const float decay = fold.row(row + i, tile.data + i * tile.stride, raw_q, e, scratch.data_ptr<float>());
        if (total || kept) round_row(e, B, rounded.row(i));
        if (total && decay != 1.0f) shrink(block(*total, row + i, 1).data, D, decay);
      }
      if (!total) return;
      pack_left(rounded, data(left));
      multiply(data(left), panels(right), B, block(*total, row, rows), true, Sums::kLong);
    });
  });
}

void grads_block(const Grads& grads, const Operands& p, const std::optional<Operands>& q, bool made,
                 const at::Tensor& dlogits, const MaybeTensor& dhidden) {
  const int64_t R = grads.columns.forms.rows, B = grads.columns.forms.columns, D = p.weight.size(1);
  const Products products(p, R, nullptr, made);
  const std::optional<Products> products_q = products_of(q, p, products, R, made);
  check_bf16(dlogits, "dlogits", R, B);
  const Matrix rounded = matrix(dlogits);
  const at::Tensor right = dhidden ? packed_right(matrix(p.weight).transposed()) : at::Tensor();
  if (dhidden) check(*dhidden, "dhidden", {R, D});

  each_group(R, [&](const auto& each) {
    at::Tensor tiles = floats(products.scratch() + (products_q ? products_q->scratch() : 0));
    at::Tensor scratch = floats(grads.columns.scratch() + B);
    at::Tensor left = units(kPanelsTogether * kPanelRows * units_of(B));
    float* d = scratch.data_ptr<float>() + grads.columns.scratch();
    each([&](int64_t row, int64_t rows) {
      const Block tile = products.tile(row, rows, tiles.data_ptr<float>());
      float* beside = tiles.data_ptr<float>() + products.scratch();
      const Block tile_q = products_q ? products_q->tile(row, rows, beside) : Block{};
      for (int64_t i = 0; i < rows; ++i) {
        const float* raw_q = products_q ? tile_q.data + i * tile_q.stride : nullptr;
        grads.row(row + i, tile.data + i * tile.stride, raw_q, d, scratch.data_ptr<float>());
        round_row(d, B, rounded.row(row + i));
      }
      if (!dhidden) return;
      pack_left(rounded.part(row, rows), data(left));
      multiply(data(left), panels(right), B, block(*dhidden, row, rows), true, Sums::kLong);
    });
  });
}

void weight_block(const at::Tensor& dlogits, const at::Tensor& hidden, const at::Tensor& dweight, bool fresh) {
  const int64_t R = dlogits.size(0), B = dlogits.size(1), D = dweight.size(1);
  const bool rounds = dweight.scalar_type() == at::kBFloat16;
  check_bf16(dlogits, "dlogits", R, B);
  rounds ? check_bf16(dweight, "dweight", B, D) : check(dweight, "dweight", {B, D});
  TORCH_CHECK(fresh || !rounds, "a bf16 dweight must be fresh: nothing adds up in it");
  TORCH_CHECK(hidden.sizes() == at::IntArrayRef({panels_of(D, kPanelColumns), units_of(R) * kPanelColumns}),
              "hidden must be packed across, with ", R, " rows and ", D, " columns, got ", hidden.sizes());
  const Matrix columns = matrix(dlogits).transposed();
  // What lies where the results go is read before the first of them.
  const bool inside = dlogits.is_alias_of(dweight);
  const at::Tensor all = inside ? packed_left(columns) : at::Tensor();

  each_group(B, [&](const auto& each) {
    constexpr int64_t kColumns = kPanelsTogether * kPanelRows;
    at::Tensor some = units(inside ? 0 : kColumns * units_of(R)), sums = floats(rounds ? kColumns * D : 0);
    each([&](int64_t column, int64_t count) {
      if (!inside) pack_left(columns.part(column, count), data(some));
      const uint32_t* left = inside ? panels(all) + column * units_of(R) : data(some);
      const Block out = rounds ? Block{sums.data_ptr<float>(), D, count, D} : block(dweight, column, count);
      multiply(left, panels(hidden), R, out, !fresh, Sums::kLong);
      for (int64_t i = 0; rounds && i < count; ++i)
        round_row(out.data + i * D, D, matrix(dweight).row(column + i));
    });
  });
}

}  // namespace fastpost
