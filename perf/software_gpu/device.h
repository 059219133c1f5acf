// What the driver (driver.cpp, libcuda.so.1) and the runtime (runtime.cpp, libcudart) share: one
// device, the log of what was asked of it, and hooks by which Python takes part.
#pragma once
#include <cuda.h>

#include <atomic>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

// --- the log: every operation that costs a launch or makes the host wait ---
enum Kind { KERNEL, COPY, MEMSET, SYNCHRONISATION, GRAPH, EVENT };
EXPORT void software_gpu_note(Kind kind, const char *name);

// --- memory: of the host; every block that was handed out is known ---
EXPORT void *software_gpu_allocate(size_t bytes, bool on_device);
EXPORT bool software_gpu_release(void *block); // false: nobody was given it
enum Place { UNKNOWN, HOST, DEVICE };
EXPORT Place software_gpu_find(const void *pointer, void **block, size_t *bytes);
EXPORT size_t software_gpu_memory(); // bytes that the device says it has

// --- capture: streams that record a graph; an event carries a capture from stream to stream ---
EXPORT unsigned long long software_gpu_begin_capture(const void *stream);
EXPORT unsigned long long software_gpu_end_capture(const void *stream);
EXPORT unsigned long long software_gpu_capture_of(const void *stream); // 0: none
EXPORT void software_gpu_join_capture(const void *stream, unsigned long long capture);

// --- hooks ---
struct Launch {
  const char *name;
  unsigned long long function;
  unsigned grid[3], block[3], shared;
  const void *stream;
  void **parameters;
  unsigned long long capture; // 0: none
};
typedef int (*LaunchHook)(const Launch *); // of the driver's kernels, which are Triton's; a CUresult
typedef int (*ReplayHook)(unsigned long long capture); // 0: everything was done
EXPORT void software_gpu_on_launch(LaunchHook hook);
EXPORT void software_gpu_on_replay(ReplayHook hook);
EXPORT int software_gpu_replay(unsigned long long capture);

// Called by every function that CUDA declares and nobody has written here.
EXPORT __attribute__((noreturn)) void software_gpu_unwritten(const char *name);

// An attribute that the device has, or the end of the process.
EXPORT int software_gpu_attribute(int attribute);
EXPORT const char *software_gpu_name();
