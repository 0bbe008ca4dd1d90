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

// The gradients: `grads` of rows.py. dlogits (R, B) bf16 is written and dhidden (R, D) fp32, if any, is added to.
// `made`: the products are in p.held and q.held already.
void grads_block(const Grads& grads, const Operands& p, const std::optional<Operands>& q, bool made,
                 const at::Tensor& dlogits, const MaybeTensor& dhidden);

// dweight (B, D) += dlogits^T hidden, or it is written where it is `fresh`; only then may it be bf16. dlogits (R, B)
// bf16 may lie in dweight's own memory. hidden: what `pack_across` made of it.
void weight_block(const at::Tensor& dlogits, const at::Tensor& hidden, const at::Tensor& dweight, bool fresh);

}  // namespace fastpost
