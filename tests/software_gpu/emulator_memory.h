// Memory that is watched: bounds, alignment, and who touched a byte since when.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <vector>

// What ends a launch.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum Kind { READ, WRITE, ATOMIC };

// --- shared memory: of one program ---------------------------------------------------------------

// Which threads touched a byte in one way since the last barrier. Lanes are told apart as long as
// one warp alone did.
struct Touch {
  uint32_t round = 0, warps = 0, sync = 0, lanes = 0;
};

// A thread at a time: `round` counts the barriers of its program, `sync` those of its warp.
struct Thread {
  uint32_t round, warp, sync, lane;

  bool is_unordered_with(const Touch &other) const {
    if (other.round != round) return false;
    if (other.warps & ~(1u << warp)) return true;
    return other.sync == sync && (other.lanes & ~(1u << lane));
  }

  void leave(Touch &touch) const {
    if (touch.round != round)
      touch = {round, 1u << warp, sync, 1u << lane};
    else if (touch.warps != 1u << warp)
      touch.warps |= 1u << warp;
    else if (touch.sync != sync)
      touch.sync = sync, touch.lanes = 1u << lane;
    else
      touch.lanes |= 1u << lane;
  }
};

class SharedMemory {
public:
  // For a program that starts: the bytes hold nothing that it may rely on.
  void clear(size_t size) {
    bytes.assign(size, 0xAB);
    shadow.assign(size, {});
  }

  size_t size() const { return bytes.size(); }
  uint8_t *at(size_t address) { return &bytes[address]; }

  // What is wrong with an access, or null. What writes the value that is there disturbs nobody,
  // unless one is strict.
  const char *touch(size_t address, size_t size, Kind kind, const Thread &by,
                    const uint8_t *value, bool strict) {
    const char *wrong = nullptr;
    for (size_t k = 0; k < size; k++) {
      Byte &byte = shadow[address + k];
      bool changes = kind != WRITE || strict || !byte.written || bytes[address + k] != value[k];
      if (kind != WRITE && !byte.written) wrong = "shared memory that nobody wrote is read";
      if (changes)
        for (Kind other : {READ, WRITE, ATOMIC})
          if ((kind != other || kind == WRITE) && by.is_unordered_with(byte.touches[other]))
            wrong = RACES[kind];
      by.leave(byte.touches[kind]);
      byte.written |= kind != READ;
    }
    return wrong;
  }

private:
  struct Byte {
    Touch touches[3]; // by Kind
    bool written = false;
  };
  static constexpr const char *RACES[] = {
      "race in shared memory: a read of what another thread wrote, no barrier between",
      "race in shared memory: a write of what another thread touched, no barrier between",
      "race in shared memory: an atomic on what another thread touched, no barrier between"};
  std::vector<uint8_t> bytes;
  std::vector<Byte> shadow;
};

// --- global memory: of all programs --------------------------------------------------------------

// The last program that wrote a byte, or added to it; which of its warps, since which barrier, and
// by which instruction.
struct Owner {
  static constexpr uint32_t MANY = ~0u;
  static constexpr uint16_t MANY_WARPS = 0xffff;
  uint32_t program = 0; // counted from 1; 0 is nobody
  uint32_t instruction = 0;
  uint16_t round = 0, warp = 0;

  // Whether nothing puts this access and one by `other` in order. Where several warps hold the same
  // tensor all of them read, and one adds and writes: what the others read later nobody uses. So
  // of one program a read is compared with the writes that stand before it.
  bool is_unordered_with(const Owner &other, Kind kind) const {
    if (!other.program) return false;
    if (other.program != program) return true;
    if (kind == READ && instruction < other.instruction) return false;
    return other.round == round && other.warp != warp;
  }
  void leave(Owner &last) const {
    Owner now = *this;
    if (last.program && last.program != program)
      now.program = MANY;
    else if (last.program && last.round == round && last.warp != warp)
      now.warp = MANY_WARPS;
    last = now;
  }
};

// Allocations that a launch may touch. Without any, every address may be touched, unwatched.
class GlobalMemory {
public:
  GlobalMemory(const uint64_t *starts, const uint64_t *ends, int number, bool watch) {
    for (int k = 0; k < number; k++) ranges.push_back({starts[k], ends[k], nullptr});
    if (watch)
      for (Range &range : ranges)
        if (range.start < range.end) range.shadow = reserve(range.end - range.start);
  }
  ~GlobalMemory() {
    for (Range &range : ranges)
      if (range.shadow) munmap(range.shadow, (range.end - range.start) * sizeof(Byte));
  }
  GlobalMemory(const GlobalMemory &) = delete;

  bool holds(uint64_t address, size_t size) {
    return ranges.empty() || find(address, size) != nullptr;
  }

  // As of shared memory. A program whose accesses an acquire or a fence orders is not judged.
  const char *touch(uint64_t address, size_t size, Kind kind, const Owner &by, bool judged,
                    const uint8_t *value) {
    Range *range = find(address, size);
    if (!range || !range->shadow) return nullptr;
    const char *wrong = nullptr;
    const uint8_t *now = (const uint8_t *)address;
    for (size_t k = 0; k < size; k++) {
      Byte &byte = range->shadow[address - range->start + k];
      bool races = by.is_unordered_with(byte.writer, kind);
      if (kind != ATOMIC) races |= by.is_unordered_with(byte.adder, kind);
      bool changes = kind != WRITE || now[k] != value[k];
      if (races && changes && judged) wrong = RACES[kind];
      if (kind == WRITE) by.leave(byte.writer);
      if (kind == ATOMIC) by.leave(byte.adder);
    }
    return wrong;
  }

private:
  struct Byte {
    Owner writer, adder;
  };
  struct Range {
    uint64_t start, end;
    Byte *shadow;
  };
  static constexpr const char *RACES[] = {
      "race in global memory: a read of what another program or warp writes",
      "race in global memory: a write of what another program or warp writes",
      "race in global memory: an atomic on what another program or warp writes"};

  // Pages that are never touched are never allocated.
  static Byte *reserve(size_t bytes) {
    void *memory = mmap(nullptr, bytes * sizeof(Byte), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Fault("no memory to watch global memory with");
    return (Byte *)memory;
  }

  Range *find(uint64_t address, size_t size) {
    auto inside = [&](Range &range) {
      return address >= range.start && address + size <= range.end;
    };
    if (last < ranges.size() && inside(ranges[last])) return &ranges[last];
    for (last = 0; last < ranges.size(); last++)
      if (inside(ranges[last])) return &ranges[last];
    return nullptr;
  }

  std::vector<Range> ranges;
  size_t last = 0;
};
