// See blocks.h.

#include "blocks.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "vectors.h"

namespace fastpost {
namespace {

constexpr int64_t kPanelsTogether = 8;  // of rows, whose tile stays in the second-level cache

at::Tensor floats(int64_t n) { return at::empty({n}, at::kFloat); }
at::Tensor units(int64_t n) { return at::empty({n}, at::kInt); }
uint32_t* data(at::Tensor& units) { return reinterpret_cast<uint32_t*>(units.data_ptr<int32_t>()); }

Block block(const at::Tensor& x, int64_t row, int64_t rows) {
  return {x.data_ptr<float>() + row * x.stride(0), x.stride(0), rows, x.size(1)};
}

// bf16 or fp32, of this shape.
Matrix operand(const at::Tensor& x, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK((x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat) && x.dim() == 2 &&
                  x.size(0) == rows && x.size(1) == columns && x.stride(1) == 1,
              name, " must be a bf16 or fp32 tensor of shape [", rows, ", ", columns, "] with contiguous rows, got ",
              x.scalar_type(), " ", x.sizes(), " with strides ", x.strides());
  return matrix(x);
}

// Where row i of an operand is made in fp32: in place, unless it is to be rounded by `finish`.
float* begin_row(const Matrix& x, int64_t i, float* aside) { return x.narrow ? aside : x.row<float>(i); }
void finish_row(const Matrix& x, int64_t i, const float* aside) {
  if (x.narrow) round_row(aside, x.depth, x.row<uint16_t>(i));
}

EACH_CPU void shrink(float* row, int64_t n, float by) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] *= by;
}

// The raw products of one distribution, some rows at a time.
class Products {
 public:
  Products(const Operands& x, int64_t rows, const Panels* packed_weight, at::Tensor& room, bool made)
      : x_(x), made_(made) {
    if (x.held) check(*x.held, "held", {rows, columns()});
    if (made) return;
    TORCH_CHECK(x.left.rows == rows && x.left.depth == x.weight.size(1), "hidden must be packed with ", rows,
                " rows and ", x.weight.size(1), " columns, got ", x.left.rows, " and ", x.left.depth);
    right_ = packed_weight ? *packed_weight : packed_right(matrix(x.weight), x.left.isa, &room);
  }

  const Panels& packed_weight() const { return *right_; }
  int64_t columns() const { return x_.weight.size(0); }
  int64_t scratch() const { return x_.held ? 0 : kPanelsTogether * kPanelRows * columns(); }

  // Rows [row, row + rows), which begin a panel.
  Block tile(int64_t row, int64_t rows, float* scratch) const {
    const Block out = x_.held ? block(*x_.held, row, rows) : Block{scratch, columns(), rows, columns()};
    if (!made_)
      multiply(x_.left.panel(row / kPanelRows), right_->panel(0), x_.left.units(), x_.left.isa, out, false,
               Sums::kShort, own_share());
    return out;
  }

 private:
  const Operands& x_;
  bool made_;
  std::optional<Panels> right_;
};

// total (rows, D) += left (rows, B) weight (B, D), for rows of a group.
class Accumulator {
 public:
  Accumulator(const MaybeTensor& total, const char* name, int64_t rows, const Operands& p, at::Tensor& room)
      : total_(total) {
    if (!total) return;
    check(*total, name, {rows, p.weight.size(1)});
    right_ = packed_right(matrix(p.weight).transposed(), p.left.isa, &room);
  }

  explicit operator bool() const { return total_.has_value(); }
  at::Tensor scratch() const {  // for `add`
    return units(total_ ? kPanelsTogether * kPanelRows * right_->units() : 0);
  }
  Block rows(int64_t row, int64_t rows) const { return block(*total_, row, rows); }

  void add(const Matrix& left, int64_t row, at::Tensor& scratch) const {
    if (!total_) return;
    check_units(left, right_->isa);
    pack_left(left, right_->isa, data(scratch));
    multiply(data(scratch), right_->panel(0), right_->units(), right_->isa, rows(row, left.rows), true, Sums::kLong,
             own_share());
  }

 private:
  const MaybeTensor& total_;
  std::optional<Panels> right_;
};

