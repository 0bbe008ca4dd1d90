// See rows.h; fastpost/core/rows.py has the formulas.

#include "rows.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "vectors.h"

namespace fastpost {
namespace {

constexpr float kLowest = -1e30f, kNothing = -1e38f;  // a banned logit, a maximum over no column: see rows.py

// The rows of the state and of the coefficients, in the order of rows.py (LAYOUT there, kLayout in module.cpp).
enum State {
  MAX, SUM, TARGET, SUM_Z, SUM_SQ, TOTAL, MAX_Q, SUM_Q, APART_P, APART_Q, MAX_1, SUM_1, P_M, Q_M,
  kStateRows
};
enum Coefficient {
  C_TARGET, C_P, C_PLOGP, C_APART_Q, C_Q, C_PSQ, C_ONE, C_APART_M, C_AT_1,
  C_MAX, C_LOG_SUM, C_MAX_Q, C_LOG_SUM_Q, C_MAX_1, C_LOG_SUM_1, C_LOG_SUM_SQ,
  kCoefficientRows
};

// ---- loops over a row ----

EACH_CPU void add_bias(const float* raw, const float* bias, float scale, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float x = raw[i] + bias[i];
    out[i] = (x < kLowest ? kLowest : x) * scale;
  }
}

EACH_CPU void times(const float* x, float scale, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale;
}

EACH_CPU void cap(const float* x, float softcap, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = softcap * hyperbolic_tangent(x[i] / softcap);
}

// out *= scale (1 - (logit / softcap)^2)
EACH_CPU void times_cap_slope(const float* logit, float softcap, float scale, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float t = logit[i] / softcap;
    out[i] *= scale * (1.0f - t * t);
  }
}

EACH_CPU float maximum(const float* z, int64_t n) {
  float best = kNothing;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) best = z[i] > best ? z[i] : best;
  return best;
}

struct Sums {
  float e = 0, ex = 0, ee = 0, z = 0;
};

// Sums over e = e^x, x = z - max; the e are written out.
EACH_CPU Sums sum_row(const float* z, float max, int64_t n, float* out) {
  float e_sum = 0, ex_sum = 0, ee_sum = 0, z_sum = 0;
#pragma omp simd reduction(+ : e_sum, ex_sum, ee_sum, z_sum)
  for (int64_t i = 0; i < n; ++i) {
    const float x = z[i] - max, e = exponential(x);
    out[i] = e;
    e_sum += e;
    ex_sum += e * x;
    ee_sum += e * e;
    z_sum += z[i];
  }
  return {e_sum, ex_sum, ee_sum, z_sum};
}

// Sums over what is p's and over what is q's.
struct Crossed {
  float p = 0, q = 0;
};

// Those of e (x - xq) and of eq (xq - x). e and eq are what sum_row wrote of p and of q: by the same loop, so that a
// distribution is no distance from itself.
EACH_CPU Crossed sum_across(const float* z, float max, const float* e, const float* zq, float max_q, const float* eq,
                            int64_t n) {
  float p_sum = 0, q_sum = 0;
#pragma omp simd reduction(+ : p_sum, q_sum)
  for (int64_t i = 0; i < n; ++i) {
    const float x = z[i] - max, xq = zq[i] - max_q;
    p_sum += e[i] * (x - xq);
    q_sum += eq[i] * (xq - x);
  }
  return {p_sum, q_sum};
}

// A row's logsumexp in its two parts, which are taken off one after the other: see rows.py.
struct Norm {
  float max, log_sum;
  float log_probability(float z) const { return (z - max) - log_sum; }
};

struct Mixed {
  float p, q, log_p_m, log_q_m;
};

// With g = |log p - log q|, m is the larger of the two times s e^-g + (1 - s), s the share of the smaller. No logarithm
// is taken of m itself, so that a distribution is no distance from its mixture with itself.
inline Mixed mix(float logp, float logq, Shares shares) {
  const bool more_q = logq > logp;
  const float gap = std::fabs(logp - logq), e = exponential(-gap);
  const float larger = -logarithm(more_q ? shares.p * e + shares.q : shares.q * e + shares.p), smaller = larger - gap;
  return {exponential(logp), exponential(logq), more_q ? smaller : larger, more_q ? larger : smaller};
}

// Those of p log p/m and of q log q/m.
EACH_CPU Crossed sum_mixed(const float* z, Norm norm, const float* zq, Norm norm_q, Shares shares, int64_t n) {
  float p_sum = 0, q_sum = 0;
#pragma omp simd reduction(+ : p_sum, q_sum)
  for (int64_t i = 0; i < n; ++i) {
    const Mixed x = mix(norm.log_probability(z[i]), norm_q.log_probability(zq[i]), shares);
    p_sum += x.p * x.log_p_m;
    q_sum += x.q * x.log_q_m;
  }
  return {p_sum, q_sum};
}

// What multiplies 1, p, p log p and p^2 in dL/dz, and, with a reference, p log p/q, q and p log p/m.
struct Slopes {
  float one, p, p_logp, p_p, p_over_q, q, p_over_m;
};

