// Executes PTX on the host: what Triton compiles a kernel to, warp by warp.
//
// Each lane has a program counter of its own; of a warp whose lanes stand at different
// instructions, those at the smallest go first. Programs (blocks of threads) run in any order, some
// of them interleaved. Global memory is the host's. `emulator.py` reads PTX and calls the functions
// at the end of this file.
#include "emulator_memory.h"
#include "emulator_numbers.h"
#include <cstdio>
#include <map>
#include <memory>
#include <utility>

constexpr int LANES = 32;
using Lanes = uint64_t[LANES]; // a register of a warp, the bits of each lane right-aligned

enum Space { GLOBAL, SHARED, LOCAL };

// Mirrors `INSTRUCTION` of emulator.py.
struct Instruction {
  int32_t handler;
  int32_t guard;   // the predicate it is executed under, or -1
  int32_t negated; // whether the guard has to be false
  int32_t number;  // in its kernel
  int32_t results, operands;
  int32_t result[8];   // registers; -1 is thrown away
  int32_t operand[12]; // registers, or from -1 downward constants
  int32_t rounding, flags;
  int32_t detail[4]; // by handler
  int64_t immediate; // an offset, the target of a branch, a table of truth
};

// How often an instruction was executed, and the memory it touched.
struct Count {
  uint64_t warps, lanes, sectors, wavefronts;
};

struct Kernel {
  std::vector<Instruction> code;
  std::vector<uint64_t> constants; // each LANES times
  int registers, threads, shared, local;
  std::vector<int32_t> special; // registers of SPECIAL of emulator.py, or -1
};

// Mirrors `OPTIONS` of emulator.py.
struct Options {
  uint32_t grid[3];
  int32_t dynamic_shared;
  int32_t checks, counts;
  int32_t order; // 0 ascending, 1 descending, else a seed
  int32_t concurrent;
  uint64_t most_instructions;
};

// A group of copies into shared memory that nobody waited for yet.
struct Copy {
  uint64_t to, from;
  uint32_t size, given, lane;
  const Instruction *by;
};

struct Warp {
  std::vector<uint64_t> registers;
  uint32_t alive = 0;     // lanes that did not return
  bool together = true;   // all of them at `at`; else each at its own `places`
  int at = 0;
  int places[LANES] = {};
  bool waits = false;     // at a barrier
  uint32_t index = 0, syncs = 0;
  std::vector<uint8_t> local; // memory of each lane, one after another
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> groups; // of copies, the oldest first

  // The lanes that go next, and from where.
  uint32_t next(int &place) {
    if (together) {
      place = at;
      return alive;
    }
    place = INT32_MAX;
    for (int l = 0; l < LANES; l++)
      if (alive >> l & 1) place = std::min(place, places[l]);
    uint32_t lanes = 0;
    for (int l = 0; l < LANES; l++)
      if ((alive >> l & 1) && places[l] == place) lanes |= 1u << l;
    if (lanes == alive) together = true, at = place;
    return lanes;
  }

  void go(uint32_t lanes, int to) {
    if (together && lanes == alive) {
      at = to;
      return;
    }
    if (together)
      for (int &place : places) place = at;
    together = false;
    for (int l = 0; l < LANES; l++)
      if (lanes >> l & 1) places[l] = to;
  }
};

// One block of threads.
struct Program {
  uint32_t id[3], serial; // serial counts from 1
  std::vector<Warp> warps;
  SharedMemory shared;
  uint32_t round = 1; // barriers so far
  bool synchronises = false; // by an acquire or a fence
  bool done = false;
};

struct Launch {
  const Kernel &kernel;
  const Options &options;
  const uint8_t *parameters;
  GlobalMemory global;
  std::vector<Count> counts;
  std::vector<std::pair<std::string, uint64_t>> notes; // what, where first
  uint64_t instructions = 0;
  uint32_t random;

  uint32_t draw(uint32_t below) {
    random = random * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)random * below) >> 32);
  }
};

// One instruction about to be executed by some lanes of a warp.
struct Step {
  Launch &launch;
  Program &program;
  Warp &warp;
  const Instruction &in;
  uint32_t lanes, active; // with the guard, and without
  int place;

  uint64_t *result(int k) const { return &warp.registers[(size_t)in.result[k] * LANES]; }
  bool keeps(int k) const { return k < in.results && in.result[k] >= 0; }
  const uint64_t *operand(int k) const {
    int index = in.operand[k];
    return index >= 0 ? &warp.registers[(size_t)index * LANES]
                      : &launch.kernel.constants[(size_t)~index * LANES];
  }
  bool has(Flags flag) const { return in.flags & flag; }
  bool runs(int lane) const { return lanes >> lane & 1; }

  std::string where(uint64_t address) const {
    char text[120];
    snprintf(text, sizeof text, "program %u,%u,%u, warp %u, address 0x%llx", program.id[0],
             program.id[1], program.id[2], warp.index, (unsigned long long)address);
    return text;
  }
  [[noreturn]] void fail(const std::string &what, uint64_t address = 0) const {
    throw Fault(std::to_string(in.number) + "\t" + what + "\t" + where(address));
  }
  void note(const char *what, uint64_t address, int number) const {
    std::string text = std::to_string(number) + "\t" + what + "\t";
    for (auto &known : launch.notes)
      if (known.first.compare(0, text.size(), text) == 0) {
        known.second++;
        return;
      }
    launch.notes.push_back({text + where(address), 1});
  }

  // result[l] = f(operands[l]...), in the types A..., for all lanes that run.
  template <class... A, class F> void each(F f) const {
    each_<A...>(f, std::index_sequence_for<A...>());
  }

private:
  template <class... A, class F, size_t... K>
  void each_(F f, std::index_sequence<K...>) const {
    uint64_t *to = result(0);
    const uint64_t *from[] = {operand(K)...};
    if (lanes == ~0u)
      for (int l = 0; l < LANES; l++) to[l] = bits_of(f(as<A>(from[K][l])...));
    else
      for (int l = 0; l < LANES; l++)
        if (runs(l)) to[l] = bits_of(f(as<A>(from[K][l])...));
  }
};

using Handler = void (*)(Step &);
using Table = std::map<std::string, Handler>;

// --- arithmetic ----------------------------------------------------------------------------------

template <class T, class F> void integer_1(Step &s) {
  s.each<T>([](T a) { return F()(a); });
}
template <class T, class F> void integer_2(Step &s) {
  s.each<T, T>([](T a, T b) { return F()(a, b); });
}

#define OPERATION(Name, result, ...)                                                               \
  struct Name {                                                                                    \
    template <class T> T operator()(__VA_ARGS__) const { return result; }                          \
  };
