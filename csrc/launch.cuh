// A launch, and the choice of the instantiation that is launched.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "sums.cuh"
#include "tile.cuh"

namespace {

template <typename... Given>
int launch(void (*kernel)(Given...), dim3 blocks, int threads, cudaStream_t stream, Given... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

template <typename T>
struct Type {
  using type = T;
};

template <typename Call>
int with_kind(int kind, Call call) {
  if (kind == ENTROPY) return call(std::integral_constant<Kind, ENTROPY>());
  return kind == OWN ? call(std::integral_constant<Kind, OWN>()) : call(std::integral_constant<Kind, BOTH>());
}

template <typename Call>
int with_flag(bool flag, Call call) {
  return flag ? call(std::true_type()) : call(std::false_type());
}

// Calls with the type of the numbers of `out`.
template <typename Call>
int with_out(const Tile& tile, Call call) {
  return tile.out_is_bf16 ? call(Type<__nv_bfloat16>()) : call(Type<float>());
}

}  // namespace
