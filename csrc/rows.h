// fold, mixture and grads of fastpost/core/rows.py, one row of a block of columns at a time: it is read once from memory and
// worked on in the first-level cache. Every sum costs less than asking for it, so all are kept, wanted or not.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fastpost {

using MaybeTensor = std::optional<at::Tensor>;
// How raw products become logits: softcap * tanh(scale * (raw + bias) / softcap). rows.py's Shape.
using Shape = std::tuple<MaybeTensor, double, std::optional<double>>;

class Form {
 public:
  Form(const Shape& shape, int64_t columns);
  // Logits at temperature 1, in `out` unless they are the raw products themselves.
  const float* logits(const float* raw, int64_t columns, float* out) const;
  // out *= dlogit/draw, from the logits; `by_scale` leaves the scale out if false.
  void times_slope(const float* logits, int64_t columns, bool by_scale, float* out) const;

 private:
  at::Tensor bias_;  // fp32 (columns,), or undefined
  float scale_, softcap_;  // no cap: 0
};

// A row of logits, and of its reference's.
struct Row {
  const float* at_1;  // p's at temperature 1
  const float* z;     // the same over the temperature
  const float* zq;    // q's, or null
};

// What all rows of a block share: how their raw products become logits.
struct Forms {
  Forms(int64_t rows, int64_t columns, const MaybeTensor& inverse_temperature, const Shape& shape,
        const std::optional<Shape>& shape_q);
  // Row r, in up to 3 * columns of scratch; raw_q may be null.
  Row row(int64_t r, const float* raw, const float* raw_q, float* scratch) const;

  int64_t rows, columns;
  const float* inverse_temperature;  // (R,) or null
  Form p;
  std::optional<Form> q;

 private:
  const float* tempered(int64_t r, const float* logits, float* out) const;
};

// And where their targets are.
struct Columns {
  Columns(const at::Tensor& target, int64_t start, int64_t columns, const MaybeTensor& inverse_temperature,
          const Shape& shape, const std::optional<Shape>& shape_q);
  bool has(int64_t r) const { return target[r] >= start && target[r] < start + forms.columns; }
  int64_t scratch() const { return 5 * forms.columns; }

  const int64_t* target;  // (R,)
  int64_t start;
  Forms forms;
};

class Fold {
 public:
  Fold(const at::Tensor& state, Columns columns, bool at_1);  // state: (14, R), updated
  // Row r: out becomes e^(z - max) dz/dlogit, 0 in the target's own column; it may be raw. Returns by what
  // earlier such rows shrink.
  float row(int64_t r, const float* raw, const float* raw_q, float* out, float* scratch) const;

  const Columns columns;

 private:
  float* state_;
  int64_t stride_;
  bool at_1_;
};

// m = b q + (1 - b) p. (Rounded, they still add up to 1.)
struct Shares {
  explicit Shares(double beta) : q(float(beta)), p(float(1.0 - beta)) {}
  float q, p;
};

class Mixture {
 public:
  Mixture(const at::Tensor& state, Forms forms, double beta);  // state: (14, R), updated
  // Row r, whose maxima and sums are whole. Scratch as of Forms.
  void row(int64_t r, const float* raw, const float* raw_q, float* scratch) const;

  const Forms forms;

 private:
  float* state_;
  int64_t stride_;
  Shares shares_;
};

class Grads {
 public:
  // c: (16, R); beta, if the JSD has a gradient.
  Grads(const at::Tensor& c, Columns columns, bool at_1, std::optional<double> beta);
  // Row r: out becomes dL/draw. It may be raw.
  void row(int64_t r, const float* raw, const float* raw_q, float* out, float* scratch) const;

  const Columns columns;

 private:
  const float* c_;
  int64_t stride_;
  bool at_1_;
  std::optional<Shares> shares_;
};

// A bf16 or fp32 row times a factor.
void scale_row(uint16_t* x, int64_t n, float factor);
void scale_row(float* x, int64_t n, float factor);

// out = x in bf16
void round_row(const float* x, int64_t n, uint16_t* out);

// Throws unless x is an fp32 tensor of this shape on the CPU with contiguous rows: what pointers take for granted.
void check(const at::Tensor& x, const char* name, at::IntArrayRef shape);

}  // namespace fastpost
