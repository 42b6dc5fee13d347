// Stands in for CUDA's header of this name when device code is compiled for the host.
#pragma once

#include "../cuda_emulation.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31;
  const uint32_t mantissa = h.bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  return sign != 0 ? -magnitude : magnitude;
}

// To the nearest, ties to even; halves have 11 significant bits and multiples of 2^-24.
inline __half __float2half_rn(float x) {
  const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
  const int exponent = magnitude == 0 ? -14 : std::max(std::ilogb(magnitude), -14);
  const float mantissa = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // at most 2048
  // A mantissa of 2048 carries into the exponent, a mantissa below 1024 makes a subnormal number.
  const int bits = ((exponent + 14) << 10) + static_cast<int>(mantissa);
  return {static_cast<unsigned short>(sign | bits)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__float2half_rn(x.x), __float2half_rn(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return __float22half2_rn({x, y}); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
