// A tile of raw products in a GPU's memory, 8 columns of a row at a time, and how they become logits: what the kernels
// of fold.cu and grads.cu share.
//
// 8 columns are two loads of 16 bytes, and in bf16 one store of 16. Where a row does not start on 16 bytes, or ends,
// they are taken one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

extern "C" {

// Raw products (R, B) and how they become logits: softcap(scale * (raw + bias)).
struct Side {
  const float* raw;
  int64_t stride;
  const float* bias;     // (B,) or null
  float scale, softcap;  // no cap: 0

  bool shaped() const { return bias || softcap > 0; }
};

// The arguments of both kernels; benchmarks/cuda_rows.py has the same.
struct Tile {
  Side p, q;                         // no reference: q.raw is null
  const int64_t* target;             // (R,)
  const float* inverse_temperature;  // (R,) or null
  int64_t rows, columns;
  int64_t start;  // the tile's first column
  void* out;      // (R, B) fp32 or bf16, or null; it may be p.raw
  int64_t out_stride;
  int32_t out_is_bf16;

  bool shaped() const { return p.shaped() || q.shaped(); }
};
}

namespace {

constexpr float kLowest = -1e30f;  // a banned logit: see fastpost/core/rows.py
constexpr float kAbsent = -3e38f;  // a column that is not there: far below a maximum over none
constexpr int kEach = 8;           // columns that a thread takes together

struct Eight {
  float v[kEach];
  __device__ float& operator[](int j) { return v[j]; }
  __device__ float operator[](int j) const { return v[j]; }
};

__device__ inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The first n of 8 numbers; zeros for the others.
__device__ inline Eight load(const float* p, int64_t n) {
  if (n >= kEach && on_16_bytes(p)) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }
  Eight x;
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] = j < n ? p[j] : 0.0f;
  return x;
}

__device__ inline void store(float* p, const Eight& x, int64_t n) {
  if (n >= kEach && on_16_bytes(p)) {
    reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (j < n) p[j] = x[j];
}

__device__ inline void store(__nv_bfloat16* p, const Eight& x, int64_t n) {
  if (n >= kEach && on_16_bytes(p)) {
    __nv_bfloat162 pairs[kEach / 2];
#pragma unroll
    for (int j = 0; j < kEach / 2; ++j) pairs[j] = __floats2bfloat162_rn(x[2 * j], x[2 * j + 1]);
    uint4 y;
    static_assert(sizeof y == sizeof pairs);
    memcpy(&y, pairs, sizeof y);
    *reinterpret_cast<uint4*>(p) = y;
    return;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (j < n) p[j] = __float2bfloat16_rn(x[j]);
}

__device__ inline void times(Eight& x, float factor) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] *= factor;
}

// Only the first n of 8 columns are there.
__device__ inline void clear_beyond(Eight& x, int64_t n) {
  if (n >= kEach) return;
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] = j < n ? x[j] : kAbsent;
}

__device__ inline float inverse_temperature(const Tile& tile, int64_t r) {
  return tile.inverse_temperature ? tile.inverse_temperature[r] : 1.0f;
}

// One row of a side. SHAPED: it has a bias or a cap.
template <bool SHAPED>
struct Row {
  const float* raw;
  const Side& side;

  __device__ Row(const Side& s, int64_t r) : raw(s.raw + r * s.stride), side(s) {}

  __device__ float logit(float x, float bias) const {
    if (SHAPED) {
      if (side.bias) x = fmaxf(x + bias, kLowest);
      if (side.softcap > 0) return side.softcap * tanhf(x * (side.scale / side.softcap));
    }
    return x * side.scale;
  }

  // Raw products of n columns become logits at temperature 1.
  __device__ void shape(Eight& x, int64_t column, int64_t n) const {
    Eight bias{};
    if (SHAPED && side.bias) bias = load(side.bias + column, n);
#pragma unroll
    for (int j = 0; j < kEach; ++j) x[j] = logit(x[j], bias[j]);
  }

  // d softcap(x) / dx = 1 - tanh(x / c)^2, from the capped logit c tanh(x / c)
  __device__ float slope(float logit) const {
    if (!SHAPED || side.softcap == 0) return 1.0f;
    const float t = logit / side.softcap;
    return (1.0f - t) * (1.0f + t);
  }
};

}  // namespace
