// grads of fastpost/core/rows.py for an NVIDIA GPU: dL/dtile, elementwise, one block for a part of a row.
//
// Compiled with -fmad=false: p c - q c is to be 0 where p is q, and the gradient of a KL lives of that.
//
// A candidate: kernels/triton/rows.py does the same, nothing in the library calls this, and benchmarks/rows.py times
// the two beside each other. It was compiled for sm_80 and sm_90a, run by emulation (tests/test_cuda_rows.py), and not
// timed on a GPU. The lines quoted above a stage are those of fastpost/core/rows.py.

#include "launch.cuh"
#include "sums.cuh"
#include "tile.cuh"

namespace {

constexpr int kGradsThreads = 256;

// The rows of the coefficients, in the order of rows.py.
enum Coefficient {
  C_TARGET, C_P, C_PLOGP, C_APART_Q, C_Q, C_PSQ, C_ONE, C_APART_M, C_AT_1,
  C_MAX, C_LOG_SUM, C_MAX_Q, C_LOG_SUM_Q, C_MAX_1, C_LOG_SUM_1, C_LOG_SUM_SQ,
  kCoefficients
};

__host__ __device__ constexpr bool uses(Kind kind, int i) {
  if (i == C_APART_Q || i == C_Q || i == C_APART_M || i == C_MAX_Q || i == C_LOG_SUM_Q) return kind == BOTH;
  return i == C_TARGET || i == C_P || i == C_PLOGP || i == C_MAX || i == C_LOG_SUM || kind >= OWN;
}

// Gradients that cost an exponential or a logarithm more for each logit: bits of `wants`.
enum Costly { LOG_SUM_SQ = 1, LOGP_AT_1 = 2, FORWARD_KL = 4, JSD = 8 };

// log p/m, m = share_q q + share_p p. With g = |log p - log q|, m is the larger of the two times s e^-g + (1 - s), s
// the share of the smaller: a distribution is no distance from its mixture with itself.
__device__ float over_mixture(float logp, float logq, float share_q, float share_p) {
  const float gap = fabsf(logp - logq), e = expf(-gap);
  return logq > logp ? -logf(share_p * e + share_q) - gap : -logf(share_q * e + share_p);
}

struct Shares {
  float q, p;
};

// What makes a row's logits to gradients.
template <Kind K>
struct Gradient {
  float c[kCoefficients], inverse;
  int wants;
  Shares shares;

  // all_c: (16, R)
  __device__ Gradient(const float* all_c, const Tile& tile, int64_t r, int wants, Shares shares)
      : inverse(inverse_temperature(tile, r)), wants(wants), shares(shares) {
#pragma unroll
    for (int i = 0; i < kCoefficients; ++i) c[i] = uses(K, i) ? all_c[i * tile.rows + r] : 0.0f;
  }

  // dL/dlogit, of logits at temperature 1
  __device__ float at(float at_1, float at_1_q, bool here) const {
    // d = p * c[P] + p log p * c[PLOGP]
    const float logp = at_1 * inverse - c[C_MAX] - c[C_LOG_SUM], p = expf(logp);
    float factor = fmaf(logp, c[C_PLOGP], c[C_P]);
    // + p (log p - log q) * c[APART_Q] + p (log p - log m) * c[APART_M]
    const float logq = K == BOTH ? at_1_q * inverse - c[C_MAX_Q] - c[C_LOG_SUM_Q] : 0.0f;
    if (K == BOTH) {
      factor = fmaf(logp - logq, c[C_APART_Q], factor);
      if (wants & JSD) factor = fmaf(over_mixture(logp, logq, shares.q, shares.p), c[C_APART_M], factor);
    }
    float d = p * factor;
    // + q * c[Q]
    if (K == BOTH && (wants & FORWARD_KL)) d += expf(logq) * c[C_Q];
    // + p^2 / sum p^2 * c[PSQ] + c[ONE] + 1_y * c[TARGET]
    if (K >= OWN) {
      if (wants & LOG_SUM_SQ) d += expf(2.0f * logp - c[C_LOG_SUM_SQ]) * c[C_PSQ];
      d += c[C_ONE];
    }
    d = (d + (here ? c[C_TARGET] : 0.0f)) * inverse;
    // d -= softmax(at_1) * c[AT_1]; d += 1_y * c[AT_1]
    if (K >= OWN && (wants & LOGP_AT_1)) {
      d -= expf(at_1 - c[C_MAX_1] - c[C_LOG_SUM_1]) * c[C_AT_1];
      d += here ? c[C_AT_1] : 0.0f;
    }
    return d;
  }
};

template <Kind K, bool SHAPED, typename Out>
__global__ void __launch_bounds__(kGradsThreads)
    grads_rows_kernel(Tile tile, const float* c, int wants, Shares shares) {
  const int64_t r = blockIdx.x, v = (blockIdx.y * kGradsThreads + threadIdx.x) * int64_t(kEach), n = tile.columns - v;
  if (n <= 0) return;
  const Row<SHAPED> p(tile.p, r), q(tile.q, r);
  Eight x = load(p.raw + v, n), xq{};
  if (K == BOTH) xq = load(q.raw + v, n);
  const Gradient<K> gradient(c, tile, r, wants, shares);
  const int64_t target = tile.target[r] - tile.start;
  p.shape(x, v, n);
  if (K == BOTH) q.shape(xq, v, n);
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    x[j] = gradient.at(x[j], xq[j], v + j == target) * p.slope(x[j]) * tile.p.scale;
  store(static_cast<Out*>(tile.out) + r * tile.out_stride + v, x, n);
}

}  // namespace

// c: (16, R); kind: of sums.cuh; wants: see Costly. tile.out: dL/dtile. Returns a cudaError_t.
extern "C" int fastpost_grads(const Tile* tile, int kind, const float* c, int wants, float share_q, float share_p,
                              cudaStream_t stream) {
  constexpr int kColumns = kGradsThreads * kEach;
  const dim3 blocks(tile->rows, (tile->columns + kColumns - 1) / kColumns);
  return with_kind(kind, [&](auto k) {
    return with_flag(tile->shaped(), [&](auto shaped) {
      return with_out(*tile, [&](auto out) {
        using Out = typename decltype(out)::type;
        return launch(grads_rows_kernel<k.value, shaped.value, Out>, blocks, kGradsThreads, stream, *tile, c, wants,
                      Shares{share_q, share_p});
      });
    });
  });
}