OPERATION(And, a & b, T a, T b)
OPERATION(Or, a | b, T a, T b)
OPERATION(Xor, a ^ b, T a, T b)
OPERATION(Not, ~a, T a)
OPERATION(Minimum, std::min(a, b), T a, T b)
OPERATION(Maximum, std::max(a, b), T a, T b)
OPERATION(MultiplyLow, (T)((uint64_t)a * b), T a, T b)
OPERATION(MultiplyHigh, multiply_high(a, b), T a, T b)
OPERATION(IntegerDivide, integer_divide(a, b), T a, T b)
OPERATION(IntegerRemainder, integer_remainder(a, b), T a, T b)
OPERATION(NegateInteger, (T)(0 - (std::make_unsigned_t<T>)a), T a)
OPERATION(AbsoluteInteger, a < 0 ? NegateInteger()(a) : a, T a)
// What a GPU approximates is exact here.
OPERATION(Reciprocal, 1 / a, T a)
OPERATION(SquareRoot, std::sqrt(a), T a)
OPERATION(ReciprocalSquareRoot, 1 / std::sqrt(a), T a)
OPERATION(PowerOf2, std::exp2(a), T a)
OPERATION(Logarithm2, std::log2(a), T a)
OPERATION(Sine, std::sin(a), T a)
OPERATION(Cosine, std::cos(a), T a)
OPERATION(HyperbolicTangent, std::tanh(a), T a)

// Of single or double precision: f in the host's arithmetic, rounded, flushed and saturated.
template <class T, class F, class... A> void real_operation(Step &s) {
  if (!s.in.rounding && !s.in.flags)
    return s.each<A...>([](A... a) { return canonical(F()(a...)); });
  HostRounding rounding(s.in.rounding);
  s.each<A...>([&](A... a) {
    T r = s.has(FLUSH) ? flush(F()(flush(a)...)) : F()(a...);
    return canonical(s.has(SATURATE) ? saturate(r) : r);
  });
}

// Of 16 bits, one number or two in a register.
template <class T, class F, class... A> T short_real(A... a) {
  return rounded<T>(F()(Exact{real(a)}...).value, NEAREST);
}
template <class T> T part(uint32_t pair, int k) { return as<T>(pair >> (16 * k) & 0xffff); }
template <class T, class F, class... A> uint32_t of_pairs(F f, A... a) {
  return f(part<T>(a, 0)...).bits | (uint32_t)f(part<T>(a, 1)...).bits << 16;
}
template <class T, class F, class... A> void short_operation(Step &s) {
  s.each<A...>([](A... a) { return short_real<T, F>(a...); });
}
template <class T, class F> void pair_2(Step &s) {
  s.each<uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b) { return of_pairs<T>(short_real<T, F, T, T>, a, b); });
}
template <class T, class F> void pair_3(Step &s) {
  s.each<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t c) {
    return of_pairs<T>(short_real<T, F, T, T, T>, a, b, c);
  });
}

template <class T, bool IS_MINIMUM> T extreme(T a, T b, bool propagate) {
  if constexpr (std::is_floating_point_v<T>)
    return canonical(IS_MINIMUM ? minimum(a, b, propagate) : maximum(a, b, propagate));
  else
    return rounded<T>(IS_MINIMUM ? minimum(real(a), real(b), propagate)
                                 : maximum(real(a), real(b), propagate),
                      NEAREST);
}
template <class T, bool IS_MINIMUM> void extreme_of(Step &s) {
  bool propagate = s.has(PROPAGATE_NAN);
  if constexpr (std::is_floating_point_v<T>)
    if (s.has(FLUSH))
      return s.each<T, T>(
          [&](T a, T b) { return extreme<T, IS_MINIMUM>(flush(a), flush(b), propagate); });
  s.each<T, T>([&](T a, T b) { return extreme<T, IS_MINIMUM>(a, b, propagate); });
}
template <class T, bool IS_MINIMUM> void extreme_of_pairs(Step &s) {
  bool propagate = s.has(PROPAGATE_NAN);
  s.each<uint32_t, uint32_t>([&](uint32_t a, uint32_t b) {
    return of_pairs<T>([&](T x, T y) { return extreme<T, IS_MINIMUM>(x, y, propagate); }, a, b);
  });
}
template <bool IS_MINIMUM> void extreme_relu(Step &s) {
  s.each<int32_t, int32_t>([](int32_t a, int32_t b) {
    return std::max(0, IS_MINIMUM ? std::min(a, b) : std::max(a, b));
  });
}

// min.xorsign.abs: of the magnitudes, with the product of the signs.
template <bool IS_MINIMUM> void extreme_of_magnitudes(Step &s) {
  s.each<float, float>([&](float a, float b) {
    if (s.has(FLUSH)) a = flush(a), b = flush(b);
    float r = extreme<float, IS_MINIMUM>(fabsf(a), fabsf(b), s.has(PROPAGATE_NAN));
    return r == r && std::signbit(a) != std::signbit(b) ? -r : r;
  });
}

// Of the sign alone: NaN keeps its bits.
template <uint64_t SIGNS, bool ABSOLUTE> void change_sign(Step &s) {
  s.each<uint64_t>([&](uint64_t a) {
    if (s.has(FLUSH)) a = bits_of(flush(as<float>(a)));
    return ABSOLUTE ? a & ~SIGNS : a ^ SIGNS;
  });
}
template <class T> void copy_sign(Step &s) { // of the first operand to the second
  s.each<T, T>([](T a, T b) { return std::copysign(b, a); });
}

template <class T> void multiply_wide(Step &s) {
  using Wide = std::conditional_t<
      std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, int32_t, int64_t>,
      std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>>;
  if (s.in.operands == 3)
    s.each<T, T, Wide>([](T a, T b, Wide c) {
      return (Wide)((uint64_t)((Wide)a * (Wide)b) + (uint64_t)c);
    });
  else
    s.each<T, T>([](T a, T b) { return (Wide)((Wide)a * (Wide)b); });
}
template <class T> void multiply_add(Step &s) {
  s.each<T, T, T>([](T a, T b, T c) { return (T)((uint64_t)a * b + c); });
}
template <class T> void multiply_high_add(Step &s) {
  s.each<T, T, T>([](T a, T b, T c) { return (T)((uint64_t)multiply_high(a, b) + (uint64_t)c); });
}

void approximate_reciprocal(Step &s) { // rcp.approx.ftz.f64 knows the upper halves alone
  const uint64_t upper = 0xffffffff00000000;
  s.each<uint64_t>([&](uint64_t a) { return bits_of(1 / as<double>(a & upper)) & upper; });
}

// --- comparison and choice -----------------------------------------------------------------------

// As `COMPARISONS` of emulator.py; the second half holds of NaN too.
enum Comparison { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, IS_NAN };