std::optional<Products> products_of(const std::optional<Operands>& q, const Operands& p, const Products& of_p,
                                    int64_t rows, Room& room, bool made) {
  if (!q) return std::nullopt;
  const bool same = q->weight.data_ptr() == p.weight.data_ptr() && q->weight.sizes() == p.weight.sizes();
  return std::make_optional<Products>(*q, rows, same && !made ? &of_p.packed_weight() : nullptr, room.weight_q, made);
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

void fold_block(const Fold& fold, const Operands& p, const std::optional<Operands>& q, Room& room,
                const MaybeTensor& total, const MaybeTensor& kept) {
  const int64_t R = fold.columns.forms.rows, B = fold.columns.forms.columns;
  const Products products(p, R, nullptr, room.weight, false);
  const std::optional<Products> products_q = products_of(q, p, products, R, room, false);
  const Accumulator sums(total, "total", R, p, room.transposed);
  const bool multiplied = sums || kept;  // here or later
  if (kept) operand(*kept, "kept", R, B);

  each_group(R, [&](const auto& each) {
    constexpr int64_t kRows = kPanelsTogether * kPanelRows;
    at::Tensor tiles = floats(products.scratch() + (products_q ? products_q->scratch() : 0));
    at::Tensor scratch = floats(fold.columns.scratch() + B), left = sums.scratch();
    at::Tensor aside = kept ? *kept : at::empty({sums ? kRows : 0, B}, p.weight.scalar_type());
    float* wide = scratch.data_ptr<float>() + fold.columns.scratch();
    each([&](int64_t row, int64_t rows) {
      const Matrix factors = matrix(aside).part(kept ? row : 0, rows);
      const Block tile = products.tile(row, rows, tiles.data_ptr<float>());
      float* beside = tiles.data_ptr<float>() + products.scratch();
      const Block tile_q = products_q ? products_q->tile(row, rows, beside) : Block{};
      for (int64_t i = 0; i < rows; ++i) {
        const float* raw_q = products_q ? tile_q.data + i * tile_q.stride : nullptr;
        float* e = multiplied ? begin_row(factors, i, wide) : wide;
        const float decay = fold.row(row + i, tile.data + i * tile.stride, raw_q, e, scratch.data_ptr<float>());
        if (multiplied) finish_row(factors, i, e);
        if (sums && decay != 1.0f) shrink(sums.rows(row + i, 1).data, p.weight.size(1), decay);
      }
      sums.add(factors, row, left);
    });
  });
}

void grads_block(const Grads& grads, const Operands& p, const std::optional<Operands>& q, Room& room, bool made,
                 const at::Tensor& dlogits, const MaybeTensor& dhidden) {
  const int64_t R = grads.columns.forms.rows, B = grads.columns.forms.columns;
  const Products products(p, R, nullptr, room.weight, made);
  const std::optional<Products> products_q = products_of(q, p, products, R, room, made);
  const Matrix out = operand(dlogits, "dlogits", R, B);
  const Accumulator sums(dhidden, "dhidden", R, p, room.transposed);

  each_group(R, [&](const auto& each) {
    at::Tensor tiles = floats(products.scratch() + (products_q ? products_q->scratch() : 0));
    at::Tensor scratch = floats(grads.columns.scratch() + B), left = sums.scratch();
    float* wide = scratch.data_ptr<float>() + grads.columns.scratch();
    each([&](int64_t row, int64_t rows) {
      const Block tile = products.tile(row, rows, tiles.data_ptr<float>());
      float* beside = tiles.data_ptr<float>() + products.scratch();
      const Block tile_q = products_q ? products_q->tile(row, rows, beside) : Block{};
      for (int64_t i = 0; i < rows; ++i) {
        const float* raw_q = products_q ? tile_q.data + i * tile_q.stride : nullptr;
        float* d = begin_row(out, row + i, wide);
        grads.row(row + i, tile.data + i * tile.stride, raw_q, d, scratch.data_ptr<float>());
        finish_row(out, row + i, d);
      }
      sums.add(out.part(row, rows), row, left);
    });
  });
}

void weight_block(const at::Tensor& dlogits, const Panels& hidden, const at::Tensor& dweight, bool fresh) {
  TORCH_CHECK(dlogits.dim() == 2 && dweight.dim() == 2 && hidden.rows == dweight.size(1) &&
                  hidden.depth == dlogits.size(0),
              "hidden must be packed across, with ", dlogits.size(0), " rows and ", dweight.size(1), " columns, got ",
              hidden.depth, " and ", hidden.rows);
  const int64_t R = hidden.depth, B = dlogits.size(1), D = hidden.rows;
  const Matrix columns = operand(dlogits, "dlogits", R, B).transposed(), out = operand(dweight, "dweight", B, D);
  TORCH_CHECK(fresh || !out.narrow, "a bf16 dweight must be fresh: nothing adds up in it");
  check_units(columns, hidden.isa);
  // What lies where the results go is read before the first of them.
  const std::optional<Panels> all =
      dlogits.is_alias_of(dweight) ? std::make_optional(packed_left(columns, hidden.isa)) : std::nullopt;

  each_group(B, [&](const auto& each) {
    constexpr int64_t kColumns = kPanelsTogether * kPanelRows;
    at::Tensor some = units(all ? 0 : kColumns * hidden.units()), wide = floats(out.narrow ? kColumns * D : 0);
    each([&](int64_t column, int64_t count) {
      if (!all) pack_left(columns.part(column, count), hidden.isa, data(some));
      const uint32_t* left = all ? all->panel(column / kPanelRows) : data(some);
      const Block sums = out.narrow ? Block{wide.data_ptr<float>(), D, count, D} : block(dweight, column, count);
      multiply(left, hidden.panel(0), hidden.units(), hidden.isa, sums, !fresh, Sums::kLong, own_share());
      for (int64_t i = 0; i < count; ++i) finish_row(out, column + i, sums.data + i * sums.stride);
    });
  });
}

}  // namespace fastpost
