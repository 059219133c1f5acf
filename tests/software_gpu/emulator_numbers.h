// Numbers as PTX has them: formats, rounding modes, flushing, saturation, NaN.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// Half precision and bfloat16 are computed with as doubles that hold every result exactly, or
// rounded to odd, so that the one rounding that counts is that to 16 bits.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

enum Rounding { NEAREST, TO_ZERO, DOWN, UP };
enum Flags { FLUSH = 1, SATURATE = 2, PROPAGATE_NAN = 4, RELU = 8, NEGATE_PREDICATE = 16 };

template <class T> T as(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> uint64_t bits_of(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

// --- rounding ------------------------------------------------------------------------------------

inline double round_to_integer(double x, int mode) {
  switch (mode) {
  case TO_ZERO: return trunc(x);
  case DOWN: return floor(x);
  case UP: return ceil(x);
  default: return nearbyint(x); // the host rounds to nearest, ties to even
  }
}

// x with `digits` significant bits and no exponent below `least`; beyond `most` it overflows.
inline double round_to(double x, int digits, int least, int most, int mode) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent = std::max(ilogb(x), least) - (digits - 1);
  double rounded = ldexp(round_to_integer(ldexp(x, -exponent), mode), exponent);
  if (fabs(rounded) < ldexp(1, most + 1)) return copysign(rounded, x);
  bool away = mode == NEAREST || mode == (x > 0 ? UP : DOWN);
  return copysign(away ? INFINITY : ldexp(2 - ldexp(1, 1 - digits), most), x);
}

// The double next to the exact value that is odd in its last bit, unless the value is a double:
// rounding it once more gives what rounding the exact value would have given.
inline double to_odd(double rounded, double error) {
  if (error == 0 || !std::isfinite(rounded)) return rounded;
  uint64_t bits = bits_of(rounded);
  if (bits & 1) return rounded;
  return as<double>((rounded > 0) == (error > 0) ? bits + 1 : bits - 1);
}
inline double add_to_odd(double a, double b) {
  double sum = a + b, of_b = sum - a; // Knuth's two-sum
  return to_odd(sum, (a - (sum - of_b)) + (b - of_b));
}
inline double to_odd(__int128 integer) {
  double rounded = (double)integer;
  return to_odd(rounded, (double)(integer - (__int128)rounded));
}

// --- formats -------------------------------------------------------------------------------------

inline double real(float x) { return x; }
inline double real(double x) { return x; }
inline double real(Half x) { return (double)as<_Float16>(x.bits); }
inline double real(Brain x) { return as<float>((uint64_t)x.bits << 16); }

template <class T> T rounded(double x, int mode);
template <> inline double rounded<double>(double x, int) { return x; }
template <> inline float rounded<float>(double x, int mode) {
  if (x != x) return as<float>(0x7fffffff);
  return (float)round_to(x, 24, -126, 127, mode);
}
template <> inline Half rounded<Half>(double x, int mode) {
  if (x != x) return {0x7fff};
  return {(uint16_t)bits_of((_Float16)round_to(x, 11, -14, 15, mode))};
}
template <> inline Brain rounded<Brain>(double x, int mode) {
  if (x != x) return {0x7fff};
  return {(uint16_t)(bits_of((float)round_to(x, 8, -126, 127, mode)) >> 16)};
}

// NVIDIA GPUs have one NaN of single precision; of double precision they have the host's.
inline float canonical(float x) { return x == x ? x : as<float>(0x7fffffff); }
inline double canonical(double x) { return x; }

inline float flush(float x) {
  return fabsf(x) < std::numeric_limits<float>::min() ? copysignf(0, x) : x;
}
inline double flush(double x) { return x; }
template <class T> T saturate(T x) { return x > 0 ? std::min<T>(x, 1) : 0; } // NaN gives 0 too

// What the host rounds by, until the end of a block.
class HostRounding {
public:
  explicit HostRounding(int mode) {
    static const int MODES[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    fesetround(MODES[mode]);
  }
  ~HostRounding() { fesetround(FE_TONEAREST); }
};

// --- operations ----------------------------------------------------------------------------------

// A number of 16 bits while it is computed with.
struct Exact {
  double value;
};

struct Add {
  template <class T> T operator()(T a, T b) const { return a + b; }
  Exact operator()(Exact a, Exact b) const { return {add_to_odd(a.value, b.value)}; }
};
struct Subtract {
  template <class T> T operator()(T a, T b) const { return a - b; }
  Exact operator()(Exact a, Exact b) const { return {add_to_odd(a.value, -b.value)}; }
};
struct Multiply {
  template <class T> T operator()(T a, T b) const { return a * b; }
  Exact operator()(Exact a, Exact b) const { return {a.value * b.value}; }
};
struct Divide {
  template <class T> T operator()(T a, T b) const { return a / b; }
};
struct FusedMultiplyAdd {
  float operator()(float a, float b, float c) const { return fmaf(a, b, c); }
  double operator()(double a, double b, double c) const { return fma(a, b, c); }
  Exact operator()(Exact a, Exact b, Exact c) const {
    return {add_to_odd(a.value * b.value, c.value)};
  }
};

// The number where one is NaN, or NaN if asked for; -0 is less than +0.
template <class T> T minimum(T a, T b, bool propagate) {
  if (a != a || b != b) return propagate || (a != a && b != b) ? T(NAN) : a != a ? b : a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T> T maximum(T a, T b, bool propagate) { return -minimum<T>(-a, -b, propagate); }

template <class T> T integer_divide(T a, T b) {
  if (b == 0) return (T)-1;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return (T)(0 - (std::make_unsigned_t<T>)a);
  return a / b;
}
template <class T> T integer_remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return a % b;
}
template <class T> T multiply_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return (T)(((Wide)a * (Wide)b) >> (8 * sizeof(T)));
}

// A shift by all bits or more leaves nothing but the sign.
template <class T> T shift_left(T a, uint32_t by) { return by < 8 * sizeof(T) ? a << by : 0; }
template <class T> T shift_right(T a, uint32_t by) {
  if (by < 8 * sizeof(T)) return a >> by;
  return a < 0 ? -1 : 0;
}

// To an integer of `size` bytes: out of range gives the nearest one. NaN gives 0, but the bit of
// the sign where double precision or 64 bits are concerned (PTX ISA, cvt).
inline uint64_t saturated_integer(double x, unsigned size, bool is_signed, bool wide_nan) {
  unsigned bits = 8 * size;
  uint64_t mask = size == 8 ? ~0ull : (1ull << bits) - 1;
  if (x != x) return wide_nan ? 1ull << (bits - 1) : 0;
  double least = is_signed ? -ldexp(1, bits - 1) : 0, end = ldexp(1, bits - is_signed);
  if (x >= end) return mask >> is_signed;
  if (x <= least) return is_signed ? 1ull << (bits - 1) : 0;
  return (is_signed ? (uint64_t)(int64_t)x : (uint64_t)x) & mask;
}
