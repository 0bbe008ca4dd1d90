// One step of a sweep: a chunk of rows against a block of the vocabulary, products and row kernels together, so that a
// tile of logits is made, read and left in the second-level cache.
#pragma once

#include "rows.h"

namespace fastpost {

// One distribution's side of a step.
struct Operands {
  at::Tensor left;    // (panels, ...) the packed hidden states of the chunk
  at::Tensor weight;  // (B, D) bf16
  MaybeTensor held;   // (R, B) fp32, where its raw products are kept, or already are
};

// The statistics: `fold` of rows.py. total (R, D) += sum_v e^(z_v - max) dz_v/dlogit_v weight_v but for the target's
// own v, after what it held has shrunk to the new maximum. kept (R, B) bf16, if any, is given the factors of weight_v.
void fold_block(const Fold& fold, const Operands& p, const std::optional<Operands>& q, const MaybeTensor& total,
                const MaybeTensor& kept);

// The gradients: `grads` of rows.py. dlogits (R, B) bf16 is written; dhidden (R, D) and dweight (B, D), fp32, are added
// to, or dweight is written where it is `fresh`. hidden (R, D) is for dweight. `made`: the products are in p.held and
// q.held already.
struct Wanted {
  at::Tensor dlogits;
  MaybeTensor dhidden, hidden, dweight;
  bool fresh;
};
void grads_block(const Grads& grads, const Operands& p, const std::optional<Operands>& q, bool made,
                 const Wanted& wanted);

}  // namespace fastpost