template <class T> bool holds(int comparison, T a, T b) {
  bool unordered = a != a || b != b;
  if (comparison >= NUM) return unordered == (comparison == IS_NAN);
  if (unordered) return comparison >= EQU;
  switch (comparison % 6) {
  case EQ: return a == b;
  case NE: return a != b;
  case LT: return a < b;
  case LE: return a <= b;
  case GT: return a > b;
  default: return a >= b;
  }
}
template <class T> auto comparable(T x) {
  if constexpr (std::is_arithmetic_v<T>)
    return x;
  else
    return real(x);
}

// setp.detail[0]{.and .or .xor of detail[1]}: to one predicate, or to it and its opposite.
template <class T> void set_predicate(Step &s) {
  const uint64_t *a = s.operand(0), *b = s.operand(1);
  const uint64_t *c = s.in.detail[1] ? s.operand(2) : nullptr;
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    T x = as<T>(a[l]), y = as<T>(b[l]);
    if constexpr (std::is_same_v<T, float>)
      if (s.has(FLUSH)) x = flush(x), y = flush(y);
    bool first = holds(s.in.detail[0], comparable(x), comparable(y)), second = !first;
    if (c) {
      bool with = (c[l] & 1) != s.has(NEGATE_PREDICATE);
      auto combine = [&](bool p) {
        return s.in.detail[1] == 1 ? p && with : s.in.detail[1] == 2 ? p || with : p != with;
      };
      first = combine(first), second = combine(second);
    }
    if (s.keeps(0)) s.result(0)[l] = first;
    if (s.keeps(1)) s.result(1)[l] = second;
  }
}
template <class T> void set_predicates_of_pair(Step &s) {
  for (int l = 0; l < LANES; l++)
    for (int k = 0; k < 2; k++)
      if (s.runs(l) && s.keeps(k))
        s.result(k)[l] = holds(s.in.detail[0], real(part<T>(s.operand(0)[l], k)),
                               real(part<T>(s.operand(1)[l], k)));
}
void select(Step &s) {
  s.each<uint64_t, uint64_t, uint64_t>(
      [](uint64_t a, uint64_t b, uint64_t p) { return p & 1 ? a : b; });
}
void not_predicate(Step &s) {
  s.each<uint64_t>([](uint64_t p) { return ~p & 1; });
}

// --- bits ----------------------------------------------------------------------------------------

void move(Step &s) {
  s.each<uint64_t>([](uint64_t a) { return a; });
}
// Parts of detail[0] bytes each, the lowest first.
void pack(Step &s) {
  unsigned bits = 8 * s.in.detail[0];
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    uint64_t packed = 0;
    for (int k = 0; k < s.in.operands; k++)
      packed |= (s.operand(k)[l] & ((1ull << bits) - 1)) << (bits * k);
    s.result(0)[l] = packed;
  }
}
void unpack(Step &s) {
  unsigned bits = 8 * s.in.detail[0];
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    uint64_t packed = s.operand(0)[l]; // a result may take its place
    for (int k = 0; k < s.in.results; k++)
      if (s.keeps(k)) s.result(k)[l] = packed >> (bits * k) & ((1ull << bits) - 1);
  }
}

template <class T> void shift_left_by(Step &s) {
  s.each<T, uint32_t>([](T a, uint32_t by) { return shift_left(a, by); });
}
template <class T> void shift_right_by(Step &s) {
  s.each<T, uint32_t>([](T a, uint32_t by) { return shift_right(a, by); });
}
// shf: detail[0] is left, detail[1] is wrap.
void funnel_shift(Step &s) {
  s.each<uint32_t, uint32_t, uint32_t>([&](uint32_t low, uint32_t high, uint32_t by) {
    uint64_t both = (uint64_t)high << 32 | low;
    by = s.in.detail[1] ? by & 31 : std::min(by, 32u);
    return s.in.detail[0] ? (uint32_t)(both << by >> 32) : (uint32_t)(both >> by);
  });
}
void permute_bytes(Step &s) {
  s.each<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t permuted = 0;
    for (int k = 0; k < 4; k++) {
      unsigned choice = selector >> (4 * k) & 15;
      uint32_t byte = both >> (8 * (choice & 7)) & 0xff;
      if (choice & 8) byte = byte & 0x80 ? 0xff : 0; // its sign, in all bits
      permuted |= byte << (8 * k);
    }
    return permuted;
  });
}
void logic_of_3(Step &s) { // the immediate is a table of truth
  s.each<uint32_t, uint32_t, uint32_t>([&](uint32_t a, uint32_t b, uint32_t c) {
    uint32_t found = 0;
    for (int k = 0; k < 8; k++)
      if (s.in.immediate >> k & 1) found |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return found;
  });
}
template <class T> void count_bits(Step &s) {
  s.each<T>([](T a) { return (uint32_t)__builtin_popcountll(a); });
}
template <class T> void leading_zeros(Step &s) {
  s.each<T>([](T a) {
    return a ? (uint32_t)__builtin_clzll(a) - (64 - 8 * (uint32_t)sizeof(T)) : 8 * (uint32_t)sizeof(T);
  });
}
template <class T> void reverse_bits(Step &s) {
  s.each<T>([](T a) {
    T reversed = 0;
    for (unsigned k = 0; k < 8 * sizeof(T); k++) reversed = reversed << 1 | (a >> k & 1);
    return reversed;
  });
}
// bfind: where the highest bit is that is no sign; with detail[0] as a shift. -1 if there is none.
template <class T> void find_bit(Step &s) {
  s.each<T>([&](T a) {
    uint64_t bits = a < 0 ? (uint64_t)~a : (uint64_t)a;
    if (!bits) return ~0u;
    uint32_t found = 63 - __builtin_clzll(bits);
    return s.in.detail[0] ? 8 * (uint32_t)sizeof(T) - 1 - found : found;
  });
}
template <class T> void extract_bits(Step &s) {
  s.each<T, uint32_t, uint32_t>([](T a, uint32_t first, uint32_t length) {
    const uint32_t bits = 8 * sizeof(T);
    first &= 255, length &= 255;
    const uint32_t last = std::min(first + length - 1, bits - 1);
    const bool sign = std::is_signed_v<T> && length && (a >> last & 1);
    uint64_t field = 0;
    for (uint32_t k = 0; k < bits; k++)
      field |= (uint64_t)(k < length && first + k < bits ? a >> (first + k) & 1 : sign) << k;
    return (T)field;
  });
}
template <class T> void insert_bits(Step &s) {
  s.each<T, T, uint32_t, uint32_t>([](T a, T b, uint32_t first, uint32_t length) {
    first &= 255, length &= 255;
    T ones = length < 8 * sizeof(T) ? (T)((1ull << length) - 1) : (T)~0ull;
    T mask = shift_left<T>(ones, first);
    return (T)((b & ~mask) | (shift_left<T>(a, first) & mask));
  });
}

