// What is vectorised by the compiler: one binary for every CPU, and an exponential without table or branch.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

// The loader picks AVX-512, AVX2 or SSE2. A compiler that cannot do that must not build this, since torch's own kernels
// would be faster than these without vectors; the install then goes on with those. NEON is every arm64's.
#if !defined(__x86_64__)
#define EACH_CPU
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#error "on x86-64 this file wants GCC 12 or newer, for target_clones"
#endif

namespace fastpost {

// e^x for x <= 0, or above it by rounding: 2^n e^r with |r| <= log(2) / 2 and Cephes' polynomial for e^r, within 1 ulp.
// Below -87 it is 0 (e^x would soon be subnormal), and NaN stays NaN.
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

// log x for x in [2^-126, 1]: n log 2 + 2 atanh t, where x = 2^n f with f in [sqrt(1/2), sqrt(2)) and
// t = (f - 1) / (f + 1), and five terms of the series are enough. Within 2 ulp, 0 at 1, and NaN stays NaN.
inline float logarithm(float x) {
  constexpr uint32_t kLeast = 0x3f3504f3u;  // of f
  const uint32_t above = std::bit_cast<uint32_t>(x) - kLeast;
  const float n = static_cast<float>(static_cast<int32_t>(above) >> 23);
  const float f = std::bit_cast<float>((above & 0x7fffffu) + kLeast);
  const float t = (f - 1.0f) / (f + 1.0f), square = t * t;
  const float series = 1.0f / 3 + square * (1.0f / 5 + square * (1.0f / 7 + square * (1.0f / 9)));
  const float y = n * 0.69314718f + 2.0f * (t + t * square * series);
  return x == x ? y : x;
}

// tanh x = (1 - e^-2|x|) / (1 + e^-2|x|), which cancels near 0, where the series takes its place.
inline float hyperbolic_tangent(float x) {
  const float e = exponential(-2.0f * std::fabs(x)), square = x * x;
  const float far = std::copysign((1.0f - e) / (1.0f + e), x);
  const float near = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
  return square < 0.01f ? near : far;
}

// To the nearest bf16, ties to even. (NaN stays NaN: none of its payload is lost to the rounding that matters here.)
inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? uint16_t(rounded) : uint16_t(0x7fc0);
}

}  // namespace fastpost
