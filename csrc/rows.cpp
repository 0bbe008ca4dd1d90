// fold and grads of fastpost/rows.py for a CPU: a row is read once from memory and worked on in the first-level cache,
// where torch passes over the tile once for each operation.
//
// fp32 tiles, and logits that are the raw products (no bias, scale or cap). Every sum costs less than asking for it, so
// all are kept, wanted or not. fastpost/native.py has the class, and what falls to torch.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

// One binary for every x86-64: the loader picks AVX-512, AVX2 or SSE2. A compiler that cannot do that must not build it,
// since torch's own kernels would be faster than these without vectors; the install then goes on with those.
#if !defined(__x86_64__)
#define EACH_CPU
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#error "on x86-64 this file wants GCC 12 or newer, for target_clones"
#endif

namespace {

constexpr int kLayout = 2;  // of the two lists below; LAYOUT in rows.py
constexpr float kLowest = -1e30f;
constexpr int64_t kRowsPerTask = 8;

// The rows of the state and of the coefficients, in the order of rows.py.
enum State {
  MAX, SUM, TARGET, SUM_Z, SUM_SQ, TOTAL, MAX_Q, SUM_Q, APART_P, APART_Q, MAX_1, SUM_1, P_M, Q_M,
  kStateRows
};
enum Coefficient {
  C_TARGET, C_P, C_PLOGP, C_APART_Q, C_Q, C_PSQ, C_ONE, C_APART_M, C_AT_1,
  C_MAX, C_LOG_SUM, C_MAX_Q, C_LOG_SUM_Q, C_MAX_1, C_LOG_SUM_1, C_LOG_SUM_SQ,
  kCoefficientRows
};

// e^x for x <= 0, or above it by rounding: 2^n e^r with |r| <= log(2) / 2 and Cephes' polynomial for e^r, within 1 ulp.
// Below -87 it is 0 (e^x would soon be subnormal), and NaN stays NaN. No table and no branch, so that loops vectorise.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);  // 2^n
  return x < -87.0f ? 0.0f : y * power;
}

// ---- one row ----

struct Row {
  const float* logit;  // (n,) at temperature 1
  float slope;         // one over the temperature: z = slope * logit
};

EACH_CPU float maximum(Row a, int64_t n) {
  float best = kLowest;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) {
    const float z = a.logit[i] * a.slope;
    best = z > best ? z : best;
  }
  return best;
}

struct Sums {
  float e = 0, ex = 0, ee = 0, z = 0;
};

// Sums over e = e^x, x = z - max; the e are written out.
EACH_CPU Sums fold_row(Row a, float max, int64_t n, float* out) {
  float e_sum = 0, ex_sum = 0, ee_sum = 0, z_sum = 0;
#pragma omp simd reduction(+ : e_sum, ex_sum, ee_sum, z_sum)
  for (int64_t i = 0; i < n; ++i) {
    const float z = a.logit[i] * a.slope;
    const float x = z - max, e = exponential(x);
    out[i] = e;
    e_sum += e;
    ex_sum += e * x;
    ee_sum += e * e;
    z_sum += z;
  }
  return {e_sum, ex_sum, ee_sum, z_sum};
}

struct Crossed {
  float eq = 0, apart_p = 0, apart_q = 0;  // sums of eq, e (x - xq) and eq (xq - x)
};

// Sums over the reference's eq = e^xq, xq = zq - maxq, and across; e is what fold_row wrote.
EACH_CPU Crossed fold_across(Row a, float max, Row q, float max_q, const float* written, int64_t n) {
  float eq_sum = 0, p_sum = 0, q_sum = 0;
#pragma omp simd reduction(+ : eq_sum, p_sum, q_sum)
  for (int64_t i = 0; i < n; ++i) {
    const float x = a.logit[i] * a.slope - max, xq = q.logit[i] * q.slope - max_q;
    const float eq = exponential(xq);
    eq_sum += eq;
    p_sum += written[i] * (x - xq);
    q_sum += eq * (xq - x);
  }
  return {eq_sum, p_sum, q_sum};
}