// --- conversion ----------------------------------------------------------------------------------

// As `TYPES` of emulator.py.
enum Type { U8, S8, U16, S16, U32, S32, U64, S64, F16, BF16, F32, F64 };
constexpr unsigned SIZES[] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8};
bool is_signed(int type) { return type < F16 && type % 2; }

__int128 integer_of(uint64_t bits, int type) {
  unsigned unused = 64 - 8 * SIZES[type];
  if (is_signed(type)) return (int64_t)(bits << unused) >> unused;
  return bits << unused >> unused;
}
double real_of(uint64_t bits, int type) {
  switch (type) {
  case F16: return real(as<Half>(bits));
  case BF16: return real(as<Brain>(bits));
  case F32: return as<float>(bits);
  default: return as<double>(bits);
  }
}
uint64_t bits_of_real(double x, int type, int rounding) {
  switch (type) {
  case F16: return rounded<Half>(x, rounding).bits;
  case BF16: return rounded<Brain>(x, rounding).bits;
  case F32: return bits_of(rounded<float>(x, rounding));
  default: return bits_of(x);
  }
}

// What cvt does to one number: to detail[0] from detail[1]; detail[2] says that a result without
// a fraction is asked for.
uint64_t converted(const Step &s, uint64_t bits) {
  int to = s.in.detail[0], from = s.in.detail[1], rounding = s.in.rounding;
  if (from < F16) {
    __int128 integer = integer_of(bits, from);
    if (to == F64) { // 64 bits may not fit
      HostRounding host(rounding);
      return bits_of(from == U64 ? (double)(uint64_t)integer : (double)(int64_t)integer);
    }
    if (to > F64 || to >= F16) return bits_of_real(to_odd(integer), to, rounding);
    if (s.has(SATURATE)) {
      unsigned width = 8 * SIZES[to];
      __int128 least = is_signed(to) ? -((__int128)1 << (width - 1)) : 0;
      __int128 most = ((__int128)1 << (width - is_signed(to))) - 1;
      integer = std::min(std::max(integer, least), most);
    }
    return SIZES[to] == 8 ? (uint64_t)integer : (uint64_t)integer & ((1ull << 8 * SIZES[to]) - 1);
  }
  double x = real_of(bits, from);
  if (s.has(FLUSH) && from == F32) x = flush((float)x);
  if (to < F16)
    return saturated_integer(round_to_integer(x, rounding), SIZES[to], is_signed(to),
                             from == F64 || SIZES[to] == 8);
  if (s.in.detail[2]) x = round_to_integer(x, rounding);
  if (s.has(RELU)) x = x != x ? x : std::max(x, 0.0);
  if (s.has(SATURATE)) x = saturate(x);
  uint64_t result = bits_of_real(x, to, rounding);
  return s.has(FLUSH) && to == F32 ? bits_of(flush(as<float>(result))) : result;
}
void convert(Step &s) {
  s.each<uint64_t>([&](uint64_t a) { return converted(s, a); });
}
void convert_pair(Step &s) { // the first operand becomes the upper half
  s.each<uint64_t, uint64_t>(
      [&](uint64_t a, uint64_t b) { return converted(s, a) << 16 | converted(s, b); });
}
// Between integers without saturation, most of all conversions.
void extend_or_truncate(Step &s) {
  unsigned unused = 64 - 8 * std::min(SIZES[s.in.detail[0]], SIZES[s.in.detail[1]]);
  unsigned beyond = 64 - 8 * SIZES[s.in.detail[0]];
  if (is_signed(s.in.detail[1]))
    s.each<uint64_t>([=](uint64_t a) {
      return (uint64_t)((int64_t)(a << unused) >> unused) << beyond >> beyond;
    });
  else
    s.each<uint64_t>([=](uint64_t a) { return a << unused >> unused; });
}
void widen_float(Step &s) {
  s.each<float>([](float a) { return (double)a; });
}

// --- memory --------------------------------------------------------------------------------------

// The bytes of an access, after everything about it is checked.
uint8_t *access(const Step &s, int space, uint64_t address, unsigned size, unsigned alignment,
                Kind kind, int lane, const uint8_t *value = nullptr, bool ordered = false) {
  const bool writes = kind != READ;
  if (address % alignment) s.fail("misaligned access", address);
  if (space == SHARED) {
    if (address + size > s.program.shared.size())
      s.fail(writes ? "write to shared memory out of bounds" : "read of shared memory out of bounds",
             address);
    if (s.launch.options.checks) {
      Thread thread{s.program.round, s.warp.index, s.warp.syncs, (uint32_t)lane};
      const bool strict = s.launch.options.checks > 1;
      const char *wrong = s.program.shared.touch(address, size, kind, thread, value, strict);
      if (wrong) s.note(wrong, address, s.in.number);
    }
    return s.program.shared.at(address);
  }
  if (space == LOCAL) {
    const size_t own = s.launch.kernel.local;
    if (address + size > own) s.fail("access to local memory out of bounds", address);
    return &s.warp.local[lane * own + address];
  }
  if (!s.launch.global.holds(address, size))
    s.fail(writes ? "write to global memory out of bounds" : "read of global memory out of bounds",
           address);
  if (s.launch.options.checks && !ordered) {
    Owner owner{s.program.serial, (uint32_t)s.in.number, (uint16_t)s.program.round, (uint16_t)s.warp.index};
    const char *wrong = s.launch.global.touch(address, size, kind, owner,
                                              !s.program.synchronises, value);
    if (wrong) s.note(wrong, address, s.in.number);
  }
  return (uint8_t *)address;
}

// Of operand k, shared addresses of 32 bits.
uint64_t address_of(const Step &s, int k, int space, int lane) {
  uint64_t base = s.operand(k)[lane];
  return space == SHARED ? (uint32_t)(base + s.in.immediate) : base + s.in.immediate;
}

// Sectors of 32 bytes of global memory; of shared memory how many words the fullest bank gives.
void count_access(const Step &s, int k, int space, unsigned size) {
  if (!s.launch.options.counts || space == LOCAL) return;
  const unsigned grain = space == GLOBAL ? 32 : 4;
  std::vector<uint64_t> grains;
  for (int l = 0; l < LANES; l++)
    if (s.runs(l)) {
      uint64_t address = address_of(s, k, space, l);
      for (uint64_t g = address / grain; g <= (address + size - 1) / grain; g++) grains.push_back(g);
    }
  std::sort(grains.begin(), grains.end());
  grains.erase(std::unique(grains.begin(), grains.end()), grains.end());
  Count &count = s.launch.counts[s.place];
  if (space == GLOBAL) {
    count.sectors += grains.size();
    return;
  }
  unsigned banks[32] = {}, most = 0;
  for (uint64_t g : grains) most = std::max(most, ++banks[g % 32]);
  count.wavefronts += most;
}