EACH_CPU void grads_row(const float* z, Norm norm, Slopes c, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float logp = norm.log_probability(z[i]), p = exponential(logp);
    out[i] = c.one + p * (c.p + c.p_logp * logp + c.p_p * p);
  }
}

EACH_CPU void grads_row_across(const float* z, Norm norm, Slopes c, const float* zq, Norm norm_q, int64_t n,
                               float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float logp = norm.log_probability(z[i]), p = exponential(logp);
    const float logq = norm_q.log_probability(zq[i]);
    out[i] = c.one + p * (c.p + c.p_logp * logp + c.p_p * p + c.p_over_q * (logp - logq)) + c.q * exponential(logq);
  }
}

EACH_CPU void grads_row_mixed(const float* z, Norm norm, Slopes c, const float* zq, Norm norm_q, Shares shares,
                              int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float logp = norm.log_probability(z[i]), logq = norm_q.log_probability(zq[i]);
    const Mixed x = mix(logp, logq, shares);
    const float across = c.p_over_q * (logp - logq) + c.p_over_m * x.log_p_m;
    out[i] = c.one + x.p * (c.p + c.p_logp * logp + c.p_p * x.p + across) + c.q * x.q;
  }
}

// out -= c softmax(z)
EACH_CPU void subtract_softmax(const float* z, Norm norm, float c, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] -= c * exponential(norm.log_probability(z[i]));
}

EACH_CPU void scale_all(uint16_t* x, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = to_bf16(std::bit_cast<float>(uint32_t(x[i]) << 16) * factor);
}

EACH_CPU void round_all(const float* x, int64_t n, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(x[i]);
}

}  // namespace

// ---- a row of a block ----

Form::Form(const Shape& shape, int64_t columns) : scale_(std::get<1>(shape)), softcap_(std::get<2>(shape).value_or(0)) {
  if (const MaybeTensor& bias = std::get<0>(shape)) {
    bias_ = bias->to(at::kFloat).contiguous();
    check(bias_, "bias", {columns});
  }
}

const float* Form::logits(const float* raw, int64_t columns, float* out) const {
  if (bias_.defined())
    add_bias(raw, bias_.const_data_ptr<float>(), scale_, columns, out);
  else if (scale_ != 1.0f)
    times(raw, scale_, columns, out);
  else if (!softcap_)
    return raw;
  else
    std::copy(raw, raw + columns, out);
  if (softcap_) cap(out, softcap_, columns, out);
  return out;
}

void Form::times_slope(const float* logits, int64_t columns, bool by_scale, float* out) const {
  const float scale = by_scale ? scale_ : 1.0f;
  if (softcap_)
    times_cap_slope(logits, softcap_, scale, columns, out);
  else if (scale != 1.0f)
    times(out, scale, columns, out);
}

Forms::Forms(int64_t rows, int64_t columns, const MaybeTensor& inverse, const Shape& shape,
             const std::optional<Shape>& shape_q)
    : rows(rows), columns(columns), p(shape, columns) {
  if (inverse) check(*inverse, "inverse_temperature", {rows});
  inverse_temperature = inverse ? inverse->const_data_ptr<float>() : nullptr;
  if (shape_q) q.emplace(*shape_q, columns);
}

Row Forms::row(int64_t r, const float* raw, const float* raw_q, float* scratch) const {
  const float* at_1 = p.logits(raw, columns, scratch);
  const float* z = tempered(r, at_1, scratch + columns);
  float* out = scratch + 2 * columns;
  return {at_1, z, raw_q ? tempered(r, q->logits(raw_q, columns, out), out) : nullptr};
}

const float* Forms::tempered(int64_t r, const float* logits, float* out) const {
  if (!inverse_temperature) return logits;
  times(logits, inverse_temperature[r], columns, out);
  return out;
}

Columns::Columns(const at::Tensor& targets, int64_t first, int64_t count, const MaybeTensor& inverse,
                 const Shape& shape, const std::optional<Shape>& shape_q)
    : start(first), forms(targets.numel(), count, inverse, shape, shape_q) {
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.is_contiguous(),
              "target must be a contiguous int64 tensor, got ", targets.scalar_type(), " ", targets.sizes());
  target = targets.const_data_ptr<int64_t>();
}

Fold::Fold(const at::Tensor& state, Columns shared, bool at_1) : columns(std::move(shared)), at_1_(at_1) {
  check(state, "state", {kStateRows, columns.forms.rows});
  state_ = state.data_ptr<float>();
  stride_ = state.stride(0);
}