// A row's logsumexp in its two parts, which are taken off one after the other: see rows.py.
struct Norm {
  float max, log_sum;
  float log_probability(float z) const { return (z - max) - log_sum; }
};

// What multiplies 1, p, p log p and p^2 in dL/dz.
struct Slopes {
  float one, p, p_logp, p_p;
};

EACH_CPU void grads_row(Row a, Norm a_norm, Slopes c, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float logp = a_norm.log_probability(a.logit[i] * a.slope), p = exponential(logp);
    out[i] = (c.one + p * (c.p + c.p_logp * logp + c.p_p * p)) * a.slope;
  }
}

// The same with a reference: p log p/q and q have their multipliers too.
EACH_CPU void grads_row_across(Row a, Norm a_norm, Slopes c, Row q, Norm q_norm, float apart_q, float c_q, int64_t n,
                               float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float logp = a_norm.log_probability(a.logit[i] * a.slope), p = exponential(logp);
    const float logq = q_norm.log_probability(q.logit[i] * q.slope);
    const float d = c.one + p * (c.p + c.p_logp * logp + c.p_p * p + apart_q * (logp - logq)) + c_q * exponential(logq);
    out[i] = d * a.slope;
  }
}

// out -= c softmax(logit)
EACH_CPU void subtract_softmax(const float* logit, Norm norm, float c, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] -= c * exponential(norm.log_probability(logit[i]));
}

// ---- tiles ----

using MaybeTensor = std::optional<at::Tensor>;

// fp32 of this shape with contiguous rows: what the pointers below take for granted.
void check(const at::Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && x.sizes() == shape && x.stride(-1) == 1, name,
              " must be an fp32 tensor of shape ", shape, " on the CPU with contiguous rows, got ", x.scalar_type(),
              " ", x.sizes(), " with strides ", x.strides());
}

void check_target(const at::Tensor& target, int64_t rows) {
  TORCH_CHECK(target.scalar_type() == at::kLong && target.is_contiguous() && target.numel() == rows,
              "target must be a contiguous int64 tensor of shape [", rows, "], got ", target.scalar_type(), " ",
              target.sizes());
}

struct Tile {
  explicit Tile(const at::Tensor& x) : data(x.data_ptr<float>()), stride(x.stride(0)) {}
  float* row(int64_t r) const { return data + r * stride; }
  float* data;
  int64_t stride;
};

template <typename Work>  // void(r, scratch (B,))
void each_row(int64_t rows, int64_t columns, const Work& work) {
  at::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(columns);
    for (int64_t r = begin; r < end; ++r) work(r, scratch.data());
  });
}