uint64_t extended(uint64_t value, unsigned size) {
  return integer_of(value, size == 1 ? S8 : size == 2 ? S16 : S32);
}

// detail: bytes an element, sign extended (to 8 bytes: registers are cut where they are used),
// whether other programs are known to write it (volatile, relaxed, acquire).
template <Space SPACE> void load(Step &s) {
  const unsigned size = s.in.detail[0], all = size * s.in.results;
  count_access(s, 0, SPACE, all);
  if (s.in.detail[3]) s.program.synchronises = true;
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    const uint8_t *from = access(s, SPACE, address_of(s, 0, SPACE, l), all, all, READ, l, nullptr,
                                 s.in.detail[2]);
    for (int k = 0; k < s.in.results; k++) {
      uint64_t value = 0;
      memcpy(&value, from + k * size, size);
      if (s.in.detail[1]) value = extended(value, size);
      if (s.keeps(k)) s.result(k)[l] = value;
    }
  }
}
template <Space SPACE> void store(Step &s) {
  const unsigned size = s.in.detail[0], number = s.in.operands - 1;
  count_access(s, 0, SPACE, size * number);
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    uint8_t value[64];
    for (unsigned k = 0; k < number; k++) memcpy(value + k * size, &s.operand(k + 1)[l], size);
    uint8_t *to = access(s, SPACE, address_of(s, 0, SPACE, l), size * number, size * number, WRITE,
                         l, value, s.in.detail[2]);
    memcpy(to, value, size * number);
  }
}
void load_parameter(Step &s) {
  for (int k = 0; k < s.in.results; k++) {
    uint64_t value = 0;
    const unsigned size = s.in.detail[0];
    memcpy(&value, s.launch.parameters + s.in.immediate + k * size, size);
    if (s.in.detail[1]) value = extended(value, size);
    if (s.keeps(k))
      for (int l = 0; l < LANES; l++)
        if (s.runs(l)) s.result(k)[l] = value;
  }
}

struct Exchange {
  template <class T> T operator()(T, T b) const { return b; }
};
struct Increment {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a >= b ? 0 : a + 1; }
};
struct Decrement {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a == 0 || a > b ? b : a - 1; }
};
template <class T> struct AddShort {
  T operator()(T a, T b) const { return short_real<T, Add>(a, b); }
};
template <class T> struct AddPair {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    return of_pairs<T>(short_real<T, Add, T, T>, a, b);
  }
};

// Lane after lane: update(old, lane) is what memory holds then. detail[0] is the space.
template <class T, class F> void update_memory(Step &s, F update) {
  const int space = s.in.detail[0];
  count_access(s, 0, space, sizeof(T));
  if (s.in.detail[3]) s.program.synchronises = true;
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    uint8_t *at =
        access(s, space, address_of(s, 0, space, l), sizeof(T), sizeof(T), ATOMIC, l, nullptr);
    T old, now;
    memcpy(&old, at, sizeof(T));
    now = update(old, l);
    memcpy(at, &now, sizeof(T));
    if (s.keeps(0)) s.result(0)[l] = bits_of(old);
  }
}
template <class T, class F> void atomic(Step &s) {
  update_memory<T>(s, [&](T old, int l) { return F()(old, as<T>(s.operand(1)[l])); });
}
// In global memory a GPU flushes subnormal numbers of single precision, in shared memory it does not.
void atomic_add_float(Step &s) {
  const bool flushes = s.in.detail[0] == GLOBAL;
  update_memory<float>(s, [&](float old, int l) {
    float added = as<float>(s.operand(1)[l]);
    return canonical(flushes ? flush(flush(old) + flush(added)) : old + added);
  });
}
template <class T> void compare_and_swap(Step &s) {
  update_memory<T>(s, [&](T old, int l) {
    return old == as<T>(s.operand(1)[l]) ? as<T>(s.operand(2)[l]) : old;
  });
}
void fence(Step &s) { s.program.synchronises = true; }

// ldmatrix, stmatrix: detail[0] matrices of 8 x 8 numbers of 16 bits, each lane giving the address
// of one row; detail[1] is transposed.
void require_all_lanes(const Step &s) {
  if (s.lanes != ~0u) s.fail("not all lanes take part in what all have to");
}
void load_matrices(Step &s) {
  require_all_lanes(s);
  Lanes loaded[4]; // a result may take the place of the addresses
  for (int m = 0; m < s.in.detail[0]; m++) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; row++)
      memcpy(matrix[row],
             access(s, SHARED, address_of(s, 0, SHARED, 8 * m + row), 16, 16, READ, 8 * m + row),
             16);
    for (int l = 0; l < LANES; l++) {
      uint32_t pair = 0;
      for (int k = 0; k < 2; k++) {
        int row = l / 4, column = 2 * (l % 4) + k;
        pair |= (uint32_t)(s.in.detail[1] ? matrix[column][row] : matrix[row][column]) << 16 * k;
      }
      loaded[m][l] = pair;
    }
  }
  for (int m = 0; m < s.in.detail[0]; m++) memcpy(s.result(m), loaded[m], sizeof(Lanes));
}
void store_matrices(Step &s) {
  require_all_lanes(s);
  for (int m = 0; m < s.in.detail[0]; m++) {
    uint16_t matrix[8][8];
    for (int l = 0; l < LANES; l++)
      for (int k = 0; k < 2; k++) {
        int row = l / 4, column = 2 * (l % 4) + k;
        (s.in.detail[1] ? matrix[column][row] : matrix[row][column]) =
            s.operand(1 + m)[l] >> 16 * k & 0xffff;
      }
    for (int row = 0; row < 8; row++)
      memcpy(access(s, SHARED, address_of(s, 0, SHARED, 8 * m + row), 16, 16, WRITE, 8 * m + row,
                    (uint8_t *)matrix[row]),
             matrix[row], 16);
  }
}

// cp.async: nothing is copied before somebody waits. detail[0] bytes, of which operand 2 are given.
void copy_later(Step &s) {
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    uint32_t size = s.in.detail[0];
    uint32_t given = s.in.operands > 2 ? (uint32_t)s.operand(2)[l] : size;
    s.warp.copies.push_back({address_of(s, 0, SHARED, l), s.operand(1)[l] + s.in.detail[1], size,
                             std::min(given, size), (uint32_t)l, &s.in});
  }
}
void close_group(Step &s) {
  s.warp.groups.push_back(std::move(s.warp.copies));
  s.warp.copies.clear();
}
void wait_for_groups(Step &s) { // but for the newest detail[0]
  for (; (int)s.warp.groups.size() > s.in.detail[0]; s.warp.groups.erase(s.warp.groups.begin()))
    for (const Copy &copy : s.warp.groups.front()) {
      Step by{s.launch, s.program, s.warp, *copy.by, s.lanes, s.active, s.place};
      uint8_t value[16] = {};
      if (copy.given)
        memcpy(value, access(by, GLOBAL, copy.from, copy.given, 1, READ, copy.lane), copy.given);
      memcpy(access(by, SHARED, copy.to, copy.size, copy.size, WRITE, copy.lane, value), value,
             copy.size);
    }
}

