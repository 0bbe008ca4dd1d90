// One step of a sweep: a chunk of rows against a block of the vocabulary, products and row kernels together, so that a
// tile of logits is made, read and left in the second-level cache.
#pragma once

#include "panels.h"
#include "rows.h"

namespace fastpost {

// Where a block of the head is packed: kept between steps, since fresh memory costs more to touch than to fill.
struct Room {
  at::Tensor weight, weight_q, transposed;
};

// One distribution's side of a step.
struct Operands {
  Panels left;        // the hidden states (R, D) of the chunk
  at::Tensor weight;  // (B, D)
  MaybeTensor held;   // (R, B) fp32, where its raw products are kept, or already are
};

// What is rounded for a product, or kept for one, is bf16 or fp32, as the operands are.

// The statistics: `fold` of rows.py. total (R, D) fp32 += sum_v e^(z_v - max) dz_v/dlogit_v weight_v but for the
// target's own v, after what it held has shrunk to the new maximum. kept (R, B), if any, is given the factors of
// weight_v.
void fold_block(const Fold& fold, const Operands& p, const std::optional<Operands>& q, Room& room,
                const MaybeTensor& total, const MaybeTensor& kept);

// The gradients: `grads` of rows.py. dlogits (R, B) is written and dhidden (R, D) fp32, if any, is added to.
// `made`: the products are in p.held and q.held already.
void grads_block(const Grads& grads, const Operands& p, const std::optional<Operands>& q, Room& room, bool made,
                 const at::Tensor& dlogits, const MaybeTensor& dhidden);

// dweight (B, D) fp32 += dlogits^T hidden, or it is written where it is `fresh`; only then may it be bf16. dlogits
// (R, B) may lie in dweight's own memory. hidden^T is packed as a right operand.
void weight_block(const at::Tensor& dlogits, const Panels& hidden, const at::Tensor& dweight, bool fresh);

}  // namespace fastpost
