// Eight float32 lanes through the compiler's vector extensions (GCC and Clang lower them to whatever the
// machine has), and the three activation dtypes widened to float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace decdec::cpu {

constexpr int kLanes = 8;
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));

// Loads and stores wherever the bytes lie: memcpy is the form that neither alignment nor aliasing rules forbid; it costs no call.
// A cast between vector types of one size, as below, reinterprets the bits.
template <typename T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
inline void store(void* to, const T& value) {
  std::memcpy(to, &value, sizeof value);
}

// The lanes of a (0..7) and b (8..15) that are named, in that order.
template <int... kLane>
inline f32x8 pick(f32x8 a, f32x8 b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, i32x8{kLane...});
#endif
}

// Turns eight vectors, seen as the rows of a matrix, into its columns: pairs, then fours, then eights.
inline void transpose(f32x8* rows) {
  f32x8 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = pick<0, 8, 1, 9, 4, 12, 5, 13>(rows[i], rows[i + 1]);
    pairs[i + 1] = pick<2, 10, 3, 11, 6, 14, 7, 15>(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = pick<0, 1, 8, 9, 4, 5, 12, 13>(pairs[i + half], pairs[i + 2 + half]);
      fours[i + 2 * half + 1] = pick<2, 3, 10, 11, 6, 7, 14, 15>(pairs[i + half], pairs[i + 2 + half]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = pick<0, 1, 2, 3, 8, 9, 10, 11>(fours[i], fours[i + 4]);
    rows[i + 4] = pick<4, 5, 6, 7, 12, 13, 14, 15>(fours[i], fours[i + 4]);
  }
}

// IEEE half in the low 16 bits of each lane (the high ones are ignored) -> float by integer arithmetic:
// exact for subnormals even where the process flushes them.
//   normal      exponent rebased by 127 - 15 = 112
//   inf, NaN    rebased twice, which lands the exponent on 255
//   subnormal   the mantissa behind the exponent of 2^-14, less that 2^-14
inline f32x8 half_to_float(i32x8 half) {
  constexpr int32_t kRebase = 112 << 23;
  constexpr int32_t kSmallest = 113 << 23;
  const i32x8 exponent = half & 0x7c00;
  const i32x8 magnitude = (half & 0x7fff) << 13;
  const i32x8 finite = magnitude + kRebase + ((exponent == 0x7c00) & kRebase);
  const f32x8 small = (f32x8)(magnitude + kSmallest) - 0x1p-14f;
  const i32x8 subnormal = exponent == 0;
  return (f32x8)(((i32x8)small & subnormal) | (finite & ~subnormal) | ((half & 0x8000) << 16));
}

// Eight activations as float32.
template <Scalar S>
inline f32x8 load_lanes(const void* from) {
  if constexpr (S == Scalar::float32) {
    return load<f32x8>(from);
  } else {
    const i32x8 wide = __builtin_convertvector(load<u16x8>(from), i32x8);
    if constexpr (S == Scalar::float16) return half_to_float(wide);
    return (f32x8)(wide << 16);
  }
}

template <Scalar S>
constexpr int64_t kScalarBytes = S == Scalar::float32 ? 4 : 2;

// One scalar as float32.
template <Scalar S>
inline float load_scalar(const void* from) {
  alignas(32) char lanes[sizeof(f32x8)] = {};
  std::memcpy(lanes, from, kScalarBytes<S>);
  return load_lanes<S>(lanes)[0];
}

// Calls `work` with the scalar kind as a compile-time constant.
template <typename Work>
inline void with_scalar(Scalar scalar, Work work) {
  switch (scalar) {
    case Scalar::float32: return work(std::integral_constant<Scalar, Scalar::float32>{});
    case Scalar::float16: return work(std::integral_constant<Scalar, Scalar::float16>{});
    case Scalar::bfloat16: return work(std::integral_constant<Scalar, Scalar::bfloat16>{});
  }
}

}  // namespace decdec::cpu
