"""Attention over a pack, for any Hugging Face model that attends through transformers' AttentionInterface.

A (T, T) mask would pay for the whole pack squared. Instead a `Layout` says where the sequences are, and takes the
mask's place; no model's code is patched.

  interface  what transformers calls: reads the layout and the layer's scores, and picks one of
  varlen     flash kernels over sequences of any length (CUDA, half precision)
  flex       torch's flex_attention, from the layout as a block mask (CUDA, where the flash kernels will not do)
  exact      right-padded groups of like length (everywhere, any dtype: what the others must agree with)
"""

from fastpost.models.attention.interface import NAME, packed_attention, register
from fastpost.models.attention.layout import Layout

__all__ = ["NAME", "Layout", "packed_attention", "register"]