float Fold::row(int64_t r, const float* raw, const float* raw_q, float* out, float* scratch) const {
  const int64_t B = columns.forms.columns;
  const auto at = [&](State slot) -> float& { return state_[slot * stride_ + r]; };
  const auto [logits, z, zq] = columns.forms.row(r, raw, raw_q, scratch);
  float* e = scratch + 4 * B;  // not yet out, which may be what is still to be read
  if (columns.has(r)) at(TARGET) = logits[columns.target[r] - columns.start];
  if (at_1_) {
    const float max = std::max(at(MAX_1), maximum(logits, B));
    at(SUM_1) = at(SUM_1) * std::exp(at(MAX_1) - max) + sum_row(logits, max, B, e).e;
    at(MAX_1) = max;
  }
  const float max = std::max(at(MAX), maximum(z, B));
  const float shift = at(MAX) - max, decay = std::exp(shift);
  const Sums sums = sum_row(z, max, B, e);
  if (zq) {
    float* eq = scratch + 3 * B;
    const float max_q = std::max(at(MAX_Q), maximum(zq, B));
    const float shift_q = at(MAX_Q) - max_q, decay_q = std::exp(shift_q);
    const Sums sums_q = sum_row(zq, max_q, B, eq);
    const Crossed cross = sum_across(z, max, e, zq, max_q, eq, B);
    at(APART_P) = (at(APART_P) + (shift - shift_q) * at(SUM)) * decay + cross.p;
    at(APART_Q) = (at(APART_Q) + (shift_q - shift) * at(SUM_Q)) * decay_q + cross.q;
    at(SUM_Q) = at(SUM_Q) * decay_q + sums_q.e;
    at(MAX_Q) = max_q;
  }
  at(SUM_Z) = (at(SUM_Z) + shift * at(SUM)) * decay + sums.ex;
  at(SUM_SQ) = at(SUM_SQ) * decay * decay + sums.ee;
  at(TOTAL) += sums.z;
  at(SUM) = at(SUM) * decay + sums.e;
  at(MAX) = max;
  columns.forms.p.times_slope(logits, B, false, e);
  if (columns.has(r)) e[columns.target[r] - columns.start] = 0.0f;
  std::copy(e, e + B, out);
  return decay;
}

Mixture::Mixture(const at::Tensor& state, Forms shared, double beta) : forms(std::move(shared)), shares_(beta) {
  check(state, "state", {kStateRows, forms.rows});
  state_ = state.data_ptr<float>();
  stride_ = state.stride(0);
}

void Mixture::row(int64_t r, const float* raw, const float* raw_q, float* scratch) const {
  const auto at = [&](State slot) -> float& { return state_[slot * stride_ + r]; };
  const auto [_, z, zq] = forms.row(r, raw, raw_q, scratch);
  const Norm norm{at(MAX), std::log(at(SUM))}, norm_q{at(MAX_Q), std::log(at(SUM_Q))};
  const Crossed sums = sum_mixed(z, norm, zq, norm_q, shares_, forms.columns);
  at(P_M) += sums.p;
  at(Q_M) += sums.q;
}

Grads::Grads(const at::Tensor& c, Columns shared, bool at_1, std::optional<double> beta)
    : columns(std::move(shared)), at_1_(at_1) {
  if (beta) shares_.emplace(*beta);
  check(c, "c", {kCoefficientRows, columns.forms.rows});
  c_ = c.const_data_ptr<float>();
  stride_ = c.stride(0);
}

void Grads::row(int64_t r, const float* raw, const float* raw_q, float* out, float* scratch) const {
  const int64_t B = columns.forms.columns;
  const auto at = [&](Coefficient slot) { return c_[slot * stride_ + r]; };
  const auto [logits, z, zq] = columns.forms.row(r, raw, raw_q, scratch);
  // p^2 / sum p^2 = p * p / sum p^2: no second exponential
  const float p_p = at(C_PSQ) * std::exp(-at(C_LOG_SUM_SQ));
  const Slopes slopes{at(C_ONE), at(C_P), at(C_PLOGP), p_p, at(C_APART_Q), at(C_Q), at(C_APART_M)};
  const Norm norm{at(C_MAX), at(C_LOG_SUM)}, norm_q{at(C_MAX_Q), at(C_LOG_SUM_Q)};
  float* d = scratch + 3 * B;  // not yet out, which may be what is still to be read
  if (!zq)
    grads_row(z, norm, slopes, B, d);
  else if (shares_)
    grads_row_mixed(z, norm, slopes, zq, norm_q, *shares_, B, d);
  else
    grads_row_across(z, norm, slopes, zq, norm_q, B, d);
  if (columns.has(r)) d[columns.target[r] - columns.start] += at(C_TARGET);
  if (columns.forms.inverse_temperature) times(d, columns.forms.inverse_temperature[r], B, d);
  if (at_1_) {
    subtract_softmax(logits, {at(C_MAX_1), at(C_LOG_SUM_1)}, at(C_AT_1), B, d);
    if (columns.has(r)) d[columns.target[r] - columns.start] += at(C_AT_1);
  }
  columns.forms.p.times_slope(logits, B, true, d);
  std::copy(d, d + B, out);
}

void scale_row(uint16_t* x, int64_t n, float factor) { scale_all(x, n, factor); }
void scale_row(float* x, int64_t n, float factor) { times(x, factor, n, x); }

void round_row(const float* x, int64_t n, uint16_t* out) { round_all(x, n, out); }

void check(const at::Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && x.sizes() == shape && x.stride(-1) == 1, name,
              " must be an fp32 tensor of shape ", shape, " on the CPU with contiguous rows, got ", x.scalar_type(),
              " ", x.sizes(), " with strides ", x.strides());
}

}  // namespace fastpost