// --- control, and what lanes tell each other -----------------------------------------------------

void branch(Step &s) { s.warp.go(s.lanes, (int)s.in.immediate); }
void leave(Step &s) { s.warp.alive &= ~s.lanes; }
void trap(Step &s) { s.fail("trap"); }
void nothing(Step &) {}

void wait_for_all(Step &s) {
  if (s.lanes != s.warp.alive) s.fail("barrier in divergent code");
  s.warp.waits = true;
}
// The lanes that operand k names have to be those that are here.
void require_members(const Step &s, int k) {
  for (int l = 0; l < LANES; l++)
    if (s.runs(l) && ((uint32_t)s.operand(k)[l] & s.warp.alive) != s.lanes)
      s.fail("lanes that have to take part are elsewhere, or not named");
}
void synchronise_warp(Step &s) {
  require_members(s, 0);
  if (s.lanes == s.warp.alive) s.warp.syncs++;
}

enum Shuffle { SHUFFLE_UP, SHUFFLE_DOWN, BUTTERFLY, INDEXED };
void shuffle(Step &s) { // by detail[0]
  require_members(s, 3);
  uint64_t given[LANES];
  memcpy(given, s.operand(0), sizeof given);
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    int by = s.operand(1)[l] & 31, clamp = s.operand(2)[l] & 31, segment = s.operand(2)[l] >> 8 & 31;
    int last = (l & segment) | (clamp & ~segment), from;
    switch (s.in.detail[0]) {
    case SHUFFLE_UP: from = l - by; break;
    case SHUFFLE_DOWN: from = l + by; break;
    case BUTTERFLY: from = l ^ by; break;
    default: from = (l & segment) | (by & ~segment);
    }
    bool inside = s.in.detail[0] == SHUFFLE_UP ? from >= last : from <= last;
    if (!inside) from = l;
    if (!s.runs(from)) s.fail("shuffle from a lane that takes no part");
    s.result(0)[l] = (uint32_t)given[from];
    if (s.keeps(1)) s.result(1)[l] = inside;
  }
}

enum Vote { ALL, ANY, UNIFORM, BALLOT };
void vote(Step &s) { // detail[0]
  require_members(s, 1);
  uint32_t yes = 0;
  for (int l = 0; l < LANES; l++)
    if (s.runs(l) && (s.operand(0)[l] & 1) != s.has(NEGATE_PREDICATE)) yes |= 1u << l;
  const uint32_t outcome[] = {yes == s.lanes, yes != 0, yes == 0 || yes == s.lanes, yes};
  for (int l = 0; l < LANES; l++)
    if (s.runs(l)) s.result(0)[l] = outcome[s.in.detail[0]];
}

template <class T, class F> void reduce(Step &s) {
  require_members(s, 1);
  int first = __builtin_ctz(s.lanes);
  T total = as<T>(s.operand(0)[first]);
  for (int l = first + 1; l < LANES; l++)
    if (s.runs(l)) total = F()(total, as<T>(s.operand(0)[l]));
  for (int l = 0; l < LANES; l++)
    if (s.runs(l)) s.result(0)[l] = bits_of(total);
}
void active_mask(Step &s) {
  for (int l = 0; l < LANES; l++)
    if (s.runs(l)) s.result(0)[l] = s.active;
}
void elect(Step &s) { // the lowest lane
  require_members(s, 0);
  for (int l = 0; l < LANES; l++) {
    if (!s.runs(l)) continue;
    if (s.keeps(0)) s.result(0)[l] = __builtin_ctz(s.lanes);
    s.result(1)[l] = l == __builtin_ctz(s.lanes);
  }
}

// --- which name is done by what ------------------------------------------------------------------

template <class T> void add_integers(Table &t, const std::string &type) {
  using U = std::make_unsigned_t<T>; // wraps around
  t["add." + type] = integer_2<U, Add>;
  t["sub." + type] = integer_2<U, Subtract>;
  t["mul.lo." + type] = integer_2<U, MultiplyLow>;
  t["mul.hi." + type] = integer_2<T, MultiplyHigh>;
  t["mad.lo." + type] = multiply_add<U>;
  t["mad.hi." + type] = multiply_high_add<T>;
  t["div." + type] = integer_2<T, IntegerDivide>;
  t["rem." + type] = integer_2<T, IntegerRemainder>;
  t["min." + type] = integer_2<T, Minimum>;
  t["max." + type] = integer_2<T, Maximum>;
  t["shr." + type] = shift_right_by<T>;
  t["setp." + type] = set_predicate<T>;
  if (std::is_signed_v<T>) {
    t["neg." + type] = integer_1<T, NegateInteger>;
    t["abs." + type] = integer_1<T, AbsoluteInteger>;
  }
  if constexpr (sizeof(T) < 8) t["mul.wide." + type] = t["mad.wide." + type] = multiply_wide<T>;
  if constexpr (sizeof(T) > 2) {
    t["bfind." + type] = find_bit<T>;
    t["bfe." + type] = extract_bits<T>;
    t["atom.add." + type] = atomic<T, Add>;
    t["atom.min." + type] = atomic<T, Minimum>;
    t["atom.max." + type] = atomic<T, Maximum>;
  }
}

template <class T> void add_bits(Table &t, const std::string &type) {
  t["and." + type] = integer_2<T, And>;
  t["or." + type] = integer_2<T, Or>;
  t["xor." + type] = integer_2<T, Xor>;
  t["not." + type] = integer_1<T, Not>;
  t["shl." + type] = shift_left_by<T>;
  t["shr." + type] = shift_right_by<T>;
  t["setp." + type] = set_predicate<T>;
  if constexpr (sizeof(T) == 2) {
    t["atom.cas." + type] = compare_and_swap<T>;
  } else {
    t["popc." + type] = count_bits<T>;
    t["clz." + type] = leading_zeros<T>;
    t["brev." + type] = reverse_bits<T>;
    t["bfi." + type] = insert_bits<T>;
    t["atom.and." + type] = atomic<T, And>;
    t["atom.or." + type] = atomic<T, Or>;
    t["atom.xor." + type] = atomic<T, Xor>;
    t["atom.exch." + type] = atomic<T, Exchange>;
    t["atom.cas." + type] = compare_and_swap<T>;
  }
}