// state is (14, R), `at_1`: the sums of "logp@1" too. The rest as in rows.py.
void fold(const at::Tensor& state, const at::Tensor& tile, const at::Tensor& target, int64_t start,
          const MaybeTensor& inverse_temperature, bool at_1, const MaybeTensor& tile_q, const MaybeTensor& out) {
  const int64_t R = tile.size(0), B = tile.size(1);
  check(tile, "tile", {R, B});
  check(state, "state", {kStateRows, R});
  check_target(target, R);
  if (inverse_temperature) check(*inverse_temperature, "inverse_temperature", {R});
  if (tile_q) check(*tile_q, "tile_q", {R, B});
  if (out) check(*out, "out", {R, B});
  const Tile s(state), t(tile), q(tile_q.value_or(tile)), o(out.value_or(tile));
  const int64_t* y = target.data_ptr<int64_t>();
  const float* inverse = inverse_temperature ? inverse_temperature->data_ptr<float>() : nullptr;

  each_row(R, B, [&](int64_t r, float* scratch) {
    const Row a{t.row(r), inverse ? inverse[r] : 1.0f};
    const auto at = [&](State slot) -> float& { return s.row(slot)[r]; };
    if (y[r] >= start && y[r] < start + B) at(TARGET) = a.logit[y[r] - start];
    if (at_1) {
      const float max = std::max(at(MAX_1), maximum({a.logit, 1.0f}, B));
      at(SUM_1) = at(SUM_1) * std::exp(at(MAX_1) - max) + fold_row({a.logit, 1.0f}, max, B, scratch).e;
      at(MAX_1) = max;
    }
    float* e = out ? o.row(r) : scratch;
    const float max = std::max(at(MAX), maximum(a, B));
    const float shift = at(MAX) - max, decay = std::exp(shift);
    const Sums sums = fold_row(a, max, B, e);
    if (tile_q) {
      const Row b{q.row(r), a.slope};
      const float max_q = std::max(at(MAX_Q), maximum(b, B));
      const float shift_q = at(MAX_Q) - max_q, decay_q = std::exp(shift_q);
      const Crossed cross = fold_across(a, max, b, max_q, e, B);
      at(APART_P) = (at(APART_P) + (shift - shift_q) * at(SUM)) * decay + cross.apart_p;
      at(APART_Q) = (at(APART_Q) + (shift_q - shift) * at(SUM_Q)) * decay_q + cross.apart_q;
      at(SUM_Q) = at(SUM_Q) * decay_q + cross.eq;
      at(MAX_Q) = max_q;
    }
    at(SUM_Z) = (at(SUM_Z) + shift * at(SUM)) * decay + sums.ex;
    at(SUM_SQ) = at(SUM_SQ) * decay * decay + sums.ee;
    at(TOTAL) += sums.z;
    at(SUM) = at(SUM) * decay + sums.e;
    at(MAX) = max;
  });
}

// c is (16, R); out may be the tile. `at_1`: "logp@1" has a gradient.
void grads(const at::Tensor& tile, const at::Tensor& target, int64_t start, const MaybeTensor& inverse_temperature,
           const at::Tensor& c, bool at_1, const at::Tensor& out, const MaybeTensor& tile_q) {
  const int64_t R = tile.size(0), B = tile.size(1);
  check(tile, "tile", {R, B});
  check(c, "c", {kCoefficientRows, R});
  check(out, "out", {R, B});
  check_target(target, R);
  if (inverse_temperature) check(*inverse_temperature, "inverse_temperature", {R});
  if (tile_q) check(*tile_q, "tile_q", {R, B});
  const Tile t(tile), coefficient(c), o(out), q(tile_q.value_or(tile));
  const int64_t* y = target.data_ptr<int64_t>();
  const float* inverse = inverse_temperature ? inverse_temperature->data_ptr<float>() : nullptr;

  each_row(R, B, [&](int64_t r, float* scratch) {
    const Row a{t.row(r), inverse ? inverse[r] : 1.0f};
    const auto at = [&](Coefficient slot) { return coefficient.row(slot)[r]; };
    if (at_1) std::copy(a.logit, a.logit + B, scratch);  // read again after out, which may be the tile, is written
    // p^2 / sum p^2 = p * p / sum p^2: no second exponential
    const Slopes slopes{at(C_ONE), at(C_P), at(C_PLOGP), at(C_PSQ) * std::exp(-at(C_LOG_SUM_SQ))};
    const Norm norm{at(C_MAX), at(C_LOG_SUM)};
    float* d = o.row(r);
    if (tile_q) {
      const Norm q_norm{at(C_MAX_Q), at(C_LOG_SUM_Q)};
      grads_row_across(a, norm, slopes, {q.row(r), a.slope}, q_norm, at(C_APART_Q), at(C_Q), B, d);
    } else {
      grads_row(a, norm, slopes, B, d);
    }
    if (at_1) subtract_softmax(scratch, {at(C_MAX_1), at(C_LOG_SUM_1)}, at(C_AT_1), B, d);
    if (y[r] >= start && y[r] < start + B) d[y[r] - start] += at(C_TARGET) * a.slope + (at_1 ? at(C_AT_1) : 0.0f);
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("LAYOUT") = kLayout;
  m.def("fold", &fold, py::call_guard<py::gil_scoped_release>());
  m.def("grads", &grads, py::call_guard<py::gil_scoped_release>());
}
