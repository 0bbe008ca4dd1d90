// fold of fastpost/core/rows.py for an NVIDIA GPU: one block a row, whose logits stay in registers from the load to the last
// write. A warp sums relative to its own maximum: all that is to be said of a row goes through shared memory once,
// behind one barrier, and a logit costs one exponential also where the left operand of a product is written, which is
// e^(z - the warp's maximum) times a factor.
//
// A candidate: kernels/triton/rows.py does the same, nothing in the library calls this, and benchmarks/rows.py times
// the two beside each other. It was compiled for sm_80 and sm_90a, run by emulation (tests/test_cuda_rows.py), and not
// timed on a GPU. The lines quoted above a stage are those of fastpost/core/rows.py.

#include "launch.cuh"
#include "sums.cuh"
#include "tile.cuh"

#ifndef FOLD_THREADS
#define FOLD_THREADS 512  // of a block; benchmarks/cuda_rows.py has those that are tried
#endif
#ifndef FOLD_COLUMNS
#define FOLD_COLUMNS 8192  // of a row, at the most: what its block holds
#endif

namespace {

constexpr int kFoldThreads = FOLD_THREADS, kFoldParts = FOLD_COLUMNS / (FOLD_THREADS * kEach);
static_assert(kFoldThreads % kLanes == 0 && kFoldParts * kFoldThreads * kEach == FOLD_COLUMNS);

// What a thread has of a row.
template <Kind K, bool SHAPED>
struct Held {
  Eight at_1[kFoldParts], z[kFoldParts], zq[kFoldParts];

  __device__ static int64_t column(int i) { return (i * kFoldThreads + threadIdx.x) * int64_t(kEach); }

  __device__ void load_from(const Row<SHAPED>& p, const Row<SHAPED>& q, int64_t columns) {
#pragma unroll
    for (int i = 0; i < kFoldParts; ++i) {
      const int64_t v = column(i);
      at_1[i] = load(p.raw + v, columns - v);
      if (K == BOTH) zq[i] = load(q.raw + v, columns - v);
    }
  }

  __device__ void shape(const Row<SHAPED>& p, const Row<SHAPED>& q, float inverse, int64_t columns) {
#pragma unroll
    for (int i = 0; i < kFoldParts; ++i) {
      const int64_t v = column(i), n = columns - v;
      p.shape(at_1[i], v, n);
      z[i] = at_1[i];
      times(z[i], inverse);
      clear_beyond(at_1[i], n);
      clear_beyond(z[i], n);
      if (K == BOTH) {
        q.shape(zq[i], v, n);
        times(zq[i], inverse);
        clear_beyond(zq[i], n);
      }
    }
  }

  __device__ Sums maxima() const {  // of a warp's columns
    Sums s = nothing();
#pragma unroll
    for (int i = 0; i < kFoldParts; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        s[MAX] = fmaxf(s[MAX], z[i][j]);
        if (has(K, MAX_1)) s[MAX_1] = fmaxf(s[MAX_1], at_1[i][j]);
        if (has(K, MAX_Q)) s[MAX_Q] = fmaxf(s[MAX_Q], zq[i][j]);
      }
    warp_maxima<K>(s);
    return s;
  }

  // Those of a warp's columns. z becomes e^(z - max) dz/dlogit.
  __device__ Sums sums(const Row<SHAPED>& p, int64_t columns) {
    Sums s = maxima();
#pragma unroll
    for (int i = 0; i < kFoldParts; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float x = z[i][j] - s[MAX], e = expf(x);
        s[SUM] += e;
        if (has(K, SUM_Z)) s[SUM_Z] = fmaf(e, x, s[SUM_Z]);
        if (has(K, SUM_SQ)) s[SUM_SQ] = fmaf(e, e, s[SUM_SQ]);
        if (has(K, TOTAL)) s[TOTAL] += column(i) + j < columns ? z[i][j] : 0.0f;
        if (has(K, SUM_1)) s[SUM_1] += expf(at_1[i][j] - s[MAX_1]);
        if (has(K, SUM_Q)) {
          const float xq = zq[i][j] - s[MAX_Q], eq = expf(xq);
          s[SUM_Q] += eq;
          s[APART_P] = fmaf(e, x - xq, s[APART_P]);
          s[APART_Q] = fmaf(eq, xq - x, s[APART_Q]);
        }
        z[i][j] = e * p.slope(at_1[i][j]);
      }
    warp_sums<K>(s);
    return s;
  }
};

// out = left * factor, 0 in the target's own column
template <typename Out>
__device__ void write_left(Out* out, Eight left, float factor, int64_t column, int64_t columns, int64_t target) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) left[j] = column + j == target ? 0.0f : left[j] * factor;
  store(out + column, left, columns - column);
}

// Out: float, __nv_bfloat16, or void for none.
template <Kind K, bool SHAPED, typename Out>
__global__ void __launch_bounds__(kFoldThreads) fold_rows_kernel(Tile tile, float* state) {
  constexpr bool kWrites = !std::is_void<Out>::value;
  const int64_t r = blockIdx.x, B = tile.columns;
  const Row<SHAPED> p(tile.p, r), q(tile.q, r);
  // Nothing is waited for before all loads are on their way.
  Held<K, SHAPED> held;
  held.load_from(p, q, B);
  const float inverse = inverse_temperature(tile, r);
  const int64_t target = tile.target[r] - tile.start;
  Sums before = nothing();
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (has(K, slot)) before[slot] = state[slot * tile.rows + r];

  // state[TARGET] = where(here, at_1.gather(column), state[TARGET]); read before `out`, maybe the tile, is written
  const bool finds = threadIdx.x == 0 && target >= 0 && target < B;
  const float own = finds ? p.logit(p.raw[target], SHAPED && tile.p.bias ? tile.p.bias[target] : 0.0f) : 0.0f;

  held.shape(p, q, inverse, B);
  const Sums mine = held.sums(p, B);
  const Sums s = block_sums<K, kFoldThreads / kLanes, kWrites>(mine, before);

  if (threadIdx.x == 0) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      if (has(K, slot)) state[slot * tile.rows + r] = s[slot];
    if (finds) state[TARGET * tile.rows + r] = own;
  }
  if constexpr (kWrites) {
    Out* out = static_cast<Out*>(tile.out) + r * tile.out_stride;
    const float factor = expf(mine[MAX] - s[MAX]);
#pragma unroll
    for (int i = 0; i < kFoldParts; ++i) write_left(out, held.z[i], factor, held.column(i), B, target);
  }
}

// Calls with the type of the left operand's numbers.
template <typename Call>
int with_left(const Tile& tile, Call call) {
  return tile.out ? with_out(tile, call) : call(Type<void>());
}

}  // namespace

// state: (14, R), updated; kind: of sums.cuh. Returns a cudaError_t.
extern "C" int fastpost_fold(const Tile* tile, int kind, float* state, cudaStream_t stream) {
  return with_kind(kind, [&](auto k) {
    return with_flag(tile->shaped(), [&](auto shaped) {
      return with_left(*tile, [&](auto out) {
        using Out = typename decltype(out)::type;
        return launch(fold_rows_kernel<k.value, shaped.value, Out>, dim3(tile->rows), kFoldThreads, stream, *tile,
                      state);
      });
    });
  });
}