template <class T> void add_reals(Table &t, const std::string &type) {
  t["add." + type] = real_operation<T, Add, T, T>;
  t["sub." + type] = real_operation<T, Subtract, T, T>;
  t["mul." + type] = real_operation<T, Multiply, T, T>;
  t["div." + type] = real_operation<T, Divide, T, T>;
  t["fma." + type] = t["mad." + type] = real_operation<T, FusedMultiplyAdd, T, T, T>;
  t["rcp." + type] = real_operation<T, Reciprocal, T>;
  t["sqrt." + type] = real_operation<T, SquareRoot, T>;
  t["rsqrt." + type] = real_operation<T, ReciprocalSquareRoot, T>;
  t["min." + type] = extreme_of<T, true>;
  t["max." + type] = extreme_of<T, false>;
  t["setp." + type] = set_predicate<T>;
  t["copysign." + type] = copy_sign<T>;
  constexpr uint64_t sign = 1ull << (8 * sizeof(T) - 1);
  t["neg." + type] = change_sign<sign, false>;
  t["abs." + type] = change_sign<sign, true>;
}

template <class T> void add_short_reals(Table &t, const std::string &type) {
  t["add." + type] = short_operation<T, Add, T, T>;
  t["sub." + type] = short_operation<T, Subtract, T, T>;
  t["mul." + type] = short_operation<T, Multiply, T, T>;
  t["fma." + type] = short_operation<T, FusedMultiplyAdd, T, T, T>;
  t["min." + type] = extreme_of<T, true>;
  t["max." + type] = extreme_of<T, false>;
  t["setp." + type] = set_predicate<T>;
  t["neg." + type] = change_sign<0x8000, false>;
  t["abs." + type] = change_sign<0x8000, true>;
  t["atom.add." + type] = atomic<T, AddShort<T>>;
  const std::string pair = type + "x2";
  t["add." + pair] = pair_2<T, Add>;
  t["sub." + pair] = pair_2<T, Subtract>;
  t["mul." + pair] = pair_2<T, Multiply>;
  t["fma." + pair] = pair_3<T, FusedMultiplyAdd>;
  t["min." + pair] = extreme_of_pairs<T, true>;
  t["max." + pair] = extreme_of_pairs<T, false>;
  t["setp." + pair] = set_predicates_of_pair<T>;
  t["neg." + pair] = change_sign<0x80008000, false>;
  t["abs." + pair] = change_sign<0x80008000, true>;
  t["atom.add." + pair] = atomic<uint32_t, AddPair<T>>;
}

template <class F> void add_function(Table &t, const std::string &name) {
  t[name + ".f32"] = real_operation<float, F, float>;
}

Table handlers() {
  Table t;
  add_integers<uint16_t>(t, "u16");
  add_integers<int16_t>(t, "s16");
  add_integers<uint32_t>(t, "u32");
  add_integers<int32_t>(t, "s32");
  add_integers<uint64_t>(t, "u64");
  add_integers<int64_t>(t, "s64");
  add_bits<uint16_t>(t, "b16");
  add_bits<uint32_t>(t, "b32");
  add_bits<uint64_t>(t, "b64");
  add_reals<float>(t, "f32");
  add_reals<double>(t, "f64");
  add_short_reals<Half>(t, "f16");
  add_short_reals<Brain>(t, "bf16");
  add_function<PowerOf2>(t, "ex2");
  add_function<Logarithm2>(t, "lg2");
  add_function<Sine>(t, "sin");
  add_function<Cosine>(t, "cos");
  add_function<HyperbolicTangent>(t, "tanh");
  t["rcp.approx.f64"] = approximate_reciprocal;
  t["min.relu.s32"] = extreme_relu<true>;
  t["max.relu.s32"] = extreme_relu<false>;
  t["min.xorsign.f32"] = extreme_of_magnitudes<true>;
  t["max.xorsign.f32"] = extreme_of_magnitudes<false>;
  t["and.pred"] = integer_2<uint64_t, And>;
  t["or.pred"] = integer_2<uint64_t, Or>;
  t["xor.pred"] = integer_2<uint64_t, Xor>;
  t["not.pred"] = not_predicate;
  t["selp"] = select;
  t["mov"] = move;
  t["pack"] = pack;
  t["unpack"] = unpack;
  t["shf"] = funnel_shift;
  t["prmt"] = permute_bytes;
  t["lop3"] = logic_of_3;
  t["cvt"] = convert;
  t["cvt.pair"] = convert_pair;
  t["cvt.integer"] = extend_or_truncate;
  t["cvt.f64.f32"] = widen_float;
  t["ld.global"] = load<GLOBAL>;
  t["ld.shared"] = load<SHARED>;
  t["ld.local"] = load<LOCAL>;
  t["st.local"] = store<LOCAL>;
  t["ld.param"] = load_parameter;
  t["st.global"] = store<GLOBAL>;
  t["st.shared"] = store<SHARED>;
  t["atom.add.f32"] = atomic_add_float;
  t["atom.add.f64"] = atomic<double, Add>;
  t["atom.inc.u32"] = atomic<uint32_t, Increment>;
  t["atom.dec.u32"] = atomic<uint32_t, Decrement>;
  t["fence"] = fence;
  t["ldmatrix"] = load_matrices;
  t["stmatrix"] = store_matrices;
  t["cp.async"] = copy_later;
  t["cp.async.commit_group"] = close_group;
  t["cp.async.wait_group"] = wait_for_groups;
  t["bra"] = branch;
  t["ret"] = leave;
  t["trap"] = trap;
  t["nop"] = nothing;
  t["bar.sync"] = wait_for_all;
  t["bar.warp.sync"] = synchronise_warp;
  t["shfl"] = shuffle;
  t["vote"] = vote;
  t["redux.add.u32"] = t["redux.add.s32"] = reduce<uint32_t, Add>;
  t["redux.min.u32"] = reduce<uint32_t, Minimum>;
  t["redux.max.u32"] = reduce<uint32_t, Maximum>;
  t["redux.min.s32"] = reduce<int32_t, Minimum>;
  t["redux.max.s32"] = reduce<int32_t, Maximum>;
  t["redux.and.b32"] = reduce<uint32_t, And>;
  t["redux.or.b32"] = reduce<uint32_t, Or>;
  t["redux.xor.b32"] = reduce<uint32_t, Xor>;
  t["activemask"] = active_mask;
  t["elect"] = elect;
  return t;
}

// The handlers in the order of their names, which is how emulator.py numbers them.
const std::vector<Handler> &numbered_handlers() {
  static const std::vector<Handler> all = [] {
    std::vector<Handler> found;
    for (auto &entry : handlers()) found.push_back(entry.second);
    return found;
  }();
  return all;
}

// --- running -------------------------------------------------------------------------------------

