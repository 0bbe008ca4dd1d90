// The running sums of a row on a GPU: online softmax (arXiv:1805.02867), and its like for every statistic, as
// kernels/triton/sums.py has them. They are relative to the maxima, so they can be moved to others; what two parts of a
// vocabulary found is added once both are at the same.
#pragma once

#include <cuda_runtime.h>

namespace {

constexpr float kNothing = -1e38f;  // a maximum over no column: see fastpost/core/rows.py
constexpr int kLanes = 32;

// The rows of the state that a fold carries, in the order of rows.py; the target's has no sum.
enum Slot { MAX, SUM, TARGET, SUM_Z, SUM_SQ, TOTAL, MAX_Q, SUM_Q, APART_P, APART_Q, MAX_1, SUM_1, kSlots };

// What a kernel finds, each kind more than those before it: logp and the entropy, which costs less than asking for it;
// all statistics of p; those of p and q.
enum Kind { ENTROPY, OWN, BOTH };

__host__ __device__ constexpr bool is_maximum(int slot) { return slot == MAX || slot == MAX_Q || slot == MAX_1; }

__host__ __device__ constexpr bool has(Kind kind, int slot) {
  if (slot == SUM_SQ || slot == TOTAL || slot == MAX_1 || slot == SUM_1) return kind >= OWN;
  return slot == MAX || slot == SUM || slot == SUM_Z || (slot >= MAX_Q && slot <= APART_Q && kind == BOTH);
}

struct Sums {
  float s[kSlots];
  __device__ float& operator[](int slot) { return s[slot]; }
  __device__ float operator[](int slot) const { return s[slot]; }
};

// What is not kept stays so, and the compiler drops it.
__device__ inline Sums nothing() {
  Sums s;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) s[slot] = is_maximum(slot) ? kNothing : 0.0f;
  return s;
}

// The same sums, relative to the maxima of `to`.
__device__ inline Sums moved(const Sums& s, const Sums& to) {
  const float shift = s[MAX] - to[MAX], shift_q = s[MAX_Q] - to[MAX_Q];
  const float decay = expf(shift), decay_q = expf(shift_q);
  Sums m = to;
  m[SUM] = s[SUM] * decay;
  m[SUM_Z] = fmaf(shift, s[SUM], s[SUM_Z]) * decay;
  m[SUM_SQ] = s[SUM_SQ] * decay * decay;
  m[TOTAL] = s[TOTAL];
  m[SUM_Q] = s[SUM_Q] * decay_q;
  m[APART_P] = fmaf(shift - shift_q, s[SUM], s[APART_P]) * decay;
  m[APART_Q] = fmaf(shift_q - shift, s[SUM_Q], s[APART_Q]) * decay_q;
  m[SUM_1] = s[SUM_1] * expf(s[MAX_1] - to[MAX_1]);
  return m;
}

// What two parts of the vocabulary found, together.
__device__ inline Sums added(const Sums& a, const Sums& b) {
  Sums top = nothing();
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (is_maximum(slot)) top[slot] = fmaxf(a[slot], b[slot]);
  Sums x = moved(a, top);
  const Sums y = moved(b, top);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (!is_maximum(slot)) x[slot] += y[slot];
  return x;
}

// ---- over a warp: in each lane the same bits, since a + b is b + a ----

template <Kind K>
__device__ void warp_maxima(Sums& s) {
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (has(K, slot) && is_maximum(slot))
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2)
        s[slot] = fmaxf(s[slot], __shfl_xor_sync(0xffffffffu, s[slot], step));
}

template <Kind K>
__device__ void warp_sums(Sums& s) {
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (has(K, slot) && !is_maximum(slot))
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) s[slot] += __shfl_xor_sync(0xffffffffu, s[slot], step);
}

// ---- over a block ----

// The sums of all warps, and those of the row before; each warp has them, if ALL, else the first.
template <Kind K, int WARPS, bool ALL>
__device__ Sums block_sums(const Sums& s, const Sums& before) {
  static_assert(WARPS <= kLanes);
  __shared__ float parts[kSlots][WARPS];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (has(K, slot) && lane == 0) parts[slot][warp] = s[slot];
  __syncthreads();
  if (!ALL && warp > 0) return s;
  Sums t = nothing();
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (has(K, slot) && lane < WARPS) t[slot] = parts[slot][lane];
  Sums top = t;
  warp_maxima<K>(top);
  t = moved(t, top);
  warp_sums<K>(t);
  return added(before, t);
}

}  // namespace