void step(Launch &launch, Program &program, Warp &warp) {
  static const std::vector<Handler> &table = numbered_handlers();
  int place;
  const uint32_t active = warp.next(place);
  const Instruction &in = launch.kernel.code[place];
  uint32_t lanes = active;
  if (in.guard >= 0) {
    const uint64_t *guard = &warp.registers[(size_t)in.guard * LANES];
    lanes = 0;
    for (int l = 0; l < LANES; l++)
      lanes |= (uint32_t)((guard[l] & 1) != (uint64_t)in.negated) << l;
    lanes &= active;
  }
  if (++launch.instructions > launch.options.most_instructions)
    throw Fault(std::to_string(in.number) + "\tmore instructions than allowed: an endless loop?\t");
  Count &count = launch.counts[place];
  count.warps++;
  count.lanes += __builtin_popcount(lanes);
  warp.go(active, place + 1);
  if (!lanes) return;
  Step now{launch, program, warp, in, lanes, active, place};
  table[in.handler](now);
}

void start(Launch &launch, Program &program, uint64_t number) {
  const Kernel &kernel = launch.kernel;
  const uint32_t *grid = launch.options.grid;
  program.id[0] = number % grid[0];
  program.id[1] = number / grid[0] % grid[1];
  program.id[2] = number / grid[0] / grid[1];
  program.serial = number + 1;
  program.shared.clear(kernel.shared + launch.options.dynamic_shared);
  program.round = 1;
  program.synchronises = program.done = false;
  program.warps.resize((kernel.threads + LANES - 1) / LANES);
  for (size_t w = 0; w < program.warps.size(); w++) {
    Warp &warp = program.warps[w];
    std::vector<uint64_t> registers = std::move(warp.registers);
    registers.assign((size_t)kernel.registers * LANES, 0xDEADBEEFDEADBEEF);
    warp = Warp();
    warp.registers = std::move(registers);
    warp.index = w;
    warp.local.assign((size_t)kernel.local * LANES, 0xAB);
    int threads = kernel.threads - LANES * (int)w;
    warp.alive = threads >= LANES ? ~0u : (1u << threads) - 1;
    for (int l = 0; l < LANES; l++) {
      const uint32_t values[] = {(uint32_t)(w * LANES + l), 0, 0, program.id[0], program.id[1],
                                 program.id[2], (uint32_t)kernel.threads, 1, 1, grid[0], grid[1],
                                 grid[2], (uint32_t)l, (uint32_t)w};
      for (size_t k = 0; k < kernel.special.size(); k++)
        if (kernel.special[k] >= 0)
          warp.registers[(size_t)kernel.special[k] * LANES + l] = values[k];
    }
  }
}

// Runs a program until it is done, or for some instructions if others wait for their turn. With a
// seed the warps take turns in a random order and after a random number of instructions.
void run(Launch &launch, Program &program, uint64_t instructions) {
  const bool random = launch.options.order > 1;
  const size_t number = program.warps.size();
  while (true) {
    bool ended = true, waiting = true;
    size_t first = random ? launch.draw(number) : 0;
    for (size_t k = 0; k < number; k++) {
      Warp &warp = program.warps[(first + k) % number];
      uint64_t turn = random ? 1 + launch.draw(64) : ~0ull;
      for (; turn && instructions && warp.alive && !warp.waits; turn--, instructions--)
        step(launch, program, warp);
      ended &= !warp.alive;
      waiting &= !warp.alive || warp.waits;
    }
    if (ended) {
      program.done = true;
      return;
    }
    if (waiting) { // all that have not returned are at the barrier
      for (Warp &warp : program.warps) warp.waits = false;
      program.round++;
    }
    if (!instructions) return;
  }
}

void run(Launch &launch) {
  const Options &options = launch.options;
  const uint64_t number = (uint64_t)options.grid[0] * options.grid[1] * options.grid[2];
  std::vector<uint32_t> order(number);
  for (uint64_t k = 0; k < number; k++) order[k] = options.order == 1 ? number - 1 - k : k;
  if (options.order > 1)
    for (uint64_t k = number; k > 1; k--) std::swap(order[k - 1], order[launch.draw(k)]);
  const bool interleaved = options.concurrent > 1;
  std::vector<Program> programs(std::min<uint64_t>(number, options.concurrent));
  uint64_t started = 0, running = programs.size();
  for (Program &program : programs) start(launch, program, order[started++]);
  while (running)
    for (Program &program : programs) {
      if (program.done) continue;
      run(launch, program, interleaved ? 1 + launch.draw(400) : ~0ull);
      if (!program.done) continue;
      if (started < number)
        start(launch, program, order[started++]);
      else
        running--;
    }
}

// --- called from Python --------------------------------------------------------------------------

extern "C" {

// The names that `handlers` has, in its order, a blank behind each.
const char *emulator_handlers() {
  static const std::string names = [] {
    std::string all;
    for (auto &entry : handlers()) all += entry.first + " ";
    return all;
  }();
  return names.c_str();
}

int emulator_instruction_size() { return sizeof(Instruction); }

void *emulator_create(const Instruction *code, int instructions, const uint64_t *constants,
                      int number, int registers, int threads, int shared, int local,
                      const int32_t *special, int specials) {
  auto kernel = std::make_unique<Kernel>();
  kernel->code.assign(code, code + instructions);
  for (int k = 0; k < number; k++) kernel->constants.insert(kernel->constants.end(), LANES, constants[k]);
  kernel->registers = registers;
  kernel->threads = threads;
  kernel->shared = shared;
  kernel->local = local;
  kernel->special.assign(special, special + specials);
  return kernel.release();
}

void emulator_destroy(void *kernel) { delete (Kernel *)kernel; }

// 0: all done; -1: it stopped, the text says why. Notes come back in either case, a line each.
int emulator_launch(const void *kernel, const Options *options, const uint8_t *parameters,
                    const uint64_t *starts, const uint64_t *ends, int ranges, Count *counts,
                    char *text, int size) {
  const Kernel &code = *(const Kernel *)kernel;
  std::string fault;
  try {
    Launch launch{code,
                  *options,
                  parameters,
                  {starts, ends, ranges, options->checks != 0},
                  std::vector<Count>(code.code.size()),
                  {},
                  0,
                  (uint32_t)options->order * 2654435761u + 12345};
    try {
      run(launch);
    } catch (const Fault &stopped) {
      fault = std::string("fault\t") + stopped.what() + "\n";
    }
    std::copy(launch.counts.begin(), launch.counts.end(), counts);
    for (auto &note : launch.notes)
      fault += "note\t" + note.first + ", " + std::to_string(note.second) + " times\n";
  } catch (const Fault &stopped) {
    fault = std::string("fault\t-1\t") + stopped.what() + "\t\n";
  }
  snprintf(text, size, "%s", fault.c_str());
  return fault.compare(0, 5, "fault") == 0 ? -1 : 0;
}
}
